"""What trains in each mode, and the rank that a budget allows."""

import pytest
import timm
import torch
import torch.nn.functional as F

from fulllora_dist.core.errors import UserError
from fulllora_dist.models.adapt import create_model
from tests.tiny import ARCHITECTURE, CLASSES, SIDE, branches, images, stir, tiny

NORMLESS = ARCHITECTURE | {"norm_layer": torch.nn.Identity}
HEAD = {"head.weight", "head.bias"}
BACKBONE = set(timm.create_model("vit_tiny_patch16_224", img_size=SIDE, **ARCHITECTURE).state_dict())
NORMS = {name for name in BACKBONE if "norm" in name}
LAYERS = [f"blocks.{i}.{layer}" for i in range(2) for layer in ("attn.proj", "mlp.fc1", "mlp.fc2")]
BRANCHES = [f"{layer}.lnlora" for layer in ("patch_embed.proj", *LAYERS)]
BRANCHES += [f"blocks.{i}.attn.qkv.lnlora.{part}" for i in range(2) for part in "qkv"]
LNLORA = {f"{branch}.{tensor}" for branch in BRANCHES for tensor in ("norm.weight", "norm.bias", "A", "B")}
LORA = {name for name in LNLORA if ".norm." not in name}
HEAD_LNLORA = {f"head.lnlora.{tensor}" for tensor in ("norm.weight", "norm.bias", "A", "B")}


def of_block(number: int, branches: set[str]) -> set[str]:
    """Those of one block, and of the patch embedding."""
    return {name for name in branches if name.startswith((f"blocks.{number}.", "patch_embed."))}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"finetune": "fulllora"}, LNLORA | HEAD),
        ({"finetune": "fulllora", "head": "frozen"}, LNLORA),
        ({"finetune": "fulllora", "head": "adapted"}, LNLORA | HEAD_LNLORA),
        ({"finetune": "lora", "head": "frozen"}, LORA),
        ({"finetune": "lora", "head": "adapted"}, LORA | {"head.lnlora.A", "head.lnlora.B"}),
        ({"finetune": "lora", "head": "trained"}, LORA | HEAD),
        ({"train_norms": True}, LNLORA | NORMS | HEAD),
        ({"finetune": "lora", "head": "frozen", "train_norms": True, "blocks": [1]}, of_block(1, LORA) | NORMS),
        ({"blocks": [0], "head": "adapted"}, of_block(0, LNLORA) | HEAD_LNLORA),
        ({"finetune": "full"}, BACKBONE),
        ({"finetune": "head"}, HEAD),
        ({"finetune": "layernorm"}, NORMS | HEAD),
        ({"finetune": "layernorm", "head": "frozen"}, NORMS),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_exactly_these_train(settings: dict, expected: set[str]) -> None:
    model = stir(tiny(**settings))
    assert set(model.trainable()) == expected
    assert {n for n, p in model.backbone.named_parameters() if p.requires_grad} == expected
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    F.cross_entropy(model(images()), torch.arange(CLASSES)).backward()
    optimizer.step()
    changed = {name for name, value in model.backbone.state_dict().items() if not torch.equal(value, before[name])}
    idle = {
        name for name in expected if name.endswith("lnlora.k.norm.bias")
    }  # a constant in every key: softmax is blind
    assert changed | idle == expected
    assert model.report.share == sum(p.numel() for p in model.trainable().values()) / sum(
        before[name].numel() for name in BACKBONE
    )


@pytest.mark.parametrize("family", ["aimv2_swiglu", "eva_rope_sapiens2"])
def test_an_rmsnorm_trains_as_a_layernorm_does(family: str) -> None:
    norms = {name for name, _ in tiny(family).backbone.named_parameters() if "norm" in name and ".lnlora." not in name}
    assert len(norms) >= 5
    assert set(tiny(family, finetune="layernorm").trainable()) == norms | HEAD


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("vit_base_patch16_224.augreg2_in21k_ft_in1k", 23, 25),
        ("vit_large_patch16_224.augreg_in21k_ft_in1k", 31, 33),
        ("vit_huge_patch14_clip_224.laion2b_ft_in12k_in1k", 39, 41),
    ],
)
@pytest.mark.parametrize("num_classes", [None, 10], ids=["own classes", "new head"])
def test_the_rank_is_the_largest_within_the_budget(name: str, least: int, most: int, num_classes: int | None) -> None:
    with torch.device("meta"):
        model = create_model(name, num_classes=num_classes)
        above = create_model(name, num_classes=num_classes, rank=model.spec.rank + 1)
    assert least <= model.spec.rank <= most
    for one in (model, above):
        trained = sum(p.numel() for p in one.parameters() if p.requires_grad)
        backbone = sum(p.numel() for n, p in one.backbone.named_parameters() if ".lnlora." not in n)
        assert one.report.share == trained / backbone
    assert model.report.share <= 0.05 < above.report.share
    heads = {name for name in model.trainable() if name.startswith("head.")}
    assert heads == (set() if num_classes is None else HEAD)
    assert len(branches(model)) == 1 + 6 * len(model.backbone.blocks)


@pytest.mark.parametrize(("settings", "layers"), [({}, 12), ({"blocks": range(6, 12)}, 6), ({"train_norms": True}, 12)])
def test_the_rank_fills_the_budget_whatever_has_branches(settings: dict, layers: int) -> None:
    """At 4.99 % the norms are what makes the rank 19 instead of 20."""
    settings = {"pretrained": False, **settings}
    with torch.device("meta"):
        model = create_model("vit_base_patch16_224", trainable_fraction=0.0499, **settings)
        above = create_model("vit_base_patch16_224", rank=model.spec.rank + 1, **settings)
    assert len(branches(model)) == 1 + 6 * layers
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    backbone = sum(p.numel() for n, p in model.backbone.named_parameters() if ".lnlora." not in n)
    assert model.report.share == trained / backbone <= 0.0499 < above.report.share


def test_the_head_counts_towards_the_budget() -> None:
    with torch.device("meta"):
        frozen, trained, adapted = (
            create_model("vit_base_patch16_224", pretrained=False, num_classes=3000, head=head)
            for head in ("frozen", "trained", "adapted")
        )
    assert trained.spec.rank < adapted.spec.rank < frozen.spec.rank
    assert max(model.report.share for model in (frozen, trained, adapted)) <= 0.05


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"rank": None, "trainable_fraction": 0.01},
            r"adapter.trainable_fraction: must be at least 0\.\d+ for .*, got 0.01; or set adapter.rank=1$",
        ),
        ({"rank": 0}, r"adapter.rank: .*greater than or equal to 1 \(got 0\)"),
        ({"finetune": "lroa"}, "finetune: 'lroa' is unknown; known: fulllora, lora"),
        ({"head": "forzen"}, r"adapter.head: .*'auto', 'frozen', 'trained' or 'adapted' \(got 'forzen'\)"),
        ({"qkv": "seperate"}, r"adapter.qkv: .*'separate' or 'shared' \(got 'seperate'\)"),
        ({"precision": "bfloat16"}, r"model.precision: .*'fp32' or 'bf16' \(got 'bfloat16'\)"),
        ({"finetune": "full", "head": "frozen"}, "adapter.head: frozen contradicts finetune: full"),
        ({"finetune": "head", "head": "adapted"}, "adapter.head: adapted contradicts finetune: head"),
        ({"finetune": "layernorm", "head": "adapted"}, "adapter.head: adapted needs branches"),
        ({"blocks": []}, "adapter.blocks: must have at least one block, got none; null is for all"),
        ({"blocks": [-1]}, r"adapter.blocks.0: .*greater than or equal to 0 \(got -1\)"),
        ({"blocks": [1, 0, 1]}, "adapter.blocks: must not repeat a block, got 1 twice"),
        ({"blocks": [0, 2]}, "adapter.blocks: must be from 0 to 1, the blocks of vit_tiny_patch16_224, got 2"),
        (
            {"blocks": [0], "components": ["reduction"]},
            "adapter.components: must include a component of .*got reduction",
        ),
        *(
            ({"finetune": finetune, key: value}, f"adapter.{key}: .*; finetune: {finetune} has none")
            for finetune in ("full", "head", "layernorm")
            for key, value in {"blocks": [0], "train_norms": True}.items()
        ),
        ({"train_norms": True, "model_kwargs": NORMLESS}, "adapter.train_norms: vit_tiny.* has no LayerNorm"),
        ({"finetune": "layernorm", "model_kwargs": NORMLESS}, "finetune: layernorm has nothing to train in vit_tiny"),
    ],
)
def test_contradictions_are_refused(settings: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        tiny(**settings)


def test_alpha_scales_the_branch_and_is_the_rank_unless_given() -> None:
    x = images(dtype=torch.float64)
    plain = stir(tiny(head="frozen")).double()
    assert plain.spec.alpha == plain.spec.rank
    same = stir(tiny(head="frozen", alpha=6.0)).double()
    with torch.no_grad():
        for name, parameter in same.trainable().items():
            if name.endswith("B"):
                parameter.div_(2)
    torch.testing.assert_close(plain(x), same(x), rtol=0, atol=1e-12)


def test_the_start_depends_on_the_seed_alone() -> None:
    def state(**settings: int) -> dict[str, torch.Tensor]:
        torch.rand(3)
        return tiny(**settings).state_dict()

    one, again, other = state(seed=1), state(seed=1), state(seed=2)
    assert all(torch.equal(value, again[name]) for name, value in one.items())
    for name in ("blocks.0.attn.qkv.lnlora.q.A", "blocks.0.attn.qkv.weight", "head.weight"):
        assert not torch.equal(one[f"backbone.{name}"], other[f"backbone.{name}"])
    a = [value for name, value in one.items() if name.endswith(".A")]
    for i, left in enumerate(a):
        assert left.abs().max() <= left.shape[1] ** -0.5
        assert left.abs().max() > 0.9 * left.shape[1] ** -0.5
        assert not any(torch.equal(left, right) for right in a[i + 1 :])
