"""Weights by tag or by file, their fingerprint, and what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
import timm
import torch
from safetensors.torch import save, save_file
from torch import Tensor

from fulllora_dist.core.errors import UserError
from fulllora_dist.models.adapt import create_model
from fulllora_dist.models.adapted_model import AdaptedModel
from fulllora_dist.models.weights import fingerprint
from tests.tiny import ARCHITECTURE, images

TAG = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
SIDE, CLASSES = 32, 7


def random_weights(seed: int = 1, **settings: object) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    model = timm.create_model(TAG, **(ARCHITECTURE | {"img_size": SIDE, "num_classes": CLASSES} | settings))
    return {name: torch.randn_like(value) * 0.3 for name, value in model.state_dict().items()}


def from_file(path: object, **settings: object) -> AdaptedModel:
    return create_model(
        TAG, **({"checkpoint_path": str(path), "image_size": SIDE, "model_kwargs": ARCHITECTURE, "rank": 1} | settings)
    )


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return random_weights()


@pytest.fixture(scope="module")
def checkpoint(weights: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    save_file(weights, path)
    return path


def test_every_kind_of_file_gives_the_same_weights_and_fingerprint(
    weights: dict[str, Tensor], checkpoint: Path, tmp_path: Path
) -> None:
    torch.save(weights, tmp_path / "plain.pth")
    torch.save({"model": weights, "epoch": 3}, tmp_path / "nested.pth")
    with fsspec.open("memory://vit.safetensors", "wb") as file:
        file.write(save(dict(reversed(weights.items()))))
    paths = [checkpoint, tmp_path / "plain.pth", tmp_path / "nested.pth", "memory://vit.safetensors"]
    models = [from_file(path) for path in paths]
    for model in models:
        assert model.info.sha256 == fingerprint(weights)
        assert model.info.own_classes
        assert model.info.num_classes == CLASSES
        state = model.backbone.state_dict()
        assert all(torch.equal(state[name], value) for name, value in weights.items())


def test_one_bit_or_one_name_makes_another_fingerprint(weights: dict[str, Tensor]) -> None:
    flipped = {name: value.clone() for name, value in weights.items()}
    flipped["norm.bias"].view(torch.int32)[0] ^= 1
    renamed = {name.replace("norm.bias", "norm.sib"): value for name, value in weights.items()}
    reshaped = weights | {"norm.bias": weights["norm.bias"].view(1, -1)}
    recast = weights | {"norm.bias": weights["norm.bias"].view(torch.int32)}
    prints = [fingerprint(state) for state in (weights, flipped, renamed, reshaped, recast)]
    assert len(set(prints)) == 5


class Trap:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return (open, (str(self.path), "w"))


def test_a_pickle_with_code_is_refused_and_not_run(weights: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(weights | {"trap": Trap(tmp_path / "ran")}, tmp_path / "trap.pth")
    with pytest.raises(UserError, match=r"trap.pth does not load with weights_only=True"):
        from_file(tmp_path / "trap.pth")
    assert not (tmp_path / "ran").exists()


def test_files_that_are_missing_damaged_or_of_another_model_are_refused(
    weights: dict[str, Tensor], checkpoint: Path, tmp_path: Path
) -> None:
    torch.save(weights, tmp_path / "good.pth")
    for name, good in (("cut.safetensors", checkpoint), ("cut.pth", tmp_path / "good.pth")):
        (tmp_path / name).write_bytes(good.read_bytes()[:-500])
    torch.save([weights], tmp_path / "list.pth")
    torch.save({"model": weights["norm.bias"]}, tmp_path / "tensor.pth")
    torch.save(weights | {"epoch": 3}, tmp_path / "more.pth")
    save_file(random_weights(embed_dim=48), tmp_path / "wide.safetensors")
    save_file(random_weights(depth=3), tmp_path / "deep.safetensors")
    save_file(random_weights(depth=1), tmp_path / "shallow.safetensors")
    save_file({"a": torch.zeros(3)}, tmp_path / "nonsense.safetensors")
    refusals = {
        "gone.pth": "does not exist",
        "cut.safetensors": "is not a complete safetensors file",
        "cut.pth": "is not a complete torch file; copy or download it again",
        "list.pth": "must contain only tensors",
        "tensor.pth": r"does not fit the backbone \(30 tensors missing, e.g. cls_token; 1 unexpected, e.g. model\)",
        "more.pth": "must contain only tensors",
        "wide.safetensors": r"does not fit the backbone \(.* of another shape, e.g. cls_token \[1, 1, 48\] for",
        "deep.safetensors": r"does not fit the backbone \(12 unexpected, e.g. blocks.2.attn.proj.bias\); give",
        "shallow.safetensors": r"does not fit the backbone \(12 tensors missing, e.g. blocks.1.norm1.weight\); give",
        "nonsense.safetensors": "does not fit the backbone",
    }
    for name, words in refusals.items():
        with pytest.raises(UserError, match=f"model.checkpoint_path: .*{name} {words}") as caught:
            from_file(tmp_path / name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("vit_tinny_patch16_224", {}, "timm has no 'vit_tinny_patch16_224'; nearest: vit_tiny_patch16_224"),
        ("vit_tiny_patch16_224.augreg", {}, "has no tag 'augreg'; it has: .*augreg_in21k_ft_in1k"),
        ("vit_tiny_patch16_224", {}, "several sets of weights; write vit_tiny_patch16_224.TAG"),
        (
            TAG,
            {"class_indices": [0, CLASSES]},
            f"model.class_indices: must be below .* the checkpoint's head, {CLASSES}, got {CLASSES}",
        ),
        (TAG, {"class_indices": [-1, 0]}, "model.class_indices"),
        (TAG, {"class_indices": []}, "model.class_indices: .*at least 2 items"),
        (
            TAG,
            {"class_indices": [1, 2], "num_classes": 3},
            "model.num_classes: must be the number of model.class_indices, 2, got 3",
        ),
        (TAG, {"num_classes": 0}, "model.num_classes: .*greater than or equal to 2"),
        (TAG, {"pretrained": False}, "model.checkpoint_path: .* model.pretrained is false"),
        (TAG, {"model_kwargs": ARCHITECTURE | {"img_size": 16}}, "img_size is the setting model.image_size"),
        (TAG, {"model_kwargs": {"rope_jitter_coords": 1.5}}, "model.model_kwargs: rope_jitter_coords draws"),
        (TAG, {"model_kwargs": ARCHITECTURE | {"depht": 16}}, "timm cannot build .*depht"),
        (TAG, {"model_kwargs": ARCHITECTURE | {"num_heads": 5}}, "timm cannot build .*divisible"),
    ],
)
def test_names_and_settings_are_refused(name: str, settings: dict, words: str, checkpoint: Path) -> None:
    with pytest.raises(UserError, match=words) as caught:
        create_model(
            name, **({"checkpoint_path": str(checkpoint), "image_size": SIDE, "model_kwargs": ARCHITECTURE} | settings)
        )
    assert "\n" not in str(caught.value)


def test_features_without_a_classifier_are_no_logits(tmp_path: Path) -> None:
    """DINOv2's tag has none: its model would give features of the width of its blocks."""
    name = "vit_small_patch14_dinov2.lvd142m"
    save_file(timm.create_model(name, **ARCHITECTURE, img_size=SIDE).state_dict(), tmp_path / "w.safetensors")
    settings = {"checkpoint_path": str(tmp_path / "w.safetensors"), "image_size": SIDE, "model_kwargs": ARCHITECTURE}
    with pytest.raises(UserError, match=f"model.num_classes: {name} has no classes of its own; set it"):
        create_model(name, rank=1, **settings)
    model = create_model(name, rank=1, num_classes=CLASSES, **settings)
    assert model(images(side=SIDE)).shape == (4, CLASSES)
    assert (model.info.own_classes, model.spec.head) == (False, "trained")


@pytest.mark.parametrize("name", [TAG, "deit_tiny_distilled_patch16_224.fb_in1k"])
def test_chosen_classes_are_rows_of_the_whole_head(name: str, tmp_path: Path) -> None:
    torch.manual_seed(2)
    whole = timm.create_model(name, **ARCHITECTURE, img_size=SIDE, num_classes=CLASSES)
    for parameter in whole.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    save_file(whole.state_dict(), tmp_path / "whole.safetensors")
    path = str(tmp_path / "whole.safetensors")
    settings = {"checkpoint_path": path, "image_size": SIDE, "model_kwargs": ARCHITECTURE}
    full, cut = (create_model(name, rank=1, class_indices=classes, **settings) for classes in (None, [5, 0, 2]))
    x = images(side=SIDE)
    torch.testing.assert_close(cut(x), full(x)[:, [5, 0, 2]], rtol=0, atol=1e-5)
    assert cut.info.sha256 == full.info.sha256
    assert cut.info.own_classes
    assert cut.spec.head == "frozen"


def test_another_number_of_classes_starts_a_new_head_that_trains(checkpoint: Path, weights: dict[str, Tensor]) -> None:
    model = from_file(checkpoint, num_classes=CLASSES + 1)
    assert model(images(side=SIDE)).shape == (4, CLASSES + 1)
    assert not model.info.own_classes
    assert model.spec.head == "trained"
    assert torch.equal(model.backbone.state_dict()["norm.bias"], weights["norm.bias"])


@pytest.mark.parametrize(("family", "prefix"), [(TAG, 1), ("deit_tiny_distilled_patch16_224.fb_in1k", 2)])
def test_another_image_size_resamples_the_position_embedding_as_timm_does(
    family: str, prefix: int, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    old = timm.create_model(family, **ARCHITECTURE, img_size=SIDE, num_classes=CLASSES).state_dict()
    old["pos_embed"] = torch.randn_like(old["pos_embed"])
    save_file(old, tmp_path / "old.safetensors")
    model = create_model(
        family, checkpoint_path=str(tmp_path / "old.safetensors"), image_size=48, model_kwargs=ARCHITECTURE, rank=1
    )
    grid = old["pos_embed"][:, prefix:].reshape(1, 8, 8, -1).permute(0, 3, 1, 2)
    wider = torch.nn.functional.interpolate(grid, size=(12, 12), mode="bicubic", antialias=True)
    expected = torch.cat([old["pos_embed"][:, :prefix], wider.flatten(2).transpose(1, 2)], dim=1)
    torch.testing.assert_close(model.backbone.pos_embed.detach(), expected)
    assert model.info.image_size == 48
    assert model.info.sha256 == fingerprint(old)
    assert model(images(side=48)).shape == (4, CLASSES)


FROM_HUB = f"""
import json
from fulllora_dist.core.errors import UserError
from fulllora_dist.models.adapt import create_model
settings = dict(model_kwargs={ARCHITECTURE!r}, image_size={SIDE}, rank=1)
sha256 = create_model({TAG!r}, **settings).info.sha256
try:
    create_model("vit_small_patch16_224.augreg_in1k", **settings)
except UserError as error:
    print(json.dumps([sha256, str(error)]))
"""


def test_a_tag_comes_from_the_hub(weights: dict[str, Tensor], tmp_path: Path) -> None:
    """Through huggingface_hub itself, offline, out of a cache that holds one of the two models."""
    repository = tmp_path / "hub" / f"models--timm--{TAG}"
    revision = "0123456789abcdef0123456789abcdef01234567"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    (repository / "snapshots" / revision).mkdir(parents=True)
    save_file(weights, repository / "snapshots" / revision / "model.safetensors")
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", FROM_HUB], env=environment, cwd=root, capture_output=True, text=True, check=True
    )
    sha256, message = json.loads(done.stdout.splitlines()[-1])
    assert sha256 == fingerprint(weights)
    assert "cannot download the weights of vit_small_patch16_224.augreg_in1k from the hub" in message
    reason, _, remedy = message.partition(" from the hub (")[2].partition("); ")
    assert remedy == "set checkpoint_path (model.checkpoint_path) to a local file"
    assert reason
    assert ". " not in reason  # its first sentence, whole
    assert "\n" not in message
