"""Every branch acts, in every model that is accepted; every other model is refused by name."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fulllora_dist.core.errors import UserError
from fulllora_dist.models.adapt import create_model
from fulllora_dist.models.adapted_model import AdaptedModel
from tests.tiny import (
    CLASSES,
    FAMILIES,
    SIDE,
    architecture,
    branches,
    images,
    patches,
    roughen,
    softmax_ignores,
    stir,
    tiny,
)

EXPECTED_BRANCHES = {
    "vit": 14,
    "deit_distilled": 15,
    "dinov2_swiglu": 14,
    "aimv2_swiglu": 16,
    "registers": 14,
    "deit3": 14,
    "siglip_pool": 14 + 6,
    "swin": 21,
    "swinv2": 21,
    "swinv2_no_bias": 21,
    "beit": 14,
    "beitv2": 14,
    "beit_shared_bias": 14,
    "eva_giant": 14,
    "eva02_fused": 14,
    "eva02_apart": 16,
    "eva_rope": 14,
    "eva_rope_mixed": 14,
    "eva_rope_sapiens2": 14,
    "eva_post_norm": 14,
    "eva_pool": 14 + 6,
    "cait": 14,
    "xcit": 16,
    "convit": 14,
}
"""A patch embedding; q, k, v, proj, fc1 and fc2 in two blocks (a SwiGLU of separate layers has two fc1, a pool six
branches more); one head, or DeiT's two. Swin: three blocks and one merging. XCiT: three convolutions."""


def reference(model: AdaptedModel, family: str, pixels: Tensor) -> Tensor:
    """The logits of the bare timm model in float64, each branch's formula added to its layer by a forward hook."""
    bare = timm.create_model(FAMILIES[family][0], num_classes=CLASSES, img_size=SIDE, **architecture(family))
    bare = bare.double().eval()
    state = model.backbone.state_dict()
    bare.load_state_dict({key: value for key, value in state.items() if ".lnlora." not in key})
    for module in bare.modules():
        if hasattr(module, "qkv_bias_separate"):
            module.qkv_bias_separate = True  # timm's own switch: qkv is called, and a hook on it is

    def low_rank(branch: str, x: Tensor, eps: float) -> Tensor:
        ln = nn.LayerNorm(x.shape[-1], eps=eps, dtype=torch.float64)
        ln.load_state_dict({key: state[f"{branch}.norm.{key}"] for key in ("weight", "bias")})
        a, b = state[f"{branch}.A"], state[f"{branch}.B"]
        return model.spec.alpha / model.spec.rank * (ln(x) @ a.T @ b.T)

    def hook(layer: str):
        def add(module: nn.Module, args: tuple[Tensor], y: Tensor) -> Tensor:
            (x,) = args
            if isinstance(module, nn.Conv2d):
                tokens = patches(x, module)
                return y + low_rank(f"{layer}.lnlora", tokens, model.spec.patch_norm_eps).permute(0, 3, 1, 2)
            if f"{layer}.lnlora.A" in state:
                return y + low_rank(f"{layer}.lnlora", x, 1e-6)
            parts = [f"{layer}.lnlora.{n}" for n in "qkv" if f"{layer}.lnlora.{n}.A" in state]
            return y + torch.cat([low_rank(part, x, 1e-6) for part in parts], dim=-1)

        return add

    for layer in {branch.partition(".lnlora")[0] for branch in branches(model)}:
        bare.get_submodule(layer).register_forward_hook(hook(layer))
    mean, std = (torch.tensor(bare.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    return bare((pixels - mean) / std)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_branch_alone_changes_the_logits_learns_and_equals_the_formula(family: str) -> None:
    model = stir(roughen(tiny(family, head="adapted", alpha=2.0).double()))
    x, labels = images(dtype=torch.float64), torch.arange(4)
    own = model.trainable()
    full = {name: own[f"{name}.B"].detach().clone() for name in branches(model)}
    assert len(full) == EXPECTED_BRANCHES[family]
    torch.testing.assert_close(model(x), reference(model, family, x), rtol=0, atol=1e-12)
    with torch.no_grad():
        for name in full:
            own[f"{name}.B"].zero_()
        still = model(x)
    for name, b in full.items():
        own[f"{name}.B"].data.copy_(b)
        model.zero_grad()
        logits = model(x)
        F.cross_entropy(logits, labels).backward()
        assert (logits - still).abs().max() > 1e-9, f"{name} changes nothing"
        torch.testing.assert_close(logits, reference(model, family, x), rtol=0, atol=1e-12, msg=name)
        for tensor in ("A", "B", "norm.weight", "norm.bias"):
            if not softmax_ignores(family, f"{name}.{tensor}"):
                assert own[f"{name}.{tensor}"].grad.norm() > 1e-10, f"{name}.{tensor} has no gradient"
        own[f"{name}.B"].data.zero_()


@pytest.mark.parametrize("component", ["patch_embed", "q", "k", "v", "proj", "fc1", "fc2"])
def test_a_placement_puts_branches_there_and_nowhere_else(component: str) -> None:
    model = tiny("aimv2_swiglu", components=(component,), head="frozen")
    where = {"proj": "attn.proj.lnlora", "fc1": "mlp.fc1_", "fc2": "mlp.fc2.lnlora"}
    mark = where.get(component, f"qkv.lnlora.{component}" if component in "qkv" else "patch_embed.proj.lnlora")
    count = {"patch_embed": 1, "fc1": 4}.get(component, 2)
    assert len(branches(model)) == count
    assert all(mark in name for name in branches(model))


BLOCKS = {
    "swin": ["layers.0.blocks.0", "layers.0.blocks.1", "layers.1.blocks.0 layers.1.downsample"],
    "cait": ["blocks.0", "blocks_token_only.0"],
    "xcit": ["blocks.0", "cls_attn_blocks.0"],
    "siglip_pool": ["blocks.0", "blocks.1"],
}
"""The blocks in forward order, each with the patch merging before it."""


@pytest.mark.parametrize("family", BLOCKS)
def test_blocks_are_counted_through_and_what_is_around_them_stays(family: str) -> None:
    everywhere = branches(tiny(family))
    inside = [{n for n in everywhere if n.startswith(tuple(f"{p}." for p in b.split()))} for b in BLOCKS[family]]
    for i, own in enumerate(inside):
        assert set(branches(tiny(family, blocks=[i]))) == set(everywhere) - set().union(*inside) | own
    assert set(branches(tiny(family, blocks=[*range(len(inside))]))) == set(everywhere)
    with pytest.raises(UserError, match=f"from 0 to {len(inside) - 1}, the blocks of"):
        tiny(family, blocks=[len(inside)])


@pytest.mark.parametrize("family", ["swin", "eva02_fused"])
def test_branches_of_some_blocks_and_trained_norms_equal_the_formula(family: str) -> None:
    model = stir(roughen(tiny(family, blocks=[1], train_norms=True, alpha=2.0).double()))
    x = images(dtype=torch.float64)
    torch.testing.assert_close(model(x), reference(model, family, x), rtol=0, atol=1e-12)
    F.cross_entropy(model(x), torch.arange(4)).backward()
    for name, parameter in model.trainable().items():
        if not softmax_ignores(family, name):
            assert parameter.grad is not None, name
            assert parameter.grad.norm() > 1e-10, name


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"components": ("q", "fc3")}, "adapter.components.1: .*patch_embed.*got 'fc3'"),
        ({"components": ()}, "adapter.components: must include a component of .*, got none"),
        ({"components": ("q", "v"), "qkv": "shared"}, "adapter.qkv.*separate"),
    ],
)
def test_a_placement_that_makes_no_sense_is_refused(settings: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        tiny(**settings)


@pytest.mark.parametrize(
    ("name", "class_name"),
    [
        ("vit_small_patch16_18x2_224", "ParallelThingsBlock"),
        ("vit_base_patch16_xp_224", "ParallelScalingBlock"),
        ("vit_base_patch16_rpn_224", "ResPostBlock"),
        ("vit_dpwee_patch16_reg1_gap_256", "DiffParallelScalingBlock"),
        ("vit_dwee_patch16_reg1_gap_256", "DiffAttention"),
        ("vit_tiny_r_s16_p8_224", "HybridEmbed"),
        ("samvit_base_patch16", "VisionTransformerSAM"),
        ("vit_relpos_small_patch16_224", "VisionTransformerRelPos"),
        ("swinv2_cr_tiny_ns_224", "SwinTransformerV2Cr"),
        ("davit_tiny", "DaVit"),
        ("resnet18", "ResNet"),
        ("convnext_atto", "ConvNeXt"),
    ],
)
def test_another_family_is_refused_by_name(name: str, class_name: str) -> None:
    with torch.device("meta"), pytest.raises(UserError, match=rf"{name} has the .* {class_name}, .*supported: "):
        create_model(name, pretrained=False)


def test_the_report_counts_what_is_there() -> None:
    model = tiny(head="trained")
    report, own = model.report, model.trainable()
    assert report.trainable == sum(p.numel() for p in own.values())
    assert report.total == sum(p.numel() for n, p in model.backbone.named_parameters() if ".lnlora." not in n)
    by_layer = {a.site.path: a.parameters for a in report.adapted}
    for path, count in by_layer.items():
        assert count == sum(p.numel() for n, p in own.items() if n.startswith(f"{path}.lnlora."))
    assert dict(report.trained) == {"head.weight": 32 * CLASSES, "head.bias": CLASSES}
    frozen = {n.rpartition(".")[0] for n, p in model.backbone.named_parameters() if not p.requires_grad}
    assert {path for path, _ in report.left} == frozen - set(by_layer)
    assert f"{report.trainable:,} of {report.total:,} = {report.share:.2%}" in str(report)
