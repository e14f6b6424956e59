"""Pixels, patch embedding, head and masters in fp32; the blocks in bf16; the normaliser inside."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fulllora_dist.models.adapted_model import AdaptedModel
from fulllora_dist.models.flops import peak_flops
from fulllora_dist.models.precision import convolve_in_full_fp32, in_full_fp32
from tests.tiny import CLASSES, FAMILIES, images, stir, tiny

BF16, FP32 = torch.bfloat16, torch.float32
FROZEN_BLOCKS = ("fulllora", "lora", "head")


def seen_dtypes(model: AdaptedModel) -> dict[str, tuple[torch.dtype, torch.dtype]]:
    """{module: (dtype of its input, of its output)} of one forward pass."""
    seen: dict[str, tuple[torch.dtype, torch.dtype]] = {}
    for name, module in model.backbone.named_modules():
        if ".lnlora" not in name:
            module.register_forward_hook(
                lambda _, args, out, name=name: seen.__setitem__(name, (args[0].dtype, out.dtype))
            )
    assert model(images()).dtype == FP32
    return seen


@pytest.mark.parametrize("family", ["vit", "deit_distilled", "dinov2_swiglu"])
@pytest.mark.parametrize("finetune", ["fulllora", "lora", "head", "layernorm", "full"])
def test_where_bf16_begins_and_ends(finetune: str, family: str) -> None:
    model = stir(tiny(family, finetune=finetune, precision="bf16"))
    for name, parameter in model.backbone.named_parameters():
        frozen_block = name.startswith("blocks.") and ".lnlora." not in name and finetune in FROZEN_BLOCKS
        assert parameter.dtype == (BF16 if frozen_block else FP32), name
    seen = seen_dtypes(model)
    assert seen["patch_embed.proj"] == (FP32, FP32)
    widened = family == "dinov2_swiglu" and finetune not in FROZEN_BLOCKS  # by its layer scale in fp32
    assert seen["blocks.0"][1] == (FP32 if widened else BF16)
    assert seen["blocks.1"][1] == FP32
    for i in range(2):
        for layer, (_, after) in seen.items():
            if layer.startswith(f"blocks.{i}.") and isinstance(model.backbone.get_submodule(layer), nn.Linear):
                assert after == BF16, layer
    for layer in ("norm", "head"):
        assert seen[layer] == (FP32, FP32), layer
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(
    "settings", [*({"finetune": f} for f in ("fulllora", "layernorm", "full")), {"train_norms": True}], ids=str
)
def test_bf16_is_near_fp32_and_gradients_are_fp32(settings: dict) -> None:
    exact, rounded = (stir(tiny(**settings, precision=p)) for p in ("fp32", "bf16"))
    results = []
    for model in (exact, rounded):
        x = images(16).requires_grad_()
        logits = model(x)
        F.cross_entropy(logits, torch.arange(16) % CLASSES).backward()
        gradients = {name: p.grad for name, p in model.trainable().items()}
        assert x.grad is not None
        assert {g.dtype for g in (x.grad, *gradients.values())} == {FP32}
        results.append((logits.detach(), x.grad, gradients))
    (logits, grad, gradients), (logits_16, grad_16, gradients_16) = results
    assert 0 < (logits_16 - logits).norm() < 0.02 * logits.norm()
    assert F.cosine_similarity(grad_16.flatten(), grad.flatten(), dim=0) > 0.99
    together = [torch.cat([g.flatten() for g in one.values()]) for one in (gradients, gradients_16)]
    assert F.cosine_similarity(*together, dim=0) > 0.99


@pytest.mark.parametrize("finetune", ["fulllora", "full"])
def test_checkpointed_blocks_in_bf16_give_the_same_gradients(finetune: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = stir(tiny(finetune=finetune, precision="bf16"))
        model.backbone.set_grad_checkpointing(checkpointing)
        x = images().requires_grad_()
        F.cross_entropy(model(x), torch.arange(4)).backward()
        gradients.append([x.grad, *(p.grad for p in model.trainable().values())])
        assert not torch.is_autocast_enabled("cpu")
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


class Burst(RuntimeError):
    pass


def burst(*_: object) -> None:
    raise Burst


@pytest.mark.parametrize("where", ["blocks.0.attn.qkv", "blocks.1.mlp.fc2", "blocks.1"])
@pytest.mark.parametrize("before", [True, False], ids=["before it", "after it"])
def test_an_exception_in_a_block_leaves_no_autocast_behind(where: str, before: bool) -> None:
    model = tiny(finetune="full", precision="bf16")
    expected = model(images())
    module = model.backbone.get_submodule(where)
    handle = module.register_forward_pre_hook(burst) if before else module.register_forward_hook(burst)
    for _ in range(2):
        with pytest.raises(Burst):
            model(images())
        assert not torch.is_autocast_enabled("cpu")
    handle.remove()
    assert torch.equal(model(images()), expected)
    assert torch.randn(2, 2).matmul(torch.randn(2, 2)).dtype == FP32


@pytest.mark.parametrize("finetune", ["fulllora", "full"])
def test_a_deep_copy_is_equal_and_apart(finetune: str) -> None:
    model = stir(tiny(finetune=finetune, precision="bf16"))
    expected = model(images())
    twin = copy.deepcopy(model)
    assert torch.equal(twin(images()), expected)
    assert set(twin.trainable()) == set(model.trainable())
    branches = {name: p for name, p in twin.trainable().items() if ".lnlora." in name}
    for parameter in branches.values():
        nn.init.constant_(parameter, 2)
    timm_state = {n: torch.zeros_like(v) for n, v in twin.backbone.state_dict().items() if ".lnlora." not in n}
    twin.load_state_dict(timm_state, strict=True)
    assert all(bool((parameter == 2).all()) for parameter in branches.values())
    assert not torch.equal(twin(images()), expected)
    assert torch.equal(model(images()), expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("given", [None, ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))], ids=["of the tag", "given"])
def test_the_backbone_sees_normalised_pixels(family: str, given: tuple | None) -> None:
    model = tiny(family, **({} if given is None else {"mean": given[0], "std": given[1]}))
    cfg = model.backbone.pretrained_cfg
    mean, std = given or (cfg["mean"], cfg["std"])
    seen: list[Tensor] = []
    model.backbone.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x = images()
    model(x)
    for channel in range(3):
        torch.testing.assert_close(seen[0][:, channel], (x[:, channel] - mean[channel]) / std[channel])
    assert not any(name in model.state_dict() for name in ("mean", "std"))


BACKENDS: Any = torch.backends
PLACES = [(backend, op) for backend in ("cuda", "mkldnn") for op in ("all", "matmul", "conv", "rnn")]
HAS_NEW = pytest.mark.skipif(not hasattr(BACKENDS.cuda.matmul, "fp32_precision"), reason="torch 2.8 has the old ones")


def reset() -> None:
    BACKENDS.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("highest")
    for place in (("generic", "all"), *PLACES):
        torch._C._set_fp32_precision_setter(*place, "tf32" if place in (("cuda", "conv"), ("cuda", "rnn")) else "none")


@pytest.fixture
def settings() -> Iterator[None]:
    """torch's own, before and after."""
    reset()
    yield
    reset()


def tried(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except RuntimeError:
        return "raises"


def flags() -> None:
    with BACKENDS.cudnn.flags(enabled=False):
        pass


def shown() -> list[Any]:
    """All that torch says of TF32, by its old settings and its new ones."""
    new = [torch._C._get_fp32_precision_getter(*place) for place in (("generic", "all"), *PLACES)]
    old = (lambda: BACKENDS.cudnn.allow_tf32, torch.get_float32_matmul_precision)
    return [*new, *map(tried, old), tried(lambda: BACKENDS.cuda.matmul.allow_tf32), tried(flags)]


PROGRAMS: dict[str, list[tuple[Any, str, Any]]] = {
    "nothing": [],
    "new, of products": [(BACKENDS.cuda.matmul, "fp32_precision", "tf32")],
    "new, of convolutions": [(BACKENDS.cudnn.conv, "fp32_precision", "ieee")],
    "new, of all": [(BACKENDS, "fp32_precision", "tf32")],
    "new, of cudnn, but rnn": [
        (BACKENDS.cudnn, "fp32_precision", "tf32"),
        (BACKENDS.cudnn.rnn, "fp32_precision", "ieee"),
    ],
    "new, on the CPU": [
        (BACKENDS.mkldnn.matmul, "fp32_precision", "bf16"),
        (BACKENDS.mkldnn.conv, "fp32_precision", "tf32"),
    ],
    "old": [(BACKENDS.cudnn, "allow_tf32", False), (BACKENDS.cuda.matmul, "allow_tf32", True)],
    "both": [(BACKENDS.cuda.matmul, "allow_tf32", True), (BACKENDS.cuda.matmul, "fp32_precision", "ieee")],
}


@HAS_NEW
@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.usefixtures("settings")
def test_full_fp32_by_old_and_new_settings_leaves_no_trace(program: str) -> None:
    def run_program() -> list[Any]:
        for place, name, value in PROGRAMS[program]:
            setattr(place, name, value)
        return shown()

    before = run_program()
    with in_full_fp32():
        inside = shown()
        assert set(inside[:9]) <= {"ieee", "none"}
        assert all(value != "raises" for value, outside in zip(inside, before, strict=True) if outside != "raises")
        assert peak_flops("NVIDIA H200", "fp32") == 67e12
    assert shown() == before
    with pytest.raises(Burst), in_full_fp32():
        burst()
    assert shown() == before
    assert (peak_flops("NVIDIA H200", "fp32") is None) == (before[2] == "tf32")
    BACKENDS.fp32_precision = "ieee"
    inherited = shown()
    reset()
    run_program()
    BACKENDS.fp32_precision = "ieee"
    assert shown() == inherited, "what inherited still does"


@HAS_NEW
@pytest.mark.usefixtures("settings")
def test_convolutions_keep_full_fp32_where_all_else_is_in_tf32() -> None:
    BACKENDS.fp32_precision = "tf32"
    convolve_in_full_fp32()
    assert (BACKENDS.cudnn.conv.fp32_precision, BACKENDS.cudnn.allow_tf32) == ("ieee", False)
