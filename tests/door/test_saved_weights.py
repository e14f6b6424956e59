"""An adapter that is saved and loaded gives the same logits, whatever was done to the model; or it is not saved."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn

import fulllora_dist as fd
from fulllora_dist.core.errors import UserError
from fulllora_dist.models.adapted_model import AdaptedModel
from fulllora_dist.models.adapter_file import read_adapter
from fulllora_dist.models.branches import branches_of, disable_branches
from fulllora_dist.training.initial import state_of_adapter
from tests.tiny import ARCHITECTURE, CLASSES, SIDE, architecture, images, roughen, stir, tiny

TAG = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
FINETUNES = ("fulllora", "lora", "full", "head", "layernorm")


def timm_weights(seed: int = 0, **changes: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    model = timm.create_model(TAG, **(ARCHITECTURE | {"img_size": SIDE, "num_classes": CLASSES} | changes))
    return {name: torch.randn(t.shape, generator=generator) * 0.3 for name, t in model.state_dict().items()}


def set_blocks(model: AdaptedModel) -> None:
    model.backbone.blocks = model.backbone.blocks[:1]  # type: ignore[index]


def train_step(model: AdaptedModel) -> None:
    """One step of SGD on whatever requires a gradient."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(images()).square().mean().backward()
    optimizer.step()


def unfreeze(model: AdaptedModel, name: str, train: bool = True) -> None:
    model.backbone.get_parameter(name).requires_grad_(True)
    if train:
        train_step(model)


def in_place(tensor: Tensor) -> None:
    with torch.no_grad():
        tensor.mul_(1.5).add_(0.25)


def replace(model: AdaptedModel, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.backbone.get_submodule(parent), name, module)


MANIPULATIONS: dict[str, Callable[[AdaptedModel], object]] = {
    "nothing": lambda m: None,
    "one step of training": train_step,
    "weights by hand": lambda m: m.load_state_dict(timm_weights()),
    "weights by hand, assigned": lambda m: m.load_state_dict(timm_weights(), assign=True),
    "weights by hand, below the model": lambda m: m.backbone.load_state_dict(timm_weights(), strict=False),
    "another head by hand": lambda m: m.backbone.head.load_state_dict(
        {"weight": torch.ones(4, 32), "bias": torch.ones(4)}
    ),  # type: ignore[union-attr]
    "a frozen weight in place": lambda m: in_place(m.backbone.blocks[1].mlp.fc2.weight),  # type: ignore[index,union-attr]
    "a frozen weight by .data": lambda m: m.backbone.pos_embed.data.add_(1),  # type: ignore[union-attr,operator]
    "everything in place": roughen,
    "another parameter": lambda m: setattr(m.backbone.norm, "weight", nn.Parameter(torch.full((32,), 2.0))),
    "a norm that trains": lambda m: unfreeze(m, "norm.weight"),
    "the head that trains": lambda m: unfreeze(m, "head.bias"),
    "a norm unfrozen, not trained": lambda m: unfreeze(m, "norm.weight", train=False),
    "everything frozen": lambda m: m.requires_grad_(False),
    "another head": lambda m: replace(m, "head", nn.Linear(32, CLASSES)),
    "a head of two layers": lambda m: replace(m, "head", nn.Sequential(nn.Linear(32, 8), nn.Linear(8, CLASSES))),
    "reset_classifier": lambda m: m.backbone.reset_classifier(CLASSES),  # type: ignore[operator]
    "other classes": lambda m: m.backbone.reset_classifier(7),  # type: ignore[operator]
    "one block less": set_blocks,
    "another activation": lambda m: replace(m, "blocks.0.mlp.act", nn.ReLU()),
    "another eps": lambda m: setattr(m.backbone.norm, "eps", 0.5),
    "another scale of attention": lambda m: setattr(m.backbone.blocks[0].attn, "scale", 1.0),  # type: ignore[index,union-attr]
    "another scale of a branch": lambda m: [setattr(b, "scale", 9.0) for b in m.modules() if hasattr(b, "A")],
    "another pooling": lambda m: setattr(m.backbone, "global_pool", "avg"),
    "another forward": lambda m: setattr(m.backbone, "forward", lambda x: m.backbone.forward_features(x)[:, 0, :4]),  # type: ignore[operator]
    "another mean": lambda m: m.mean.fill_(0.1),
    "another std": lambda m: setattr(m, "std", m.std * 2),
    "another description": lambda m: setattr(m, "info", dataclasses.replace(m.info, std=(1.0, 1.0, 1.0))),
    "half": lambda m: m.half(),
    "half and back": lambda m: m.half().float(),
    "bfloat16": lambda m: m.bfloat16(),
    "double": lambda m: m.double(),
    "double and back": lambda m: m.double().float(),
    "not finite": lambda m: next(iter(m.trainable().values())).data.fill_(math.nan),
    "training mode": lambda m: m.train(),
    "checkpointing": lambda m: m.set_activation_checkpointing(True),
    "pruned": lambda m: nn.utils.parametrizations.weight_norm(m.backbone.blocks[0].mlp.fc1),  # type: ignore[index,union-attr]
}
KEPT = {"nothing", "one step of training", "a norm unfrozen, not trained", "everything frozen"}
KEPT |= {"double and back", "training mode", "checkpointing"}
"""What every kind of finetuning saves."""


@pytest.mark.parametrize("finetune", FINETUNES)
@pytest.mark.parametrize("manipulation", MANIPULATIONS)
def test_equal_logits_or_a_refusal(manipulation: str, finetune: str, tmp_path: Path) -> None:
    model = stir(tiny(finetune=finetune))
    MANIPULATIONS[manipulation](model)
    folder = tmp_path / "adapter"
    refusal = None
    try:
        fd.save_adapter(model, str(folder))
    except UserError as error:
        refusal = str(error)
    if refusal is not None:
        assert manipulation not in KEPT
        assert "\n" not in refusal
        assert refusal.startswith(("save_adapter: ", "adapter: "))
        assert not folder.exists()
        return
    for parameter in model.trainable().values():  # torch's choice of kernels depends on it
        parameter.requires_grad_(True)
    assert torch.equal(fd.load(str(folder))(images()), model.eval()(images()))


BY_HAND = (
    ", which an adapter does not hold; give weights by checkpoint_path instead of load_state_dict, and train what "
    "finetune trains; finetune='full' saves all tensors"
)
BUILT_SO = ", which an adapter does not hold; load builds it as create_model did; change it by model_kwargs there"
REFUSED = {
    "weights by hand": "the values of cls_token, which is frozen, changed after the model was created (and 31 more "
    f"such changes){BY_HAND}",
    "a frozen weight by .data": "the values of pos_embed, which is frozen, changed after the model was created"
    + BY_HAND,
    "half": "cls_token was float32 [1, 1, 32] and is float16 [1, 1, 32] (and 47 more such changes), which an adapter "
    "does not hold; create the model in the right shape, and keep it in the dtype that create_model gave it",
    "one block less": "the module blocks.1 was removed after the model was created (and 26 more such changes)"
    + BUILT_SO,
    "another eps": "norm.eps was 1e-06 and is 0.5" + BUILT_SO,
    "another std": "the model's std is [1.0, 1.0, 1.0], and was [0.5, 0.5, 0.5] when it was created; give std to "
    "create_model",
}


@pytest.mark.parametrize("manipulation", REFUSED)
def test_the_refusal_says_what_changed_and_what_to_do(manipulation: str, tmp_path: Path) -> None:
    model = tiny(head="frozen", components=("q", "fc1"))
    MANIPULATIONS[manipulation](model)
    with pytest.raises(UserError) as caught:
        fd.save_adapter(model, str(tmp_path / "a"))
    assert str(caught.value) == f"save_adapter: {REFUSED[manipulation]}"


def test_a_whole_model_keeps_weights_loaded_by_hand(tmp_path: Path) -> None:
    """Against plain timm with the same weights."""
    model = tiny(finetune="full", mean=(0, 0, 0), std=(1, 1, 1))
    model.load_state_dict(timm_weights())
    fd.save_adapter(model, str(tmp_path))
    plain = timm.create_model(TAG, **ARCHITECTURE, img_size=SIDE, num_classes=CLASSES).eval()
    plain.load_state_dict(timm_weights())
    assert torch.equal(fd.load(str(tmp_path))(images()), plain(images()))


@pytest.mark.parametrize("family", ["swin", "xcit", "beit", "eva_rope"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_buffers_count_too(family: str, precision: Any, tmp_path: Path) -> None:
    model = stir(tiny(family, precision=precision))
    model(images())
    fd.save_adapter(model, str(tmp_path / "a"))
    assert torch.equal(fd.load(str(tmp_path / "a"), precision=precision)(images()), model(images()))
    name, buffer = next((n, b) for n, b in model.backbone.named_buffers() if b.numel() > 1)
    buffer.copy_(buffer.flip(0))
    if not torch.equal(buffer, buffer.flip(0)):
        with pytest.raises(UserError, match=f"^save_adapter: the values of {name}, which is frozen, changed"):
            fd.save_adapter(model, str(tmp_path / "b"))


def test_a_disabled_adapter_is_not_saved(tmp_path: Path) -> None:
    model = stir(tiny())
    with disable_branches(branches_of(model)), pytest.raises(UserError, match=r"lnlora.on was True and is False"):
        fd.save_adapter(model, str(tmp_path / "a"))
    assert not (tmp_path / "a").exists()
    fd.save_adapter(model, str(tmp_path / "a"))
    assert torch.equal(fd.load(str(tmp_path / "a"))(images()), model(images()))


def test_what_only_holds_a_model_is_not_saved(tmp_path: Path) -> None:
    model = stir(tiny(head="trained"))
    fd.save_adapter(model, str(tmp_path / "a"))
    several = fd.MultiAdapter({"a": str(tmp_path / "a")})
    others = [several, several.select("a"), nn.DataParallel(model), model.backbone, None]
    for other in others:
        with pytest.raises(UserError) as caught:
            fd.save_adapter(other, str(tmp_path / "b"))  # type: ignore[arg-type]
        assert str(caught.value) == (
            f"save_adapter: must be a model of create_model, adapt or load, got {type(other).__name__}; give the one "
            "that it wraps"
        )
    assert not (tmp_path / "b").exists()
    fd.save_adapter(model, str(tmp_path / "c"))  # several adapters leave the first one's model alone
    assert torch.equal(several(images(), "a"), fd.load(str(tmp_path / "c"))(images()))


BRANCH = "blocks.0.mlp.fc1.lnlora.B"
STATES: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "missing": (lambda s: s.pop(BRANCH), f"adapter: {BRANCH} is missing"),
    "extra": (lambda s: s.update(extra=s[BRANCH].clone()), "adapter: extra is not in this model"),
    "reshaped": (
        lambda s: s.update({BRANCH: s[BRANCH].T}),
        f"adapter: {BRANCH} must have shape (128, 3), got (3, 128)",
    ),
    "in bf16": (
        lambda s: s.update({BRANCH: s[BRANCH].bfloat16()}),
        f"adapter: {BRANCH} must be torch.float32, got torch.bfloat16",
    ),
    "not finite": (
        lambda s: s.update({BRANCH: s[BRANCH].index_fill(0, torch.tensor([5]), math.inf)}),
        f"adapter: 3 of 384 values of {BRANCH} are not finite; take an adapter from before the training diverged",
    ),
}


def reseal(folder: Path, tensors: Callable[[dict], object] = id, description: Callable[[dict], object] = id) -> None:
    """Change an adapter's files, with checksums that fit."""
    state, content = load_file(folder / "adapter.safetensors"), json.loads((folder / "adapter.json").read_text())
    tensors(state)
    description(content)
    (folder / "adapter.safetensors").write_bytes(data := save({n: t.contiguous() for n, t in state.items()}))
    content["sha256"] = hashlib.sha256(data).hexdigest()
    del content["checksum"]
    content["checksum"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (folder / "adapter.json").write_text(json.dumps(content))


@pytest.mark.parametrize("change", STATES)
def test_tensors_that_are_not_the_adapter_s(change: str, tmp_path: Path) -> None:
    """Given to save_adapter, and read from a file."""
    model = stir(tiny())
    state = {name: p.detach().clone() for name, p in model.trainable().items()}
    alter, line = STATES[change]
    fd.save_adapter(model, str(tmp_path / "a"), state=state)
    reseal(tmp_path / "a", tensors=alter)
    with pytest.raises(UserError) as caught:
        fd.load(str(tmp_path / "a"))
    assert str(caught.value) == line
    with pytest.raises(UserError):
        fd.MultiAdapter({"a": str(tmp_path / "a")})
    with pytest.raises(UserError) as caught:
        state_of_adapter(model, str(tmp_path / "a"))
    assert str(caught.value) == f"adapter.init_from: {tmp_path}/a: {line.removeprefix('adapter: ')}"
    alter(state)
    with pytest.raises(UserError) as caught:
        fd.save_adapter(model, str(tmp_path / "b"), state=state)
    assert str(caught.value) == line
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("kept", [0, 7, 200, -1])
def test_a_truncated_file_is_refused(kept: int, tmp_path: Path) -> None:
    fd.save_adapter(stir(tiny()), str(tmp_path))
    file = tmp_path / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(UserError) as caught:
        fd.load(str(tmp_path))
    assert str(caught.value) == f"adapter: {file} is damaged: its sha256 does not match adapter.json"
    reseal_description(tmp_path)
    with pytest.raises(UserError, match=f"^adapter: {file} is damaged \\("):
        fd.load(str(tmp_path))


def reseal_description(folder: Path) -> None:
    content = json.loads((folder / "adapter.json").read_text())
    content["sha256"] = hashlib.sha256((folder / "adapter.safetensors").read_bytes()).hexdigest()
    del content["checksum"]
    content["checksum"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (folder / "adapter.json").write_text(json.dumps(content))


def from_file(path: Path, **settings: Any) -> AdaptedModel:
    return fd.create_model(
        TAG, **{"checkpoint_path": str(path), "image_size": SIDE, "model_kwargs": ARCHITECTURE, "rank": 2} | settings
    )


def test_other_weights_under_the_old_path_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file(timm_weights(1), path)
    model = stir(from_file(path))
    fd.save_adapter(model, str(tmp_path / "a"))
    assert torch.equal(fd.load(str(tmp_path / "a"))(images()), model(images()))
    save_file(timm_weights(2), path)
    with pytest.raises(UserError) as caught:
        fd.load(str(tmp_path / "a"))
    assert (
        str(caught.value)
        == (
            f"adapter: {tmp_path}/a belongs to {TAG} with fingerprint {model.info.sha256[:12]}, but these weights have "  # type: ignore[index]
            f"{from_file(path).info.sha256[:12]}; give the backbone it was trained on"  # type: ignore[index]
        )
    )


def test_another_timm_is_told_where_random_weights_differ(tmp_path: Path) -> None:
    """The version alone is no reason to refuse: the weights are."""
    model = stir(tiny())
    fd.save_adapter(model, str(tmp_path))
    reseal(tmp_path, description=lambda d: d.update(timm="0.9.16"))
    assert torch.equal(fd.load(str(tmp_path))(images()), model(images()))
    reseal(tmp_path, description=lambda d: d["backbone"].update(sha256="0" * 64))
    with pytest.raises(UserError) as caught:
        fd.load(str(tmp_path))
    assert str(caught.value) == (
        f"adapter: {tmp_path} belongs to random weights with fingerprint 000000000000, but seed 0 gives "
        f"{model.info.sha256[:12]} with timm {timm.__version__} and torch {torch.__version__}; use the versions it was "  # type: ignore[index]
        "saved with (timm 0.9.16), or start from weights in a file"
    )


def test_a_new_head_that_does_not_train_must_come_back_too(tmp_path: Path) -> None:
    """It is drawn from the seed, and in no file: the fingerprint of the backbone's weights does not cover it."""
    save_file(timm_weights(), tmp_path / "w.safetensors")
    for head in ("trained", "frozen", "adapted"):
        folder = tmp_path / head
        model = stir(from_file(tmp_path / "w.safetensors", num_classes=6, head=head))
        fd.save_adapter(model, str(folder))
        assert torch.equal(fd.load(str(folder))(images()), model(images()))
        reseal(folder, description=lambda d: d["backbone"].update(head_sha256="0" * 64))
        if head == "trained":
            assert torch.equal(fd.load(str(folder))(images()), model(images()))
            continue
        with pytest.raises(UserError, match="belongs to an untrained head that seed 0 does not give with timm"):
            fd.load(str(folder))
        with pytest.raises(UserError, match="untrained head"):
            fd.MultiAdapter({"a": str(tmp_path / "trained"), "b": str(folder)})


@pytest.mark.parametrize("strict", [True, False])
def test_load_state_dict_that_loads_nothing(strict: bool) -> None:
    model = tiny()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    wrapped = {f"visual.{name}": t for name, t in timm_weights().items()}
    with pytest.raises(RuntimeError if strict else UserError) as caught:
        model.load_state_dict(wrapped, strict=strict)
    if not strict:
        assert str(caught.value) == (
            "load_state_dict: none of its 32 tensors is one of the model's, e.g. visual.cls_token; the model has names "
            "such as backbone.cls_token"
        )
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    result = model.load_state_dict({"norm.weight": torch.ones(32)} | wrapped, strict=False)
    assert len(result.unexpected_keys) == 32


def test_what_json_cannot_hold_is_not_saved(tmp_path: Path) -> None:
    made = fd.create_model(
        "vit_tiny_patch16_224", pretrained=False, num_classes=4, image_size=SIDE, rank=1,
        model_kwargs=ARCHITECTURE | {"act_layer": nn.ReLU},
    )  # fmt: skip
    for model, training in ((made, {}), (tiny(), {"method": object()})):
        with pytest.raises(
            UserError, match=r"^save_adapter: training, and model_kwargs .* must be values that JSON can"
        ):
            fd.save_adapter(model, str(tmp_path / "a"), training=training)
        assert not (tmp_path / "a").exists()
    named = tiny(model_kwargs=architecture("vit") | {"act_layer": "relu"})
    fd.save_adapter(named, str(tmp_path / "a"))
    assert torch.equal(fd.load(str(tmp_path / "a"))(images()), named(images()))
    assert read_adapter(str(tmp_path / "a"))[0].backbone.architecture["act_layer"] == "relu"
