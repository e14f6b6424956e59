"""Checkpoints as they come: each gives the logits of plain timm with the same weights, or is refused with a line."""

import argparse
import collections
import gzip
import io
import json
import os
import pickle
import subprocess
import sys
import types
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save, save_file
from torch import Tensor, nn

import fulllora_dist as fd
from fulllora_dist.core.errors import UserError
from fulllora_dist.models.adapted_model import AdaptedModel
from fulllora_dist.models.checkpoint_header import read_header
from fulllora_dist.models.weights import fingerprint
from tests.tiny import ARCHITECTURE, CLASSES, SIDE, architecture, images, stir, tiny

TAG = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
Weights = dict[str, Tensor]


def timm_model(**changes: Any) -> nn.Module:
    return timm.create_model(TAG, **(ARCHITECTURE | {"img_size": SIDE, "num_classes": CLASSES} | changes)).eval()


def random_weights(seed: int = 0, **changes: Any) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    state = timm_model(**changes).state_dict()
    return {name: torch.randn(t.shape, generator=generator) * 0.3 for name, t in state.items()}


RIGHT, OTHER = random_weights(0), random_weights(1)


def from_file(path: Path, **settings: Any) -> AdaptedModel:
    return fd.create_model(
        TAG, **{"checkpoint_path": str(path), "image_size": SIDE, "model_kwargs": ARCHITECTURE, "rank": 1} | settings
    )


def plain_logits(weights: Weights, mean: float = 0.5, std: float = 0.5) -> Tensor:
    """Of timm's model, with torch's own loader."""
    model = timm_model()
    model.load_state_dict(weights)
    with torch.no_grad():
        return model((images() - mean) / std)


def under(prefix: str, weights: Weights = RIGHT) -> Weights:
    return {prefix + name: tensor.clone() for name, tensor in weights.items()}


ARGS = argparse.Namespace(lr=0.1, output=Path("out"), betas=(0.9, 0.95), nested=types.SimpleNamespace(a=1))
RUN = {
    "epoch": 3,
    "arch": "vit_tiny_patch16_224",
    "optimizer": {
        "state": {0: {"step": torch.tensor(1.0), "exp_avg": RIGHT["pos_embed"]}},
        "param_groups": [{"lr": 1}],
    },
    "scaler": {"scale": 65536.0},
    "args": ARGS,
    "metric": np.float64(81.5),
    "best": np.int64(3),
    "version": 2,
}
BODY = {name: tensor for name, tensor in RIGHT.items() if not name.startswith("head.")}
HEAD = {name: tensor for name, tensor in RIGHT.items() if name.startswith("head.")}
PROJECTION = {"head.mlp.0.weight": torch.ones(5, 32), "head.last_layer.weight_v": torch.ones(9, 5)}
NORMALISER = {"mean": torch.full((1, 3, 1, 1), 0.5), "std": torch.full((1, 3, 1, 1), 0.5)}
LOADS: dict[str, tuple[Any, str | None]] = {
    **{
        f"under {prefix}": (under(prefix), None)
        for prefix in (
            "module.", "model.", "backbone.", "encoder.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.",
            "net.", "base_model.model.", "model.1.", "1.", "module.model.1.", "student.",
        )
    },
    "RobustBench": (under("model.") | {f"normalize.{k}": v for k, v in NORMALISER.items()}, None),
    "Sequential": (under("1.") | {f"0.{k}": v.flatten() for k, v in NORMALISER.items()}, None),
    "mu and sigma": (
        {"state_dict": under("module.model.") | {"module.mu": NORMALISER["mean"], "module.sigma": NORMALISER["std"]}},
        None,
    ),
    "a head beside the backbone": (under("backbone.", BODY) | HEAD, None),
    "the same under DDP": (under("module.backbone.", BODY) | under("module.", HEAD), None),
    "state_dict": (RUN | {"state_dict": RIGHT}, None),
    "model": (RUN | {"model": under("module.")}, None),
    "OrderedDict with metadata": ({"model": timm_model().state_dict() | RIGHT}, None),
    "parameters": ({"model": {n: nn.Parameter(t) for n, t in RIGHT.items()}}, None),
    "ema chosen": (RUN | {"state_dict": OTHER, "state_dict_ema": RIGHT}, "state_dict_ema"),
    "model_ema chosen": (RUN | {"model": OTHER, "model_ema": RIGHT}, "model_ema"),
    "model chosen": (RUN | {"model": RIGHT, "model_ema": OTHER}, "model"),
    "nested": (RUN | {"state": {"model": RIGHT, "ema": OTHER}}, "state.model"),
    "two models under one key": (
        {"state_dict": under("module.base_encoder.") | under("module.momentum_encoder.", OTHER)},
        "module.base_encoder",
    ),
    "two prefixes": (under("student.", OTHER) | under("teacher."), "teacher"),
    "a run's masters": (under("master/") | under("exp_avg/", OTHER) | under("exp_avg_sq/", OTHER), None),
    "a run's average": (under("master/", OTHER) | under("ema/") | under("exp_avg/", OTHER), "ema"),
    "a fully finetuned state": (under("backbone."), None),
}  # fmt: skip


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
@pytest.mark.parametrize("kind", LOADS)
def test_the_logits_are_those_of_timm(kind: str, ending: str, tmp_path: Path) -> None:
    """A safetensors file where it can hold the content; else torch.save's content under that ending."""
    content, key = LOADS[kind]
    path = tmp_path / f"weights.{ending}"
    if ending == "safetensors" and all(isinstance(value, Tensor) for value in content.values()):
        save_file({name: tensor.clone() for name, tensor in content.items()}, path)
    else:
        torch.save(content, path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = from_file(path, checkpoint_key=key)
    assert torch.equal(model(images()), plain_logits(RIGHT))
    assert model.info.sha256 == fingerprint(RIGHT)  # as from a plain file
    if ending == "safetensors":
        return
    fd.save_adapter(stir(model), str(tmp_path / "a"))
    assert torch.equal(fd.load(str(tmp_path / "a"))(images()), model(images()))
    save_file(RIGHT, tmp_path / "plain.safetensors")
    moved = fd.load(str(tmp_path / "a"), checkpoint_path=str(tmp_path / "plain.safetensors"))
    assert torch.equal(moved(images()), model(images()))


def test_dino_s_projection_head_is_not_used_and_named(tmp_path: Path) -> None:
    path = tmp_path / "dino.pth"
    student = under("module.backbone.", OTHER) | under("module.", PROJECTION)
    teacher = under("backbone.", BODY) | PROJECTION
    torch.save({"student": student, "teacher": teacher, "dino_loss": {"center": torch.ones(1, 9)}, "args": ARGS}, path)
    with pytest.warns(UserWarning, match="outside of backbone is not used, 2 tensors, e.g. head.last_layer.weight_v$"):
        model = from_file(path, checkpoint_key="teacher", num_classes=CLASSES, head="trained")
    with torch.no_grad():
        for name, tensor in HEAD.items():
            model.backbone.get_parameter(name).copy_(tensor)
    assert torch.equal(model(images()), plain_logits(RIGHT))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_other_precisions_are_those_of_timm(dtype: torch.dtype, ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"w.{ending}"
    rounded = {name: tensor.to(dtype) for name, tensor in RIGHT.items()}
    torch.save(rounded, path) if ending == "pth" else save_file(rounded, path)
    model = timm_model(checkpoint_path=str(path))  # timm's own loader
    assert torch.equal(from_file(path)(images()), model((images() - 0.5) / 0.5))


@pytest.mark.parametrize("family", ["vit", "deit_distilled", "swin", "swinv2", "beit"])
def test_another_resolution_is_resampled_as_timm_does(family: str, tmp_path: Path) -> None:
    name = {"vit": TAG, "deit_distilled": "deit_tiny_distilled_patch16_224.fb_in1k"}.get(family) or {
        "swin": "swin_tiny_patch4_window7_224.ms_in1k",
        "swinv2": "swinv2_tiny_window8_256.ms_in1k",
        "beit": "beit_base_patch16_224.in22k_ft_in22k_in1k",
    }[family]
    arguments = {**architecture(family), "num_classes": CLASSES}
    generator = torch.Generator().manual_seed(0)
    small = timm.create_model(name, **arguments, img_size=SIDE).state_dict()
    small = {
        n: torch.randn(t.shape, generator=generator) * 0.3 if t.is_floating_point() else t for n, t in small.items()
    }
    torch.save({"state_dict": under("module.", small), "args": ARGS}, tmp_path / "wrapped.pth")
    torch.save(small, tmp_path / "plain.pth")
    timm_s = timm.create_model(
        name,
        **arguments,
        img_size=32,
        pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "plain.pth"), "num_classes": CLASSES},
    ).eval()
    ours = fd.create_model(
        name, checkpoint_path=str(tmp_path / "wrapped.pth"), image_size=32, rank=1, model_kwargs=architecture(family)
    )
    x = images(side=32)
    with torch.no_grad():
        assert torch.equal(ours(x), timm_s((x - ours.mean) / ours.std))


SEVERAL: dict[str, tuple[Any, str | None, str]] = {
    "ema": (
        RUN | {"state_dict": RIGHT, "state_dict_ema": OTHER},
        None,
        "{} holds several sets of weights; choose one of: state_dict, state_dict_ema",
    ),
    "student and teacher": (
        {"student": under("module."), "teacher": OTHER},
        None,
        "{} holds several sets of weights; choose one of: student, teacher",
    ),
    "nested": (
        {"state": {"model": RIGHT, "ema": OTHER}, "args": ARGS},
        None,
        "{} holds several sets of weights; choose one of: state.model, state.ema",
    ),
    "two prefixes": (
        under("student.") | under("teacher.", OTHER),
        None,
        "{} holds several models; choose one of: student, teacher",
    ),
    "two prefixes under a key": (
        RUN | {"model": under("module.base_encoder.") | under("module.momentum_encoder."), "ema": OTHER},
        "model",
        "{} holds several models; choose one of: model.module.base_encoder, model.module.momentum_encoder",
    ),
    "master and ema": (
        under("master/") | under("ema/"),
        None,
        "{} holds several sets of weights; choose one of: master, ema",
    ),
    "mistyped": (
        RUN | {"state_dict": RIGHT, "state_dict_ema": OTHER},
        "state_dict_emma",
        "{} has no weights 'state_dict_emma'; it has: state_dict, state_dict_ema",
    ),
    "a key for plain weights": (
        RIGHT,
        "state_dict",
        "{} holds a single set of weights, and no 'state_dict' in it; remove it",
    ),
}


@pytest.mark.parametrize("kind", SEVERAL)
def test_which_of_several_is_asked_for(kind: str, tmp_path: Path) -> None:
    content, key, line = SEVERAL[kind]
    torch.save(content, tmp_path / "run.pth")
    with pytest.raises(UserError) as caught:
        from_file(tmp_path / "run.pth", checkpoint_key=key)
    assert str(caught.value) == f"model.checkpoint_key: {line.format(tmp_path / 'run.pth')}"


def test_a_key_needs_a_file() -> None:
    with pytest.raises(UserError) as caught:
        fd.create_model(TAG, checkpoint_key="model", rank=1)
    assert str(caught.value) == "model.checkpoint_key: model needs model.checkpoint_path, the file to take it from"


class Trap:
    """A pickle that would run a program."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return (os.mkdir, (str(self.path),))


def saved(content: object, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def archive(**members: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as opened:
        for name, content in members.items():
            opened.writestr(name.replace("_", "."), content)
    return file.getvalue()


def arrays() -> bytes:
    file = io.BytesIO()
    np.savez(file, **{"embedding/kernel": np.zeros(3)})
    return file.getvalue()


def script() -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), file)
    return file.getvalue()


UNLOADABLE = "does not load with weights_only=True"
TRUSTED = "save the weights alone where that is trusted: torch.save(model.state_dict(), FILE)"
NOT_WEIGHTS: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "is empty; copy or download it again"),
    "a web page": (
        lambda: b"\n<!DOCTYPE html><html><head><title>404</title>",
        "is a web page, not weights; download the file itself, not the page about it",
    ),
    "a store's error": (
        lambda: b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>",
        "is a web page, not weights; download the file itself, not the page about it",
    ),
    "git-lfs": (
        lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 343\n",
        "is a pointer of git-lfs, not the weights; run git lfs pull",
    ),
    "JSON": (
        lambda: b'{"weight_map": {"cls_token": "model-00001-of-00002.safetensors"}}',
        "is JSON, perhaps the list of a checkpoint's parts; give a file with all weights",
    ),
    "gzip": (lambda: gzip.compress(b"x" * 99), "is compressed with gzip; unpack it first"),
    "text": (lambda: b"accuracy 81.5", "is no weights file; give a .safetensors file, or one that torch.save wrote"),
    "an array": (
        lambda: b"\x93NUMPY\x01\x00" + bytes(99),
        "is a NumPy array; give a .safetensors file, or one that torch.save wrote",
    ),
    "arrays": (
        arrays,
        "is a NumPy archive (weights of JAX); save timm.create_model(NAME, checkpoint_path=FILE).state_dict()",
    ),
    "a zip": (lambda: archive(model_pth=b"x"), "is a zip archive; unpack it, and give the weights file in it"),
    "TorchScript": (script, "is a TorchScript program; save torch.jit.load(FILE).state_dict() with torch.save"),
    "half a torch file": (
        lambda: saved(RIGHT)[:-999],
        "is not a complete torch file; copy or download it again",
    ),
    "half a safetensors file": (
        lambda: save(RIGHT)[:-4],
        "is not a complete safetensors file (Error while deserializing: incomplete metadata, file not fully covered)",
    ),
    "a whole model": (
        lambda: saved(timm_model()),
        f"{UNLOADABLE}, as it holds timm.models.vision_transformer.VisionTransformer; {TRUSTED}",
    ),
    "a class": (
        lambda: saved({"state_dict": RIGHT, "kind": collections.defaultdict}),
        f"{UNLOADABLE}, as it holds collections.defaultdict; {TRUSTED}",
    ),
    "code": (
        lambda: pickle.dumps({"state_dict": Trap(Path("ran"))}, protocol=2),
        f"{UNLOADABLE} (Invalid magic number; corrupt file?); it must be a complete file that torch.save wrote",
    ),
    "a list": (
        lambda: saved([RIGHT]),
        "must contain only tensors, or a dictionary that holds them by their names; save the state dict alone",
    ),
    "tensors and numbers": (
        lambda: saved(RIGHT | {"epoch": 3}),
        "must contain only tensors, or a dictionary that holds them by their names (it has cls_token, pos_embed, "
        "patch_embed.proj.weight, patch_embed.proj.bias, blocks.0.norm1.weight); save the state dict alone",
    ),
    "an optimizer": (
        lambda: saved({key: RUN[key] for key in ("optimizer", "epoch")}),
        "must contain only tensors, or a dictionary that holds them by their names (it has optimizer, epoch); save the "
        "state dict alone",
    ),
}


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
@pytest.mark.parametrize("kind", NOT_WEIGHTS)
def test_what_is_no_weights_file_is_named(
    kind: str, ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unchanged: Callable
) -> None:
    content, line = NOT_WEIGHTS[kind]
    path = tmp_path / f"w.{ending}"
    path.write_bytes(content())
    monkeypatch.chdir(tmp_path)
    with unchanged(tmp_path), pytest.raises(UserError) as caught:
        from_file(path)
    if kind != "code":
        assert str(caught.value) == f"model.checkpoint_path: {path} {line}"
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)


CONFIG = {
    "model": {"backbone": TAG, "image_size": SIDE, "model_kwargs": ARCHITECTURE},
    "threat": {"eps": "4/255"},
    "method": {"name": "pgd", "steps": 1},
    "data": {"train": "shards"},
    "run": {"output_dir": "out"},
    "tracking": {"uri": "sqlite:///mlflow.db"},
}
TOLD_EARLY = [
    "empty", "a web page", "git-lfs", "JSON", "gzip", "arrays", "a zip", "TorchScript", "half a torch file",
    "half a safetensors file",
]  # fmt: skip


@pytest.mark.parametrize("kind", TOLD_EARLY)
def test_train_refuses_it_before_anything_is_written(kind: str, tmp_path: Path, refused: Callable[..., str]) -> None:
    content, line = NOT_WEIGHTS[kind]
    (tmp_path / "w.pth").write_bytes(content())
    (tmp_path / "run.yaml").write_text(json.dumps(CONFIG))  # which is YAML too
    told = refused(
        "fulllora_dist/train.py", "--config", "run.yaml", "model.checkpoint_path=w.pth", keep=(tmp_path,), cwd=tmp_path
    )
    if kind == "half a safetensors file":
        line = "is not a complete safetensors file; copy or download it again"
    assert told == f"error: model.checkpoint_path: w.pth {line}"


def test_code_inside_a_torch_file_is_not_run(tmp_path: Path, unchanged: Callable) -> None:
    for i, options in enumerate(({}, {"_use_new_zipfile_serialization": False}, {"pickle_protocol": 4})):
        path = tmp_path / f"{i}.pth"
        torch.save({"model": RIGHT, "args": Trap(tmp_path / "ran")}, path, **options)
        with unchanged(tmp_path), pytest.raises(UserError, match=r"weights_only=True[ ,]") as caught:
            from_file(path)
        assert "\n" not in str(caught.value)
        assert "\x1b" not in str(caught.value)


def test_a_folder_and_nothing(tmp_path: Path) -> None:
    for name in ("model.safetensors", "pytorch_model.bin", "config.json"):
        (tmp_path / name).touch()
    (tmp_path / "empty").mkdir()
    for path, line in (
        (tmp_path, "is a folder; give one of its files: model.safetensors, pytorch_model.bin"),
        (tmp_path / "empty", "is a folder; give a .safetensors or .pth file"),
        (tmp_path / "gone.pth", "does not exist; give a .safetensors or .pth file"),
    ):
        with pytest.raises(UserError) as caught:
            from_file(path)
        assert str(caught.value) == f"model.checkpoint_path: {path} {line}"


@pytest.mark.parametrize(
    "content",
    [save(RIGHT), saved(RIGHT), saved(RIGHT, _use_new_zipfile_serialization=False)],
    ids=["safetensors", "torch", "torch of old"],
)
@pytest.mark.parametrize("name", ["w.pth", "w.safetensors", "w.bin", "w.ckpt", "w"])
def test_the_ending_does_not_matter(content: bytes, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert torch.equal(from_file(tmp_path / name)(images()), plain_logits(RIGHT))


def quantized(weights: Weights) -> Weights:
    return {name: tensor.to(torch.int8) for name, tensor in weights.items()}


MISFITS: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "deeper": (
        lambda: under("module.", random_weights(depth=3)),
        {},
        "does not fit the backbone (12 unexpected, e.g. blocks.2.attn.proj.bias); give weights of the same model",
    ),
    "shallower": (
        lambda: {"state_dict": random_weights(depth=1)},
        {},
        "does not fit the backbone (12 tensors missing, e.g. blocks.1.norm1.weight); give weights of the same model",
    ),
    "wider": (
        lambda: random_weights(embed_dim=48),
        {},
        "does not fit the backbone (31 of another shape, e.g. cls_token [1, 1, 48] for [1, 1, 32]); give weights of "
        "the same model",
    ),
    "another patch": (
        lambda: random_weights(patch_size=2) | {"mask_token": torch.zeros(1)},
        {"model_kwargs": ARCHITECTURE | {"class_token": False, "global_pool": "avg"}},
        "does not fit the backbone (2 tensors missing, e.g. fc_norm.weight; 3 unexpected, e.g. cls_token; 2 of another "
        "shape, e.g. pos_embed [1, 65, 32] for [1, 16, 32]); give weights of the same model",
    ),
    "Swin": (
        lambda: tiny("swin", finetune="full").backbone.state_dict(),
        {},
        "does not fit the backbone (26 tensors missing, e.g. cls_token; 46 unexpected, e.g. head.fc.bias; 2 "
        "of another shape, e.g. patch_embed.proj.weight [16, 3, 4, 4] for [32, 3, 4, 4]); give weights of the same "
        "model",
    ),
    "int8": (
        lambda: quantized(RIGHT),
        {},
        "does not fit the backbone (32 not floating-point, e.g. cls_token is int8); give weights of the same model",
    ),
    "no head": (
        lambda: BODY,
        {},
        "has no head (head), and so no number of classes; set model.num_classes to start a new one",
    ),
    "not a number": (
        lambda: RIGHT | {"norm.bias": RIGHT["norm.bias"].index_fill(0, torch.tensor([3, 4]), float("nan"))},
        {},
        "has values that are not finite in 1 of 32 tensors, e.g. 2 in norm.bias; give weights from before the training "
        "diverged",
    ),
    "infinite, in bf16": (
        lambda: {name: (tensor * torch.inf).bfloat16() for name, tensor in RIGHT.items()},
        {},
        "has values that are not finite in 32 of 32 tensors, e.g. 32 in blocks.0.attn.proj.bias; give weights from "
        "before the training diverged",
    ),
    "an adapter's branches": (
        lambda: stir(tiny()).state_dict(),
        {},
        "holds the branches of an adapter (backbone.blocks.0.attn.proj.lnlora.A), which a backbone has none of; save "
        "it with save_adapter, and give that folder to load or adapter.init_from",
    ),
    "peft": (
        lambda: under("base_model.model.") | {"base_model.model.norm.lora_A.default.weight": torch.ones(1)},
        {},
        "holds an adapter of peft (base_model.model.norm.lora_A.default.weight); merge it first: "
        "torch.save(model.merge_and_unload().state_dict(), FILE)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", MISFITS)
def test_another_model_s_weights_are_counted_and_named(kind: str, tmp_path: Path) -> None:
    content, settings, line = MISFITS[kind]
    path = tmp_path / "w.pth"
    torch.save(content(), path)
    with pytest.raises(UserError) as caught:
        from_file(path, **settings)
    assert str(caught.value) == f"model.checkpoint_path: {path} {line}"


@pytest.mark.parametrize("prefix", ["1.", "model.1.", "module.model."])
def test_a_normaliser_of_other_values_is_refused(prefix: str, tmp_path: Path) -> None:
    """Until the settings say the same; the logits are then those of the whole wrapper."""
    path = tmp_path / "w.pth"
    around = prefix[: prefix.rstrip(".").rfind(".") + 1]
    values = {f"{around}0.mean": torch.full((3,), 0.25), f"{around}0.std": torch.full((1, 3, 1, 1), 0.125)}
    torch.save({"model": under(prefix) | values}, path)
    with pytest.raises(UserError) as caught:
        from_file(path)
    assert str(caught.value) == (
        f"model.mean: the normaliser in {path} has mean [0.25, 0.25, 0.25], the model has [0.5, 0.5, 0.5]; set "
        "model.mean=[0.25, 0.25, 0.25]"
    )
    with pytest.raises(UserError, match=r"^model.std: .* set model.std=\[0.125, 0.125, 0.125\]$"):
        from_file(path, mean=[0.25] * 3)
    model = from_file(path, mean=[0.25] * 3, std=[0.125] * 3)
    assert torch.equal(model(images()), plain_logits(RIGHT, 0.25, 0.125))


HEADER = """
import sys
from fulllora_dist.core.errors import UserError
from fulllora_dist.models.checkpoint_header import read_header
for path in sys.argv[1:]:
    try:
        header = read_header(path)
        print(header and (len(header), header["norm.bias"]))
    except UserError as error:
        print(error)
assert "torch" not in sys.modules
"""


def test_a_header_is_read_without_torch(tmp_path: Path) -> None:
    contents = {
        "good": save(RIGHT),
        "torch": saved(RIGHT),
        "cut": save(RIGHT)[:-4],
        "short": save(RIGHT)[:40],
        "list": b"\x02\0\0\0\0\0\0\0[]",
        "page": b"<html>",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    paths = [*contents, "gone"]
    done = subprocess.run(
        [sys.executable, "-c", HEADER, *paths],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=True,
    )
    incomplete = "is not a complete safetensors file; copy or download it again"
    assert done.stdout.splitlines() == [
        "(32, ('F32', (32,)))",
        "None",
        f"model.checkpoint_path: cut {incomplete}",
        f"model.checkpoint_path: short {incomplete}",
        "model.checkpoint_path: list is no weights file; give a .safetensors file, or one that torch.save wrote",
        "model.checkpoint_path: page is a web page, not weights; download the file itself, not the page about it",
        "model.checkpoint_path: gone does not exist; give a .safetensors or .pth file",
    ]
    assert read_header(str(tmp_path / "good")) == {n: ("F32", tuple(t.shape)) for n, t in RIGHT.items()}
