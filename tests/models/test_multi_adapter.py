"""Several adapters on one backbone against each adapter loaded alone."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import fulllora_dist as fd
from fulllora_dist.core.errors import UserError
from tests.tiny import ARCHITECTURE, CLASSES, FAMILIES, SIDE, images, roughen, stir, tiny

OTHERS: list[dict[str, Any]] = [
    {"rank": 2, "components": ("q", "v", "fc2", "patch_embed")},
    {"finetune": "lora", "rank": 5, "qkv": "shared", "head": "adapted"},
    {"finetune": "layernorm"},
    {"finetune": "head"},
    {"rank": 3, "blocks": [1], "train_norms": True},
]


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., str]:
    """saved(stirred, **settings) -> folder of an adapter that was stirred with that seed."""

    def save(stirred: int, **settings: Any) -> str:
        folder = str(tmp_path / f"{stirred}")
        fd.save_adapter(stir(tiny(**settings), stirred), folder)
        return folder

    return save


def bare(**settings: Any) -> fd.AdaptedModel:
    return tiny(finetune="head", **settings)


def scores(model: torch.nn.Module, x: Tensor, *choice: Any) -> Tensor:
    with torch.no_grad():
        return model(x, *choice)


def test_each_sample_has_its_own(saved: Callable[..., str]) -> None:
    """Other ranks, placements, heads and norms side by side."""
    folders = {f"a{i}": saved(i, **settings) for i, settings in enumerate(OTHERS)}
    several = fd.MultiAdapter(folders).eval()
    alone = {name: fd.load(folder) for name, folder in folders.items()} | {None: bare()}
    x = images(10)
    for name, model in alone.items():
        assert torch.equal(scores(several, x, name), scores(model, x)), name
        assert torch.equal(scores(several, x, [name] * 10), scores(model, x)), name
    choice = ["a3", None, "a0", "a1", "a4", "a0", "a1", None, "a3", "a2"]
    mixed = scores(several, x, choice)
    for i, name in enumerate(choice):
        torch.testing.assert_close(mixed[i], scores(alone[name], x[i : i + 1])[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(scores(several, x), scores(alone[None], x)), "what was chosen last is forgotten"


QUICK = ("vit", "swin")


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in QUICK else pytest.mark.long) for name in FAMILIES]
)
def test_every_family(family: str, saved: Callable[..., str]) -> None:
    """Windows, tokens and layouts of their own."""
    folders = {name: saved(i, family=family, rank=rank) for i, (name, rank) in enumerate({"a": 2, "b": 3}.items())}
    several = fd.MultiAdapter(folders).eval()
    alone = {name: fd.load(folder) for name, folder in folders.items()}
    x = images(5)
    choice = ["b", None, "a", "b", "a"]
    mixed = scores(several, x, choice)
    apart = {name: scores(model, x) for name, model in (alone | {None: bare(family=family)}).items()}
    for i, name in enumerate(choice):
        torch.testing.assert_close(mixed[i], apart[name][i], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(apart["a"], apart["b"], atol=1e-3)
    for name, model in alone.items():
        assert torch.equal(scores(several, x, name), scores(model, x))


def test_attacked_as_each_alone(saved: Callable[..., str]) -> None:
    folders = {name: saved(i) for i, name in enumerate("ab")}
    several = fd.MultiAdapter(folders).double().eval()
    x, y = images(6, dtype=torch.float64), torch.arange(6) % CLASSES
    choice = ["a", "b", "b", "a", "a", "b"]
    together = fd.pgd(several.select(choice), x, y, eps=8 / 255, steps=3, step_size=2 / 255, random_start=False)
    before = {name: tensor.clone() for name, tensor in several.state_dict().items()}
    for name in "ab":
        own = [i for i, one in enumerate(choice) if one == name]
        alone = fd.pgd(
            fd.load(folders[name]).double(), x[own], y[own], eps=8 / 255, steps=3, step_size=2 / 255, random_start=False
        )
        torch.testing.assert_close(together[own], alone, rtol=0, atol=1e-9)
    assert all(torch.equal(tensor, before[name]) for name, tensor in several.state_dict().items())


def test_calls_in_threads_do_not_meet(saved: Callable[..., str]) -> None:
    """Each waits in the midst of its pass until the other is there, too."""
    folders = {name: saved(i) for i, name in enumerate("ab")}
    several, x = fd.MultiAdapter(folders).eval(), images()
    alone = {name: scores(several, x, name) for name in "ab"}
    both = threading.Barrier(2, timeout=60)

    def meet(*_: Any) -> None:
        both.wait()

    several.get_submodule("_base.backbone.blocks.0").register_forward_hook(meet)
    with ThreadPoolExecutor(2) as threads:
        together = dict(zip("ab", threads.map(lambda name: scores(several, x, name), "ab"), strict=True))
    assert all(torch.equal(together[name], alone[name]) for name in "ab")


def test_under_autocast_layers_give_the_dtype_that_they_give_one_adapter(saved: Callable[..., str]) -> None:
    several = fd.MultiAdapter({name: saved(i) for i, name in enumerate("ab")}).eval()
    seen: dict[str, torch.dtype] = {}
    for path, module in several.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.register_forward_hook(lambda _, __, y, path=path: seen.__setitem__(path, y.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        scores(several, images(), "a")
        alone = dict(seen)
        scores(several, images(), ["b", "a", None, "a"])
    assert seen == alone
    assert set(alone.values()) == {torch.bfloat16}


@pytest.mark.parametrize("given", [False, True], ids=["built", "given"])
def test_bf16_is_that_of_each_adapter_alone(given: bool, tmp_path: Path) -> None:
    """LayerNorms are not at 1 and 0, which bf16 would hold exactly."""
    save_file(roughen(bare()).backbone.state_dict(), str(tmp_path / "weights.safetensors"))

    def model(**settings: Any) -> fd.AdaptedModel:
        return fd.create_model(
            "vit_tiny_patch16_224.augreg_in21k",
            checkpoint_path=str(tmp_path / "weights.safetensors"),
            num_classes=CLASSES,
            image_size=SIDE,
            model_kwargs=ARCHITECTURE,
            **settings,
        )

    folders = {name: str(tmp_path / name) for name in "abndt"}
    for i, folder in enumerate(folders.values()):
        fd.save_adapter(stir(model(**OTHERS[i]), i), folder)
    bare_one = model(finetune="head", precision="bf16")
    backbone = fd.unload(model(finetune="head")) if given else None
    several = fd.MultiAdapter(folders, precision="bf16", backbone=backbone).eval()
    blocks = several.get_submodule("_base.backbone.blocks")
    assert {p.dtype for n, p in blocks.named_parameters() if ".lnlora." not in n} == {torch.bfloat16}
    x = images(10)
    apart = {name: scores(fd.load(folder, precision="bf16"), x) for name, folder in folders.items()}
    apart[None] = scores(bare_one, x)
    for name, expected in apart.items():
        found = scores(several, x, name)
        if name in ("n", "t"):  # train LayerNorms, and compute under autocast when alone
            assert (found - expected).norm() < 0.02 * expected.norm()
        else:
            assert torch.equal(found, expected), name
    choice = ["d", None, "a", "b", "t", "a", "b", None, "d", "n"]
    mixed = scores(several, x, choice)
    for i, name in enumerate(choice):
        assert (mixed[i] - apart[name][i]).norm() < 0.03 * apart[name].norm() / 10**0.5


def test_a_backbone_that_is_given_stays_in_fp32_where_an_adapter_is_refused(saved: Callable[..., str]) -> None:
    module = bare().backbone
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(UserError, match=r"has no adapter\.json"):
        fd.MultiAdapter({"a": saved(0), "b": "nowhere"}, backbone=module, precision="bf16")
    after = module.state_dict()
    assert all(after[n].dtype == t.dtype and torch.equal(after[n], t) for n, t in before.items())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another size": ({"image_size": 32}, "must have the backbone's image_size 16, got 32"),
    "another family": (
        {"family": "swin"},
        "must have the backbone's name vit_tiny.*, got swin_tiny_patch4_window7_224",
    ),
    "other weights": ({"seed": 5}, "must have the backbone's sha256"),
    "another normaliser": ({"mean": (0.1, 0.2, 0.3)}, "must have the backbone's mean"),
    "a whole model": (
        {"finetune": "full"},
        r"is a whole model \(finetune: full\) and cannot share a backbone; load it alone",
    ),
}


def test_what_cannot_share(saved: Callable[..., str]) -> None:
    several = fd.MultiAdapter({"a": saved(0)})
    for i, (settings, words) in enumerate(REFUSED.values()):
        with pytest.raises(UserError, match=words):
            several.add("b", saved(i + 1, **settings))
    with pytest.raises(UserError, match="there is no 'b'; there are: a"):
        several(images(), "b")
    with pytest.raises(UserError, match="must be one name per sample, got 2 names for 4 samples"):
        several(images(4), ["a", None])
    with pytest.raises(UserError, match="the name 'a' is taken"):
        several.add("a", saved(9))
    several.add("b", saved(10, rank=1))
    several.remove("a")
    assert several.adapters == ("b",)
    assert not [name for name in several.state_dict() if ".a." in name], "its memory is given back"
    assert torch.equal(scores(several.eval(), images(), "b"), scores(fd.load(saved(10, rank=1)), images()))
