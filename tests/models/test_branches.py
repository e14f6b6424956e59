"""The norm of each branch against the plain product, and the model without some of them against B = 0."""

import copy

import pytest
import timm
import torch
from torch import Tensor

from fulllora_dist.core.errors import UserError
from fulllora_dist.models.adapted_model import AdaptedModel
from fulllora_dist.models.branches import Branch, branches_of, disable_branches
from tests.tiny import CLASSES, FAMILIES, SIDE, architecture, branches, images, roughen, stir, tiny

CASES = [
    *((family, "separate", "fulllora") for family in FAMILIES),
    *((family, "shared", "lora") for family in ("vit", "swinv2", "beit", "siglip_pool", "xcit")),
]
BLOCKS = {
    "vit": ["patch_embed", "blocks.0", "blocks.1", "head"],
    "deit_distilled": ["patch_embed", "blocks.0", "blocks.1", "head", "head_dist"],
    "swin": [
        "patch_embed",
        "layers.0.blocks.0",
        "layers.0.blocks.1",
        "layers.1.downsample",
        "layers.1.blocks.0",
        "head",
    ],
    "cait": ["patch_embed", "blocks.0", "blocks_token_only.0", "head"],
    "eva_pool": ["patch_embed", "blocks.0", "blocks.1", "attn_pool", "head"],
}


def model_of(family: str, qkv: str, finetune: str) -> AdaptedModel:
    """No tensor at its start, and a scale that is not 1."""
    return roughen(stir(tiny(family, qkv=qkv, finetune=finetune, head="adapted", alpha=2.0)))


def frozen_weight(model: AdaptedModel, branch: Branch) -> Tensor:
    """By the names alone: q, k and v are thirds of a fused layer, k and v halves of `kv`."""
    path, _, part = branch.name.partition(".lnlora")
    weight = model.backbone.state_dict()[f"{path}.weight"]
    weight = weight.reshape(len(weight), -1)
    if part:
        order = {"qkv": "qkv", "kv": "kv", "qk": "qk"}[path.rpartition(".")[2]]
        weight = weight.reshape(len(order), -1, weight.shape[1])[order.index(part[1:])]
    return weight


@pytest.mark.parametrize(("family", "qkv", "finetune"), CASES)
def test_norms_are_those_of_the_plain_product(family: str, qkv: str, finetune: str) -> None:
    model = model_of(family, qkv, finetune)
    found = branches_of(model)
    assert sorted(branch.name for branch in found) == sorted(branches(model))
    state = model.backbone.state_dict()
    for branch in found:
        a, b = (state[f"{branch.name}.{name}"].double() for name in "AB")
        assert branch.norm() == pytest.approx((2 / 3 * (b @ a)).square().sum().sqrt().item(), rel=1e-12)
        weight = frozen_weight(model, branch)
        assert torch.equal(branch.weight, weight)
        assert weight.shape == (len(b), a.shape[1])
        assert branch.weight_norm() == pytest.approx(weight.double().square().sum().sqrt().item(), rel=1e-12)
    if family in BLOCKS and finetune == "fulllora":
        assert list(dict.fromkeys(branch.block for branch in found)) == BLOCKS[family]


def test_a_product_that_cancels_keeps_its_digits() -> None:
    """tr(A'A B'B) of Gram matrices would give noise of 1e-8 here."""
    model = tiny()
    branch = branches_of(model)[1]
    with torch.no_grad():
        branch.module.A[1] = branch.module.A[0]
        branch.module.B[:, 0], branch.module.B[:, 1], branch.module.B[0, 0] = 1.0, -1.0, 1.0 + 2**-20
    assert branch.norm() == pytest.approx(2**-20 * branch.module.A[0].double().norm().item(), rel=1e-9)


def logits_and_gradient(model: AdaptedModel) -> tuple[Tensor, Tensor]:
    x = images().requires_grad_()
    logits = model(x)
    return logits.detach(), torch.autograd.grad(logits.square().sum(), x)[0]


def same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return all(map(torch.equal, a, b))


@pytest.mark.parametrize(("family", "qkv", "finetune"), CASES)
def test_switched_off_is_b_zero_and_all_off_the_bare_model(family: str, qkv: str, finetune: str) -> None:
    """Bit for bit, in logits and input gradient, for each component, and afterwards as before."""
    model = model_of(family, qkv, finetune)
    before, state = logits_and_gradient(model), copy.deepcopy(model.state_dict())
    found = branches_of(model)
    for component in dict.fromkeys(branch.component for branch in found):
        chosen = [branch for branch in found if branch.component == component]
        zeroed = copy.deepcopy(model)
        with torch.no_grad():
            for branch in chosen:
                zeroed.backbone.get_parameter(f"{branch.name}.B").zero_()
        with disable_branches(chosen):
            off = logits_and_gradient(model)
        assert same(off, logits_and_gradient(zeroed)), component
        assert not torch.equal(off[0], before[0]), component
        assert same(logits_and_gradient(model), before)
    assert state.keys() == model.state_dict().keys()
    assert same(tuple(state.values()), tuple(model.state_dict().values()))

    bare = timm.create_model(FAMILIES[family][0], num_classes=CLASSES, img_size=SIDE, **architecture(family)).eval()
    bare.requires_grad_(False)  # as in the adapted model: some of torch's kernels differ otherwise
    bare.load_state_dict(
        {key.removeprefix("backbone."): value for key, value in state.items() if ".lnlora." not in key}
    )
    with torch.no_grad(), disable_branches(found):
        assert torch.equal(model(images()), bare((images() - model.mean) / model.std))


def test_on_again_after_an_exception_and_inside_another() -> None:
    model = stir(tiny())
    found = branches_of(model)
    before = logits_and_gradient(model)
    with pytest.raises(KeyboardInterrupt), disable_branches(found[:3]):
        raise KeyboardInterrupt
    assert same(logits_and_gradient(model), before)
    with disable_branches(found[:2]):
        outer = logits_and_gradient(model)
        with disable_branches(found[1:4]):
            assert not same(logits_and_gradient(model), outer)
        assert same(logits_and_gradient(model), outer), "what was off already stays off"
    assert same(logits_and_gradient(model), before)


@pytest.mark.parametrize("finetune", ["full", "head", "layernorm"])
def test_without_branches_there_is_nothing_to_look_at(finetune: str) -> None:
    with pytest.raises(UserError, match=f"adapter: finetune: {finetune} has no branches; .* fulllora or lora$"):
        branches_of(tiny(finetune=finetune))
