"""`tools/gpu_check.py` without a GPU: its files, and that a part which fails costs no other."""

import importlib
import json
import os
import signal
import time
from pathlib import Path
from types import ModuleType

import pytest

from tests.ranks import RankServer

ROOT = Path(__file__).parents[1]


@pytest.mark.long
def test_each_figure_is_written_and_failures_are_recorded(rank_server: RankServer, tmp_path: Path) -> None:
    """A backbone that timm does not know fails, and with it the check."""
    command = [
        ROOT / "tools/gpu_check.py",
        "--output",
        tmp_path / "out",
        "--minutes",
        "8",
        "--arms",
        "bound,peft,fulllora",
        *("--row", "vit_tiny_patch16_224:32:2:1", "--row", "vit_tiny_patch16:32:2:1"),
    ]
    parts = ["--parts", "machine,matmul,step,nccl,zero,bf16,compile"]
    done = rank_server.launch(*command, *parts, cwd=ROOT, timeout=600).wait()
    assert done.returncode == 1, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    failed = {(line["part"], line["name"]): line["error"] for line in lines if "error" in line}
    assert failed.keys() == {("step", "step")}
    assert "with a backbone of timm, got vit_tiny_patch16:32:2:1" in failed["step", "step"]
    known = [(line["part"], line["name"]) for line in lines if line.get("ok")]
    zero = [("zero", f"ZeRO-{stage}") for stage in range(4)]
    assert known == [("nccl", "one rank"), *zero, ("bf16", "bf16 against fp32"), ("compile", "compiled attack pass")]
    steps = {line["name"]: line for line in lines if line["part"] == "step" and "error" not in line}
    assert steps.keys() == {"bound", "peft", "fulllora"}
    assert steps["fulllora"]["tflops"] > 0
    assert steps["fulllora"]["images_per_second"] == pytest.approx(2 / steps["fulllora"]["seconds"])
    table = (tmp_path / "out" / "table.md").read_text()
    assert done.stdout.strip() == table.strip()
    assert "| vit_tiny_patch16_224:32:2:1 | bound |" in table
    assert "- step, step: missing: " in table
    assert "- zero, ZeRO-3: ok, difference " in table


@pytest.fixture
def gpu_check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "tools")
    return importlib.import_module("gpu_check")


def test_a_part_that_crashes_or_hangs_is_recorded(
    gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "_LEAST_SECONDS", 0.1)
    file = tmp_path / "results.jsonl"

    def figure_and(last) -> None:
        def work(put) -> None:
            put("figure", value=1)
            last()

        return work

    gpu_check.run_part(file, "crash", figure_and(lambda: os.kill(os.getpid(), signal.SIGKILL)), 60)
    gpu_check.run_part(file, "hang", figure_and(lambda: time.sleep(60)), 1)
    gpu_check.run_part(file, "raise", figure_and(lambda: {}["key"]), 60)
    gpu_check.run_part(file, "late", figure_and(lambda: None), 0)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["part"] for line in lines if line["name"] == "figure"] == ["crash", "hang", "raise"]
    assert {line["part"]: line["error"] for line in lines if "error" in line} == {
        "crash": "the process ended with code -9",
        "hang": "stopped after 1 s: no time was left",
        "raise": "KeyError: 'key'",
        "late": "not started: no time was left",
    }


@pytest.mark.parametrize(
    ("option", "value"), [("--minutes", "0"), ("--minutes", "x"), ("--parts", "matmul,stpe"), ("--arms", "bound,ful")]
)
def test_a_wrong_option_is_refused(rank_server: RankServer, tmp_path: Path, option: str, value: str) -> None:
    done = rank_server.launch(ROOT / "tools/gpu_check.py", "--output", tmp_path / "out", option, value).wait()
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {option}")
    assert not (tmp_path / "out").exists()
