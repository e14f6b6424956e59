"""An adapter taken off a model: the module then is what it was, byte for byte, or has the branches in its weights."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fulllora_dist as fd
from tests.models.own_modules import HALF, TARGETS, hugging_face_vit
from tests.models.test_adapt_module import own, same, timm_model, trace
from tests.tiny import CLASSES, FAMILIES, images, roughen, stir, tiny

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {"rank": 2}) for family in ("vit", "deit_distilled", "swinv2", "beit", "eva02_fused", "xcit")},
    "shared, adapted head": ("vit", {"rank": 2, "qkv": "shared", "head": "adapted"}),
    "norms beside": ("swinv2", {"rank": 2, "train_norms": True, "blocks": [0, 2]}),
    "layernorm": ("vit", {"finetune": "layernorm"}),
    "head": ("swin", {"finetune": "head"}),
    **{name: (name, {"rank": 2, "head": "trained", **HALF}) for name in TARGETS},
}


def adapted(case: str) -> tuple[nn.Module, fd.AdaptedModel, tuple[dict[str, Any], ...]]:
    """A module with some flags of its own, the model that it became, and its trace before."""
    family, settings = CASES[case]
    module, targets = own(family) if family in TARGETS else (timm_model(family), None)
    module.eval()
    list(module.children())[-1].train()
    next(module.parameters()).requires_grad_(False)
    before = trace(module)
    return module, fd.adapt(module, target_modules=targets, **settings), before


@pytest.mark.parametrize("case", CASES)
def test_unloaded_the_module_is_what_it_was(case: str) -> None:
    """After training: tensors, classes, flags and attributes, and so its logits in float64."""
    module, model, before = adapted(case)
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    nn.functional.cross_entropy(model(images()), torch.arange(CLASSES)).backward()
    optimizer.step()
    assert any(not torch.equal(value, before[0].get(name, value)) for name, value in model.trainable().items()) or (
        fd.adapter_state_dict(model).keys() - before[0].keys()
    )
    assert fd.unload(model) is module
    assert same(trace(module), before)


@pytest.mark.parametrize("case", CASES)
def test_disabled_it_has_the_module_s_logits_and_then_its_own_again(case: str) -> None:
    _, model, _ = adapted(case)
    bare = copy.deepcopy(model)
    x, expected = images(), model(images())
    stir(model)
    before, state = model(x), copy.deepcopy(model.state_dict())
    with fd.disable_adapter(model):
        assert torch.equal(model(x), expected)
    with pytest.raises(KeyboardInterrupt), fd.disable_adapter(model):
        raise KeyboardInterrupt
    assert torch.equal(model(x), before)
    assert not torch.equal(before, expected)
    assert all(map(torch.equal, model.state_dict().values(), state.values()))
    before.square().sum().backward()  # the graph of a pass before
    assert torch.equal(bare(x), expected)


def plain(model: nn.Module, x: Tensor, normaliser: fd.AdaptedModel) -> Tensor:
    with torch.no_grad():
        output = model((x - normaliser.mean) / normaliser.std)
    return output if isinstance(output, Tensor) else output.logits


@pytest.mark.parametrize(("family", "settings"), [
    *((family, {}) for family in FAMILIES if not family.startswith("eva_") and "swiglu" not in family),
    ("vit", {"qkv": "shared", "head": "adapted"}), ("siglip_pool", {"head": "trained"}),
    ("vit", {"blocks": [1], "train_norms": True}),
])  # fmt: skip
def test_merged_lora_has_the_same_logits(family: str, settings: dict[str, Any]) -> None:
    model = roughen(stir(tiny(family, finetune="lora", alpha=2.0, **{"head": "frozen", **settings})))
    x, bare = images(), tiny(family, finetune="head").backbone
    with torch.no_grad():
        expected = model(x)
    with fd.disable_adapter(model), torch.no_grad():
        assert (model(x) - expected).abs().max() > 0.01
    merged = fd.merge(model)
    assert {path: type(part) for path, part in merged.named_modules()} == {
        path: type(part) for path, part in bare.named_modules()
    }
    assert merged.state_dict().keys() == bare.state_dict().keys()
    torch.testing.assert_close(plain(merged.eval(), x, model), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TARGETS)
def test_lora_of_any_module_merges(name: str) -> None:
    module, targets = own(name)
    model = stir(fd.adapt(module, target_modules=targets, finetune="lora", rank=2, head="trained", **HALF))
    expected = model(images()).detach()
    assert fd.merge(model) is module
    torch.testing.assert_close(plain(module.eval(), images(), model), expected, rtol=1e-4, atol=1e-4)
    assert all(parameter.requires_grad for parameter in module.parameters())


def shared_weight() -> fd.AdaptedModel:
    module = hugging_face_vit()
    one, other = (layer.mlp for layer in module.vit.layers)  # type: ignore[union-attr]
    one.fc1.weight = other.fc1.weight
    return fd.adapt(module, target_modules=["fc1"], finetune="lora", rank=2, **HALF)


def tied_weight() -> fd.AdaptedModel:
    """One of two layers with the same weight has a branch."""
    module = hugging_face_vit()
    one, other = (layer.mlp for layer in module.vit.layers)  # type: ignore[union-attr]
    one.fc1.weight = other.fc1.weight
    return fd.adapt(module, target_modules=["layers.1.mlp.fc1"], finetune="lora", rank=2, **HALF)


@pytest.mark.parametrize(("call", "make", "words"), [
    (fd.merge, tied_weight, r"merge: vit.layers.0.mlp.fc1 and vit.layers.1.mlp.fc1 share a weight, which cannot take"),
    (fd.merge, tiny, r"cannot be merged into W: .*not linear in x"),
    (fd.merge, lambda: tiny(finetune="head"), "finetune: head has no branches"),
    (fd.merge, lambda: tiny(finetune="lora", precision="bf16"), "merge: precision: bf16 has rounded the blocks"),
    (fd.merge, shared_weight, r"merge: vit.layers.0.mlp.fc1 and .* share a weight, which cannot"),
    (fd.unload, lambda: tiny(precision="bf16"), "unload: precision: bf16 has rounded the blocks"),
    (fd.unload, lambda: tiny(finetune="full"), "unload: finetune: full has trained the backbone itself"),
    (fd.unload, timm_model, "unload: must be a model of create_model, adapt or load, got VisionTransformer"),
    (lambda model: fd.disable_adapter(model).__enter__(), lambda: tiny(finetune="full"), "disable_adapter: finetune"),
])  # fmt: skip
def test_what_cannot_be_taken_off_is_refused(call: Any, make: Any, words: str) -> None:
    model = make()
    before = trace(model)
    with pytest.raises(fd.UserError, match=words):
        call(model)
    assert same(trace(model), before)


def test_the_names_and_the_count_of_what_trains(capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny()
    state = fd.adapter_state_dict(model)
    assert state.keys() == model.trainable().keys()
    other = tiny(seed=1)
    other.load_trainable(state)
    assert all(torch.equal(value, other.trainable()[name]) for name, value in state.items())
    model.print_trainable_parameters()
    trained = sum(value.numel() for value in state.values())
    total = sum(parameter.numel() for parameter in timm_model().parameters())
    share = 100 * trained / total
    printed = f"trainable params: {trained:,} || backbone params: {total:,} || trainable%: {share:.4f}\n"
    assert capsys.readouterr().out == printed


def test_features_are_timm_s() -> None:
    module = timm_model().eval()
    expected = module.forward_features(images() * 2 - 1)  # type: ignore[operator]
    torch.testing.assert_close(fd.adapt(module, rank=1).forward_features(images()), expected, rtol=0, atol=1e-5)
    with pytest.raises(
        fd.UserError, match=r"forward_features: transformers.* has none; it is a method of timm's models"
    ):
        fd.adapt(hugging_face_vit(), target_modules=["fc1"], **HALF).forward_features(images())


TAKING: dict[str, Any] = {
    "disable_adapter": lambda model: fd.disable_adapter(model).__enter__(),
    "unload": fd.unload,
    "merge": fd.merge,
    "save_adapter": lambda model: fd.save_adapter(model, "none"),
    "trainable": fd.adapter_state_dict,
}


@pytest.mark.parametrize("how", ["merge", "unload"])
def test_an_adapter_is_taken_off_once(how: str) -> None:
    """What needs it then says so; the model still evaluates, as what it has become."""
    settings: dict[str, Any] = {"finetune": "lora", "rank": 2, "head": "trained", **HALF}
    model = stir(fd.adapt(hugging_face_vit(), target_modules=["fc1", "fc2"], **settings))
    module = TAKING[how](model)
    before = trace(module)
    for what, call in TAKING.items():
        with pytest.raises(
            fd.UserError, match=f"^{what}: {how} has taken the adapter off this model; adapt or load it"
        ):
            call(model)
    assert same(trace(module), before)
    x, y = images(8), torch.arange(8) % CLASSES
    report = fd.evaluate(model, (x, y), attacks=["clean", "fgsm"], gradient_masking_samples=4)
    assert report["adapter_sha256"] is None
    correct = (plain(module.eval(), x, model).argmax(1) == y).int().tolist()
    assert report["attacks"]["clean"]["correct"] == correct
