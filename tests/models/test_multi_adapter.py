"""Several adapters on one backbone against each adapter loaded alone."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fulllora_dist as fd
from fulllora_dist.core.errors import UserError
from tests.tiny import CLASSES, FAMILIES, images, stir, tiny

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
