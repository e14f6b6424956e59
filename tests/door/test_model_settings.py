"""Settings of the model that would make garbage are refused, from Python and on the command line, before anything is
written."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

import fulllora_dist as fd
from fulllora_dist.core.errors import UserError
from tests.tiny import ARCHITECTURE, CLASSES, SIDE, SWIN, images, tiny

NAME = "vit_tiny_patch16_224"
SWIN_NAME = "swin_tiny_patch4_window7_224"
SWIN_ARCHITECTURE = {key: value for key, value in SWIN.items() if value is not None}
IMAGENET_255 = [123.675, 116.28, 103.53]
MODEL: dict[str, Any] = {
    "backbone": NAME, "pretrained": False, "num_classes": CLASSES, "image_size": SIDE, "model_kwargs": ARCHITECTURE,
}  # fmt: skip
CONFIG: dict[str, Any] = {
    "threat": {"eps": "4/255"},
    "method": {"name": "pgd", "steps": 1},
    "data": {"train": "shards"},
    "run": {"output_dir": "out"},
    "tracking": {"uri": "sqlite:///mlflow.db"},
}

THREE = "must be three numbers, one for each channel of RGB, got"
BELOW_ONE = "must be at most 1, for pixels in [0, 1], got {}; divide by 255 if for 0..255"
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "mean in 0..255": ({"mean": IMAGENET_255}, {}, "model.mean: " + BELOW_ONE.format("123.675")),
    "one mean in 0..255": ({"mean": [0.5, 0.5, 103.53]}, {}, "model.mean: " + BELOW_ONE.format("103.53")),
    "std in 0..255": ({"std": [58.395, 57.12, 57.375]}, {}, "model.std: " + BELOW_ONE.format("58.395")),
    "negative mean": (
        {"mean": [0.5, -0.1, 0.5]},
        {},
        "model.mean.1: Input should be greater than or equal to 0 (got -0.1)",
    ),
    "std 0": ({"std": [0.2, 0.0, 0.2]}, {}, "model.std.1: Input should be greater than 0 (got 0.0)"),
    "negative std": ({"std": [0.2, 0.2, -0.2]}, {}, "model.std.2: Input should be greater than 0 (got -0.2)"),
    "two means": ({"mean": [0.5, 0.5]}, {}, f"model.mean: {THREE} [0.5, 0.5]"),
    "four stds": ({"std": [0.5] * 4}, {}, f"model.std: {THREE} [0.5, 0.5, 0.5, 0.5]"),
    "one std": ({"std": 0.5}, {}, f"model.std: {THREE} 0.5"),
    "a word": ({"mean": "imagenet"}, {}, f"model.mean: {THREE} 'imagenet'"),
    "nan": ({"std": [0.5, 0.5, float("nan")]}, {}, "model.std.2: Input should be a finite number (got nan)"),
    "a fraction over 1": (
        {},
        {"trainable_fraction": 1.5},
        "adapter.trainable_fraction: Input should be less than or equal to 1 (got 1.5)",
    ),
    "a fraction of 0": (
        {},
        {"trainable_fraction": 0.0},
        "adapter.trainable_fraction: Input should be greater than 0 (got 0.0)",
    ),
    "a negative fraction": (
        {},
        {"trainable_fraction": -0.05},
        "adapter.trainable_fraction: Input should be greater than 0 (got -0.05)",
    ),
    "alpha 0": ({}, {"alpha": 0.0}, "adapter.alpha: Input should be greater than 0 (got 0.0)"),
    "no image": ({"image_size": 0}, {}, "model.image_size: Input should be greater than or equal to 1 (got 0)"),
    "an image of no whole patches": (
        {"image_size": 18},
        {},
        f"model.image_size: must be a multiple of the patch size 4 of {NAME}, got 18",
    ),
    "the pretrained size with another patch": (
        {"image_size": None, "model_kwargs": ARCHITECTURE | {"patch_size": 15}},
        {},
        f"model.image_size: must be a multiple of the patch size 15 of {NAME}, got 224",
    ),
    "no whole patches for Swin": (
        {"backbone": SWIN_NAME, "image_size": 17, "model_kwargs": SWIN_ARCHITECTURE},
        {},
        f"model.image_size: must be a multiple of the patch size 2 of {SWIN_NAME}, got 17",
    ),
    "no whole windows": (
        {"backbone": SWIN_NAME, "image_size": 24, "model_kwargs": SWIN_ARCHITECTURE},
        {},
        f"model.image_size: 24 gives a grid of 12 x 12 in layers.0.blocks.0 of {SWIN_NAME}, which its windows of 5 x 5 "
        "do not divide; choose another size, or window_size in model.model_kwargs",
    ),
    "no whole windows behind a merge": (
        {"backbone": SWIN_NAME, "image_size": 24, "model_kwargs": SWIN_ARCHITECTURE},
        {},
        f"model.image_size: 24 gives a grid of 6 x 6 in layers.1.blocks.0 of {SWIN_NAME}, which its windows of 4 x 4 "
        "do not divide; choose another size, or window_size in model.model_kwargs",
    ),
    "classes and their number": (
        {"pretrained": True, "class_indices": [1, 2, 3]},
        {},
        f"model.num_classes: must be the number of model.class_indices, 3, got {CLASSES}; remove one of them",
    ),
    "classes of a random head": (
        {"class_indices": [1, 2, 3, 4]},
        {},
        "model.class_indices: must not be set if model.pretrained is false, whose head knows no classes; set "
        "model.num_classes=4 instead",
    ),
    "a class twice": (
        {"pretrained": True, "num_classes": None, "class_indices": [1, 2, 1]},
        {},
        "model.class_indices: must not repeat a class, got 1 twice",
    ),
    "a checkpoint and random weights": (
        {"checkpoint_path": "w.pth"},
        {},
        "model.checkpoint_path: must not be set if model.pretrained is false; remove one of them",
    ),
    "a key without a file": (
        {"pretrained": True, "checkpoint_key": "state_dict_ema"},
        {},
        "model.checkpoint_key: state_dict_ema needs model.checkpoint_path, the file to take it from",
    ),
    **{
        f"{name} {rate}": (
            {"model_kwargs": ARCHITECTURE | {name: rate}},
            {},
            f"model.model_kwargs: {name} must be a number in [0, 1), got {rate!r}",
        )
        for name, rate in (
            ("drop_rate", 1.5), ("attn_drop_rate", -0.1), ("drop_path_rate", 1), ("proj_drop_rate", "half"),
            ("pos_drop_rate", True),
        )
    },
    **{
        f"{name} in model_kwargs": (
            {"model_kwargs": ARCHITECTURE | {name: value}},
            {},
            f"model.model_kwargs: {name} is the setting {setting}; set that instead",
        )
        for name, value, setting in (
            ("img_size", 32, "model.image_size"),
            ("num_classes", 7, "model.num_classes"),
            ("checkpoint_path", "w.pth", "model.checkpoint_path"),
            ("pretrained", True, "model.pretrained"),
            ("pretrained_cfg_overlay", {"mean": [0, 0, 0]}, "model.checkpoint_path, model.mean and model.std"),
        )
    },
    "an unknown argument": (
        {"model_kwargs": {"patch_size": 4, "depht": 2}},
        {},
        f"model: timm cannot build {NAME} with {{'patch_size': 4, 'depht': 2, 'img_size': 16, 'num_classes': 4}}: "
        "VisionTransformer.__init__() got an unexpected keyword argument 'depht'",
    ),
}  # fmt: skip
SETTINGS["no whole windows"][0]["model_kwargs"] = SWIN_ARCHITECTURE | {"window_size": 5}
ON_THE_COMMAND_LINE = [
    "mean in 0..255", "std 0", "two means", "a fraction over 1", "an image of no whole patches", "no whole windows",
    "classes of a random head", "a class twice", "a key without a file", "drop_rate 1.5",
    "checkpoint_path in model_kwargs", "an unknown argument",
]  # fmt: skip
BY_THE_MODEL = {"an image of no whole patches", "no whole windows", "an unknown argument"}
"""What only the model itself tells: with `--dry-run` it is built on the meta device."""
COMMANDS = [("--dry-run", kind) for kind in ON_THE_COMMAND_LINE]
COMMANDS += [("", kind) for kind in ON_THE_COMMAND_LINE if kind not in BY_THE_MODEL]


@pytest.mark.parametrize("kind", SETTINGS)
def test_refused_from_python(kind: str, tmp_path: Path, unchanged: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    model, adapter, line = SETTINGS[kind]
    monkeypatch.chdir(tmp_path)
    with unchanged(tmp_path), pytest.raises(UserError) as caught:
        fd.create_model(**{**MODEL, **model, **adapter})
    assert str(caught.value) == line


@pytest.mark.parametrize(("option", "kind"), COMMANDS)
def test_refused_on_the_command_line(option: str, kind: str, tmp_path: Path, refused: Callable[..., str]) -> None:
    model, adapter, line = SETTINGS[kind]
    config = CONFIG | {"model": {**MODEL, **model}, "adapter": adapter}
    (tmp_path / "run.yaml").write_text(json.dumps(config))  # which is YAML too
    arguments = ["--config", "run.yaml", *option.split()]
    told = refused("fulllora_dist/train.py", *arguments, keep=(tmp_path,), cwd=tmp_path)
    assert told == f"error: {'' if kind in BY_THE_MODEL else 'run.yaml: '}{line}"


@pytest.mark.parametrize(
    ("mean", "std"),
    [([0, 0, 0], [1, 1, 1]), ([0.485, 0.456, 0.406], (0.229, 0.224, 0.225)), ([1, 1, 1], torch.tensor([1 / 255] * 3))],
)
def test_the_normaliser_is_timm_s_with_these_numbers(mean: Any, std: Any) -> None:
    model = fd.create_model(**MODEL, mean=mean, std=std, rank=1)
    x = images()
    expected = (x - torch.tensor(mean).view(1, 3, 1, 1)) / torch.as_tensor(std).view(1, 3, 1, 1)
    plain = timm.create_model(NAME, **ARCHITECTURE, img_size=SIDE, num_classes=CLASSES).eval()
    plain.load_state_dict({n: t for n, t in model.backbone.state_dict().items() if "lnlora" not in n})
    assert torch.equal(model(x), plain(expected))


def test_a_pretrained_size_that_its_patches_do_not_divide_is_kept() -> None:
    """SigLIP so400m at 384 pixels has patches of 14, and 27 x 27 of them: so it was trained."""
    name, small = "vit_so400m_patch14_siglip_384", {"depth": 1, "embed_dim": 16, "num_heads": 2, "mlp_ratio": 1}
    model = fd.create_model(name, pretrained=False, num_classes=CLASSES, rank=1, model_kwargs=small)
    assert model(images(1, side=384)).shape == (1, CLASSES)
    with pytest.raises(
        UserError, match=f"^model.image_size: must be a multiple of the patch size 14 of {name}, got 225"
    ):
        fd.create_model(name, pretrained=False, num_classes=CLASSES, rank=1, model_kwargs=small, image_size=225)


@pytest.mark.parametrize("values", [[float("nan")], [float("inf"), 1.0], [-float("inf")]])
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_weights_that_are_not_finite(values: list[float], ending: str, tmp_path: Path) -> None:
    state = timm.create_model(NAME, **ARCHITECTURE, img_size=SIDE, num_classes=CLASSES).state_dict()
    state["blocks.1.norm2.bias"][: len(values)] = torch.tensor(values)
    count = sum(value in (float("inf"), -float("inf")) or value != value for value in values)
    path = tmp_path / f"w.{ending}"
    save_file(state, path) if ending == "safetensors" else torch.save(state, path)
    with pytest.raises(UserError) as caught:
        fd.create_model(
            **MODEL | {"pretrained": True, "backbone": f"{NAME}.augreg_in21k", "checkpoint_path": str(path)}
        )
    assert str(caught.value) == (
        f"model.checkpoint_path: {path} has values that are not finite in 1 of {len(state)} tensors, e.g. {count} in "
        "blocks.1.norm2.bias; give weights from before the training diverged"
    )


@pytest.mark.parametrize("head", ["frozen", "trained", "adapted"])
def test_the_fraction_that_is_asked_for_is_enough(head: str) -> None:
    with pytest.raises(UserError, match="trainable_fraction") as error:
        tiny(rank=None, head=head, trainable_fraction=1e-6)
    least = float(re.search("at least (.*) for rank 1", str(error.value))[1])
    assert tiny(rank=None, head=head, trainable_fraction=least).spec.rank == 1
