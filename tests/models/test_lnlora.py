"""A branch is y = W x + b + (alpha / r) B A LN(x), beside a frozen layer that keeps timm's names."""

import copy
import re

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fulllora_dist.models.families.beit import CallingAttention
from fulllora_dist.models.lnlora import LNLoRABranch, LNLoRASplit, attach
from tests.tiny import ARCHITECTURE, CLASSES, FAMILIES, SIDE, architecture, images, patches, roughen, stir, tiny

RANK, ALPHA, EPS = 3, 5.0, 1e-3


def branch(d_in: int, d_out: int, norm: bool) -> LNLoRABranch:
    made = LNLoRABranch(d_in, d_out, RANK, ALPHA, norm=norm, eps=EPS).double()
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    return made


def delta(made: LNLoRABranch, x: Tensor) -> Tensor:
    """(alpha / r) B A LN(x) as the paper writes it."""
    if made.norm is not None:
        ln = nn.LayerNorm(x.shape[-1], eps=EPS, dtype=torch.float64)
        x = F.layer_norm(x, ln.normalized_shape, made.norm.weight, made.norm.bias, ln.eps)
    return ALPHA / RANK * (x @ made.A.T @ made.B.T)


def linear(norm: bool, names: tuple[str, ...]) -> tuple[nn.Module, Tensor, Tensor]:
    layer = nn.Linear(12, 30, dtype=torch.float64)
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    parts = {name: branch(12, 10 if name else 30, norm) for name in names}
    expected = x @ layer.weight.T + layer.bias
    if names == ("",):
        expected = expected + delta(parts[""], x)
    else:
        zero = torch.zeros(2, 5, 10, dtype=torch.float64)
        expected = expected + torch.cat([delta(parts[n], x) if n in parts else zero for n in "qkv"], dim=-1)
    attach(layer, parts[""] if names == ("",) else LNLoRASplit(parts, "qkv"))
    return layer, x, expected


def conv(norm: bool, **settings: int) -> tuple[nn.Module, Tensor, Tensor]:
    layer = nn.Conv2d(3, 7, **settings, dtype=torch.float64)
    x = torch.randn(2, 3, 11, 9, dtype=torch.float64, requires_grad=True)
    made = branch(3 * layer.kernel_size[0] * layer.kernel_size[1], 7, norm)
    expected = layer(x) + delta(made, patches(x, layer)).permute(0, 3, 1, 2)
    attach(layer, made)
    return layer, x, expected


CASES = {
    "linear or shared qkv": lambda norm: linear(norm, ("",)),
    "q, k and v": lambda norm: linear(norm, ("q", "k", "v")),
    "q and v alone": lambda norm: linear(norm, ("q", "v")),
    "patch embedding": lambda norm: conv(norm, kernel_size=3, stride=3),
    "stride and padding": lambda norm: conv(norm, kernel_size=4, stride=2, padding=1),
    "dilation": lambda norm: conv(norm, kernel_size=2, stride=3, dilation=2),
}


@pytest.mark.parametrize("norm", [True, False], ids=["lnlora", "lora"])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_formula_in_value_and_gradient(case: str, norm: bool) -> None:
    torch.manual_seed(0)
    layer, x, expected = CASES[case](norm)
    wrt = [x, *layer.parameters()]
    cotangent = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, wrt, cotangent)
    y = layer(x)
    found = torch.autograd.grad(y, wrt, cotangent)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("qkv", ["separate", "shared"])
@pytest.mark.parametrize("finetune", ["fulllora", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_starts_as_the_bare_timm_model_bit_for_bit(family: str, finetune: str, qkv: str) -> None:
    model = roughen(tiny(family, finetune=finetune, qkv=qkv, head="adapted"))
    bare = timm.create_model(FAMILIES[family][0], num_classes=CLASSES, img_size=SIDE, **architecture(family)).eval()
    bare.requires_grad_(False)  # some of torch's kernels differ where a weight or a bias table asks for a gradient
    bare.load_state_dict({k: v for k, v in model.backbone.state_dict().items() if ".lnlora." not in k})
    x = images()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (bare.pretrained_cfg["mean"], bare.pretrained_cfg["std"]))
    with torch.no_grad():
        assert torch.equal(model(x), bare((x - mean) / std))


def test_the_biases_of_an_attention_are_added_in_one_operation() -> None:
    """At a real width, where adding them afterwards rounds otherwise."""
    torch.manual_seed(0)
    theirs = timm.models.beit.Attention(768, num_heads=12, qkv_bias=True)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.05)
    ours = copy.deepcopy(theirs)
    made = LNLoRABranch(768, 3 * 768, 2, 2.0, norm=True, eps=EPS)
    made.reset_parameters(None)
    attach(ours.qkv, made, ours, CallingAttention)
    x = torch.randn(2, 50, 768)
    apart = theirs.qkv(x) + torch.cat([theirs.q_bias, theirs.k_bias, theirs.v_bias])
    with torch.no_grad():
        assert not torch.equal(ours.qkv(x), apart)
        assert torch.equal(ours(x), theirs(x))
    assert ours.state_dict().keys() - theirs.state_dict().keys() == {
        f"qkv.lnlora.{tensor}" for tensor in ("norm.weight", "norm.bias", "A", "B")
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_starts_as_the_backbone_without_branches(family: str) -> None:
    """In bf16, too, a branch whose B is zero changes no bit."""
    with_branches, without = (tiny(family, finetune=f, precision="bf16") for f in ("fulllora", "head"))
    assert torch.equal(with_branches(images()), without(images()))


@pytest.mark.parametrize("qkv", ["separate", "shared"])
def test_keys_are_timms_and_the_adapters(qkv: str) -> None:
    model = tiny(qkv=qkv, head="adapted")
    bare = timm.create_model("vit_tiny_patch16_224", num_classes=CLASSES, img_size=SIDE, **ARCHITECTURE)
    layers = ["patch_embed.proj", "head"]
    for i in range(2):
        layers += [f"blocks.{i}.{layer}" for layer in ("attn.proj", "mlp.fc1", "mlp.fc2")]
        layers += [f"blocks.{i}.attn.qkv"] if qkv == "shared" else []
    parts = [f"{layer}.lnlora" for layer in layers]
    if qkv == "separate":
        parts += [f"blocks.{i}.attn.qkv.lnlora.{part}" for i in range(2) for part in "qkv"]
    adapter = {f"{part}.{tensor}" for part in parts for tensor in ("norm.weight", "norm.bias", "A", "B")}
    assert set(model.trainable()) == adapter
    assert set(model.backbone.state_dict()) == set(bare.state_dict()) | adapter
    assert all(re.fullmatch(r".+\.lnlora\.([qkv]\.)?(norm\.weight|norm\.bias|A|B)", key) for key in adapter)


@pytest.mark.parametrize("into", ["model", "backbone"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_timm_checkpoint_loads_strictly_and_leaves_the_branches(family: str, into: str) -> None:
    model = stir(tiny(family, head="adapted"))
    before = {name: p.detach().clone() for name, p in model.trainable().items()}
    torch.manual_seed(7)
    bare = timm.create_model(FAMILIES[family][0], num_classes=CLASSES, img_size=SIDE, **architecture(family))
    (model if into == "model" else model.backbone).load_state_dict(bare.state_dict(), strict=True)
    after = model.backbone.state_dict()
    assert all(torch.equal(after[name], value) for name, value in bare.state_dict().items())
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_its_own_state_loads_and_half_a_branch_is_refused() -> None:
    model, other = stir(tiny()), tiny()
    state = model.state_dict()
    other.load_state_dict(state, strict=True)
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())
    for gone in ("blocks.0.mlp.fc1.lnlora.B", "blocks.1.attn.qkv.lnlora.k.norm.bias"):
        halved = {name: value for name, value in state.items() if not name.endswith(gone)}
        with pytest.raises(RuntimeError, match=re.escape(gone)):
            other.load_state_dict(halved, strict=True)


def test_the_weight_that_timm_reads_is_the_frozen_one() -> None:
    model = stir(tiny())
    qkv = model.backbone.get_submodule("blocks.0.attn.qkv")
    bare = timm.create_model("vit_tiny_patch16_224", num_classes=CLASSES, img_size=SIDE, **ARCHITECTURE)
    bare.load_state_dict({k: v for k, v in model.backbone.state_dict().items() if ".lnlora." not in k})
    x = torch.randn(2, 5, 32)
    assert torch.equal(F.linear(x, qkv.weight, qkv.bias), bare.blocks[0].attn.qkv(x))
    assert isinstance(qkv, nn.Linear)
    assert not torch.equal(qkv(x), bare.blocks[0].attn.qkv(x))


def branch_gradient(pixels: Tensor, **settings: float) -> float:
    """Norm of the gradient that reaches the normalised pixels through the patch embedding's branch."""
    layer = stir(tiny(head="frozen", **settings)).backbone.get_submodule("patch_embed.proj")
    nn.init.zeros_(layer.weight)
    x = (2 * pixels - 1).requires_grad_()
    y = layer(x)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    return float(torch.autograd.grad(y, x, cotangent)[0].norm())


def test_flat_patches_do_not_blow_up_the_gradient() -> None:
    """LN over a flat patch divides by sqrt(eps): with 1e-6 that is a factor of hundreds, with the default below ten."""
    grey, noise = torch.full((1, 3, SIDE, SIDE), 0.3), images(1)
    assert branch_gradient(grey) < 10 * branch_gradient(noise)
    assert branch_gradient(grey, patch_norm_eps=1e-6) > 300 * branch_gradient(noise, patch_norm_eps=1e-6)
    assert branch_gradient(grey, patch_norm_eps=1e-4) == pytest.approx(10 * branch_gradient(grey), rel=1e-4)
    assert branch_gradient(noise) == pytest.approx(branch_gradient(noise, patch_norm_eps=1e-6), rel=0.05)
