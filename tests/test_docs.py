"""Files and names in the pages' `code` are there (`path.py:name`), and what a config's first lines say of it holds."""

import ast
import json
import re
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RUNS = [path for path in sorted((ROOT / "configs").glob("*.yaml")) if path.name != "imagenet.yaml"]
NAMED = re.compile(r"`((?:[\w.-]+/)+[\w-]+\.(?:py|yaml|md)|[\w-]+\.py(?=:))(?::([\w.]+))?`")


def named(page: Path) -> list[tuple[str, str]]:
    return sorted(set(NAMED.findall(page.read_text())))


def find(path: str) -> Path | None:
    return next((base / path for base in (ROOT, ROOT / "fulllora_dist") if (base / path).exists()), None)


@cache
def names_in(path: Path) -> set[str]:
    """Top-level names of a file, and `Class.name` of what a class defines."""

    def defined(body: list[ast.stmt]) -> set[str]:
        names: set[str] = set()
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names |= {target.id for target in targets if isinstance(target, ast.Name)}
            if isinstance(node, ast.ClassDef):
                names |= {f"{node.name}.{name}" for name in defined(node.body)}
        return names

    return defined(ast.parse(path.read_text()).body)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_is_there(page: Path) -> None:
    for path, name in named(page):
        file = find(path)
        assert file is not None, f"{page.name}: {path}"
        assert not name or name in names_in(file), f"{page.name}: {path}:{name}"


def test_the_map_names_every_room_and_twenty_changes() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    rooms = [path.parent.name for path in (ROOT / "fulllora_dist").glob("*/__init__.py")]
    assert not [room for room in rooms if f"| `{room}/` |" not in text]
    changes = text.partition("## Where do I change")[2].partition("\n## ")[0]
    assert changes.count("\n| ") >= 22  # two of them are the table's head
    assert len(named(ROOT / "docs" / "architecture.md")) > 80


def test_each_row_of_the_door_names_its_test() -> None:
    page = (ROOT / "docs" / "door.md").read_text().partition("\n## ")[2]
    rows = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith("| what goes wrong")]
    assert len(rows) > 60
    tests = [re.findall(r"`tests/door/(\w+\.py)`", row.rstrip(" |").rpartition(" | ")[2]) for row in rows]
    assert not [row for row, named in zip(rows, tests, strict=True) if not named]
    assert {name for named in tests for name in named} == {p.name for p in (ROOT / "tests/door").glob("test_*.py")}


def head(config: Path) -> str:
    """The comment that a config opens with."""
    lines = takewhile(lambda line: line.startswith("#"), config.read_text().split("\n"))
    return " ".join(line.removeprefix("#").strip() for line in lines)


@pytest.mark.parametrize("config", RUNS, ids=lambda config: config.stem)
def test_a_config_opens_with_its_command_hours_and_score(config: Path) -> None:
    opening = head(config)
    assert f" fulllora_dist/train.py --config configs/{config.name} " in opening
    assert re.search(r" Hours: .+ Score: (.*\d|not trained yet)", opening)


PASSES: dict[tuple[object, ...], object] = {}
"""Counted so far: configs of one backbone have the same."""


def once_for_a_model(count: Any) -> Any:
    def counted(model: Any, *given: int, **switches: bool) -> object:
        key = model.info.name, model.precision, *given, *sorted(switches.items())
        if key not in PASSES:
            PASSES[key] = count(model, *given, **switches)
        return PASSES[key]

    return counted


@pytest.mark.long
@pytest.mark.parametrize(
    "config", [c for c in RUNS if "counted by --dry-run" in head(c)], ids=lambda config: config.stem
)
def test_the_hours_are_those_that_are_counted(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fulllora_dist.commands import plan_counts
    from fulllora_dist.commands.plan import estimate
    from fulllora_dist.config.load import load_config

    monkeypatch.setattr(plan_counts, "count_pass", once_for_a_model(plan_counts.count_pass))
    monkeypatch.setenv("WORLD_SIZE", "8")
    counted, opening = estimate(load_config(str(config), ["data.train=/nowhere"])), head(config)
    for said in (r"[\d.]+ GPU-hours", r"[\d.]+ EFLOP", r"[\d,]+ batches", r"[\d.]+ GiB a GPU", r"micro-batch \d+"):
        (figure,) = re.findall(said, opening)
        assert figure.removesuffix(" a GPU") in counted
    assert re.search(r"\n  off \(this run\) .* in 80 GB", counted)
    fewest, again = re.findall(r"`all` takes ([\d.]+ GiB), and computes (\d+% again)", opening)[0]
    assert re.search(rf"\n  all +{fewest}, +{again}; ", counted)
    (rank,) = re.findall(r"rank (\d+)", opening)
    assert f"rank of the branches: {rank}" in counted


def test_the_cost_of_a_step_is_what_was_measured() -> None:
    """The table of docs/performance.md, from the file that the benchmark wrote."""
    page = (ROOT / "docs" / "performance.md").read_text()
    rows = sorted(
        json.loads((ROOT / "docs" / "performance_step.json").read_text())["rows"],
        key=lambda row: (row["backbone"] != "vit_tiny_patch16_224", row["steps"]),
    )
    arms = {"bound": "frozen bound", "fulllora": "FullLoRA", "peft": "peft's LoRA", "full": "full finetuning"}
    arms |= {f"{name}_compiled": f"{words}, compiled" for name, words in arms.items()}
    for name, words in arms.items():
        measured = [row["arms"][name] for row in rows]
        cells = [
            f"{one['ratio_to_bound']:.2f} ({one['cpu_s']:.2f} s, {{:.2f}} to {{:.2f}})".format(*one["cpu_s_spread"])
            for one in measured
        ]
        assert f"| {words} | {' | '.join(cells)} |" in page
    kept = " | ".join(f"{row['saved_bytes_ratio']:.2f}" for row in rows)
    assert f"| kept for backward, FullLoRA to frozen | {kept} |" in page
