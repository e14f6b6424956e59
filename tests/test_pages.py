"""The Python of docs/evaluation.md and docs/registry.md runs, block after block, with tiny models."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

import fulllora_dist as fd
from fulllora_dist.data.shards.make import make_shards
from tests.tiny import SIDE, stir, tiny

DOCS = Path(__file__).parents[1] / "docs"
CLASSES = ("cat", "dog")


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


def model(seed: int) -> fd.AdaptedModel:
    return stir(tiny(num_classes=len(CLASSES)), seed)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    for name in CLASSES:
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(3):
            pixels = torch.randint(0, 256, (SIDE, SIDE, 3), dtype=torch.uint8, generator=generator).numpy()
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{i}.png")
    make_shards(tmp_path / "pictures", tmp_path / "shards" / "val", progress=False)
    return tmp_path


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(6, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)), torch.arange(6) % 2


@pytest.mark.long  # APGD in three norms
def test_evaluation(here: Path) -> None:
    fd.save_adapter(model(1), here / "runs" / "large" / "adapter")
    x, y = pair()
    loader = DataLoader(TensorDataset(x, y), batch_size=3)
    names: dict[str, Any] = {"fd": fd, "x": x, "y": y, "loader": loader, "other_model": model(2)}
    loading, several, _ = blocks("evaluation.md")  # the last one, of other libraries: tests/evaluation/test_export.py
    for block in (loading, several):
        exec(compile(block, "evaluation.md", "exec"), names)
        assert names["report"]["n"] == 6
    assert set(names["report"]["attacks"]) == {"clean", "pgd20", "transfer:b"}


def test_registry(here: Path) -> None:
    for name, seed in (("NAME", 1), ("A", 1), ("B", 2)):
        fd.save_adapter(model(seed), here / name)
    x, y = pair()
    loading, several = blocks("registry.md")
    names: dict[str, Any] = {"x": x[:3], "y": y[:3]}
    first_line = (
        loading.replace("models:/NAME@champion", "NAME").partition(', checkpoint_path="')[0].rpartition("\n")[0]
    )
    exec(compile(first_line, "registry.md", "exec"), names)
    assert torch.equal(names["model"](x), model(1).eval()(x))
    here_instead = re.sub(r"models:/(\w)@champion", r"\1", several).replace(", ...]", "]")
    exec(compile(here_instead, "registry.md", "exec"), names)
    with torch.no_grad():
        assert torch.equal(names["several"](x, adapter="linf"), names["model"](x))
