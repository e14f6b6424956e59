"""Each family's own ways: checkpoints, heads, image sizes, bf16, checkpointing, and training mode."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from fulllora_dist.core.errors import UserError
from fulllora_dist.models.adapt import create_model
from fulllora_dist.models.adapted_model import AdaptedModel
from tests.tiny import ARCHITECTURE, CLASSES, FAMILIES, SIDE, architecture, branches, images, roughen, stir, tiny

BF16, FP32 = torch.bfloat16, torch.float32
WITHOUT_CHECKPOINTING = ("convit",)
WIDE = 2 * SIDE


def bare(family: str, side: int = SIDE, **settings: Any) -> nn.Module:
    """A timm model with six classes and no tensor at its start."""
    torch.manual_seed(5)
    arguments = architecture(family) | {"drop_path_rate": 0.0, "num_classes": 6, "img_size": side} | settings
    model = timm.create_model(FAMILIES[family][0], **arguments).eval()
    model.requires_grad_(False)  # as in the adapted model: some of torch's kernels differ otherwise
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor).abs() * 0.1)
    return model


def saved(model: nn.Module, folder: Path) -> str:
    save_file(model.state_dict(), folder / "weights.safetensors")
    return str(folder / "weights.safetensors")


def from_file(family: str, checkpoint: str, **settings: Any) -> AdaptedModel:
    tags = timm.list_pretrained(f"{FAMILIES[family][0]}.*")
    arguments = {"image_size": SIDE, "model_kwargs": architecture(family), "rank": 1} | settings
    return create_model(tags[0] if tags else FAMILIES[family][0], checkpoint_path=checkpoint, **arguments)


def normalised(model: AdaptedModel, pixels: Tensor) -> Tensor:
    return (pixels - model.mean) / model.std


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_with_its_head_with_rows_of_it_and_with_a_new_one(family: str, tmp_path: Path) -> None:
    theirs = bare(family)
    path = saved(theirs, tmp_path)
    whole = from_file(family, path)
    state = whole.backbone.state_dict()
    assert {name for name in state if ".lnlora." not in name} == set(theirs.state_dict())
    assert all(torch.equal(state[name], value) for name, value in theirs.state_dict().items())
    assert (whole.info.own_classes, whole.info.num_classes, whole.spec.head) == (True, 6, "frozen")
    with torch.no_grad():
        expected = theirs(normalised(whole, images()))
        assert torch.equal(whole(images()), expected)
        cut = from_file(family, path, class_indices=[5, 0, 2])
        torch.testing.assert_close(cut(images()), expected[:, [5, 0, 2]], rtol=0, atol=1e-5)
    assert (cut.info.own_classes, cut.spec.head, cut.info.sha256) == (True, "frozen", whole.info.sha256)

    new = from_file(family, path, num_classes=3)
    heads = {name for name, value in new.backbone.named_parameters() if value.shape != state[name].shape}
    assert heads
    assert all(name.startswith("head") for name in heads)
    assert (new.info.own_classes, new.spec.head, new(images()).shape) == (False, "trained", (4, 3))
    assert {name for name in new.trainable() if ".lnlora." not in name} == heads
    adapted = from_file(family, path, head="adapted")
    assert len(branches(adapted)) - len(branches(whole)) == (2 if family == "deit_distilled" else 1)


def at_another_size(family: str, theirs: nn.Module) -> nn.Module:
    """The same weights on an image of twice the side, in timm's own way, or by hand where timm has none."""
    if hasattr(theirs, "set_input_size") and not family.startswith("swin"):
        theirs.set_input_size(img_size=(WIDE, WIDE))
        return theirs
    state = theirs.state_dict()
    if family in ("cait", "convit"):
        side = int(state["pos_embed"].shape[1] ** 0.5)
        grid = state["pos_embed"].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        wide = F.interpolate(grid, size=(2 * side, 2 * side), mode="bicubic", antialias=True)
        state["pos_embed"] = wide.flatten(2).transpose(1, 2)
    wider = bare(family, WIDE)  # Swin: the same windows, more of them
    wider.load_state_dict(state, strict=True)
    return wider


@pytest.mark.parametrize("family", FAMILIES)
def test_another_image_size(family: str, tmp_path: Path) -> None:
    theirs = bare(family)
    model = from_file(family, saved(theirs, tmp_path), image_size=WIDE)
    assert model.info.image_size == WIDE
    x = images(side=WIDE)
    with torch.no_grad():
        torch.testing.assert_close(model(x), at_another_size(family, theirs)(normalised(model, x)), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["vit_small_patch16_224", "flexivit_small", "vit_base_patch16_radio_v3"])
def test_another_image_size_is_resampled_as_the_name_asks(name: str, tmp_path: Path) -> None:
    """FlexiViT and RADIO in ways of their own: timm's loader chooses by the architecture's name."""
    settings = ARCHITECTURE | {"num_classes": CLASSES}
    small = timm.create_model(name, img_size=SIDE, **settings)
    torch.manual_seed(7)
    path = tmp_path / "weights.safetensors"
    save_file({key: torch.randn_like(value) for key, value in small.state_dict().items()}, path)
    overlay = {"file": str(path), "num_classes": CLASSES, "custom_load": False}
    theirs = timm.create_model(name, pretrained=True, img_size=WIDE, pretrained_cfg_overlay=overlay, **settings)
    tag = timm.list_pretrained(f"{name}.*")[0]
    ours = create_model(tag, checkpoint_path=str(path), image_size=WIDE, model_kwargs=ARCHITECTURE, rank=1)
    assert torch.equal(ours.backbone.pos_embed, theirs.pos_embed)


def test_phases_may_have_images_of_another_size_where_the_family_takes_them() -> None:
    """XCiT as it is, the others as timm resamples them in the pass; CaiT does not."""
    for family in ("xcit", "vit"):
        model, fixed = tiny(family, image_size=WIDE, input_sizes=[SIDE]), tiny(family, image_size=WIDE)
        assert model(images(side=SIDE)).shape == (4, CLASSES)
        assert torch.equal(model(images(side=WIDE)), fixed(images(side=WIDE)))
        with pytest.raises(
            UserError, match=rf"image_size: must be a multiple of the patch size \d+ of .*, got {SIDE + 1}"
        ):
            tiny(family, image_size=WIDE, input_sizes=[SIDE + 1])
    with pytest.raises(UserError, match=r"phases.image_size: cait_xxs24_224 supports a single image size only"):
        tiny("cait", input_sizes=[WIDE])


@pytest.mark.parametrize("finetune", ["fulllora", "full", "head", "layernorm"])
@pytest.mark.parametrize(
    ("family", "settings", "changed", "words"),
    [
        (
            "vit",
            {"image_size": 3},
            {},
            "model.image_size: must be a multiple of the patch size 4 of vit_tiny_patch16_224, got 3",
        ),
        (
            "xcit",
            {},
            {"in_chans": 1},
            "model.image_size: xcit_nano.* remove arguments that change its input from model.model_kwargs",
        ),
        (
            "vit",
            {},
            {"in_chans": 1},
            "model.image_size: vit_tiny.* remove arguments that change its input from model.model_kwargs",
        ),
        (
            "vit",
            {},
            {"global_pool": ""},
            r"model.model_kwargs: .* must return logits .* for one image, got \(1, 17, 4\)",
        ),
        (
            "swin",
            {},
            {"global_pool": ""},
            r"model.model_kwargs: .* must return logits .* for one image, got \(1, 4, 4, 4\)",
        ),
    ],
)
def test_a_model_that_gives_no_logits_is_refused(
    family: str, settings: dict, changed: dict, words: str, finetune: Any
) -> None:
    with pytest.raises(UserError, match=words) as caught:
        tiny(family, finetune=finetune, model_kwargs=architecture(family) | changed, **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_weights_of_another_model_are_refused(family: str, tmp_path: Path) -> None:
    deeper = {"depths": (2, 3)} if family.startswith("swin") else {"depth": 3}
    for other in (bare(family, **deeper), bare("vit" if family != "vit" else "beit")):
        if other.state_dict().keys() != bare(family).state_dict().keys():
            with pytest.raises(UserError, match=r"model.checkpoint_path: .*does not fit the backbone") as caught:
                from_file(family, saved(other, tmp_path))
            assert "\n" not in str(caught.value)


def test_deit3s_own_checkpoint_loads(tmp_path: Path) -> None:
    """Its layer scales are called gamma_1 and gamma_2 there, ls1.gamma and ls2.gamma in timm."""
    theirs = bare("deit3").state_dict()
    own = {name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): v for name, v in theirs.items()}
    assert own.keys() != theirs.keys()
    save_file(own, tmp_path / "own.safetensors")
    state = from_file("deit3", str(tmp_path / "own.safetensors")).backbone.state_dict()
    assert all(torch.equal(state[name], value) for name, value in theirs.items())


def test_convits_positions_follow_the_model() -> None:
    """The table of relative positions moves with it, and its dtype changes with the model's."""
    model = tiny("convit")
    x = images(dtype=torch.float64)
    torch.testing.assert_close(model.double()(x).float(), tiny("convit")(x.float()))
    assert tiny("convit", precision="bf16")(x.float()).dtype == FP32
    assert model.to("meta").backbone.blocks[0].attn.rel_indices.is_meta


@pytest.mark.parametrize("family", FAMILIES)
def test_training_mode_computes_the_same_and_leaves_the_backbone(family: str) -> None:
    """No stochastic depth that nobody asked for, and no statistics of a batch."""
    model = stir(roughen(tiny(family)))
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    expected = model(images())
    model.train()
    assert torch.equal(model(images()), expected)
    assert all(torch.equal(value, before[name]) for name, value in model.backbone.state_dict().items())


def test_stochastic_depth_that_was_asked_for_is_there() -> None:
    settings = architecture("swin") | {"drop_path_rate": 0.5}
    model = create_model(
        FAMILIES["swin"][0], pretrained=False, num_classes=CLASSES, image_size=SIDE, model_kwargs=settings, rank=1
    )
    model.train()
    assert not torch.equal(model(images()), model(images()))


def gradients(model: AdaptedModel) -> tuple[Tensor, dict[str, Tensor]]:
    x = images(16).requires_grad_()
    logits = model(x)
    F.cross_entropy(logits, torch.arange(16) % CLASSES).backward()
    assert x.grad is not None
    found = {"pixels": x.grad, **{name: p.grad for name, p in model.trainable().items() if p.grad is not None}}
    assert {g.dtype for g in (logits, *found.values())} == {FP32}
    return logits.detach(), found


@pytest.mark.parametrize("finetune", ["fulllora", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_is_near_fp32(family: str, finetune: str) -> None:
    exact, rounded = (stir(roughen(tiny(family, finetune=finetune, precision=p))) for p in ("fp32", "bf16"))
    seen: dict[str, torch.dtype] = {}
    layers = {s.path for s in rounded.family.sites(tiny(family, finetune="head").backbone, family)}
    for path in layers:
        rounded.backbone.get_submodule(path).register_forward_hook(lambda _, __, y, p=path: seen.update({p: y.dtype}))
    (logits, wanted), (logits_16, found) = gradients(exact), gradients(rounded)
    outside = {s for s in layers if s.startswith(("patch_embed", "head", "attn_pool"))}
    # without branches timm reads qkv.weight itself, where it has biases of its own
    assert all(finetune == "full" and path.endswith("qkv") for path in layers - seen.keys())
    assert {seen[path] for path in outside} == {FP32}
    assert {dtype for path, dtype in seen.items() if path not in outside} == {BF16}
    with torch.no_grad(), torch.autocast("cpu", BF16):  # torch's own bf16 of the whole model
        torchs = exact(images(16))
    assert 0 < (logits_16 - logits).norm() < 4 * (torchs - logits).norm()
    together = [torch.cat([g.flatten() for g in one.values()]) for one in (wanted, found)]
    assert F.cosine_similarity(*together, dim=0) > 0.99
    assert F.cosine_similarity(wanted["pixels"].flatten(), found["pixels"].flatten(), dim=0) > 0.99
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("finetune", ["fulllora", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointed_blocks_give_the_same_gradients_or_are_refused(family: str, finetune: str, precision: str) -> None:
    plain, checkpointed = (stir(roughen(tiny(family, finetune=finetune, precision=precision))) for _ in range(2))  # type: ignore[arg-type]
    if family in WITHOUT_CHECKPOINTING:
        with pytest.raises(
            UserError, match=r"activation_checkpointing: convit_tiny of the family ConViT does not support it"
        ):
            checkpointed.set_activation_checkpointing(True)
        checkpointed.set_activation_checkpointing(False)
        return
    runs = 0

    def count(*_: object) -> None:
        nonlocal runs
        runs += 1

    checkpointed.family.modules(checkpointed.backbone)[-1 if family != "cait" else 0].register_forward_pre_hook(count)
    checkpointed.set_activation_checkpointing(True)
    (logits, wanted), (again, found) = gradients(plain), gradients(checkpointed)
    assert runs == 2  # once more in backward
    assert torch.equal(logits, again)
    assert all(torch.equal(found[name], g) for name, g in wanted.items())
