"""`train.py --profile N`: a trace of N batches, and the training goes on."""

import gzip
import json
from pathlib import Path

import pytest

from tests.door.runs import TRAIN, make_config
from tests.ranks import RankServer


def test_a_trace_of_some_batches(rank_server: RankServer, tmp_path: Path) -> None:
    command = ["--config", make_config(tmp_path), f"run.output_dir={tmp_path}/out", "optim.epochs=2"]
    done = rank_server.launch(TRAIN, *command, "--profile", "2", ranks=2, cwd=tmp_path).wait()
    assert done.returncode == 0, done.stderr
    assert f"wrote a trace of 2 batches to {tmp_path}/out/profile" in done.stderr
    (file,) = (tmp_path / "out" / "profile").iterdir()
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    named = [event["name"] for event in events if event.get("ph") == "X"]
    assert [name for name in named if name.startswith("ProfilerStep")] == ["ProfilerStep#3", "ProfilerStep#4"]
    assert sum(name == "aten::scaled_dot_product_attention" for name in named) == 2 * 2, "two blocks, one forward pass"
    assert (tmp_path / "out" / "adapter" / "adapter.json").exists()


@pytest.mark.parametrize("count", ["-1", "few"])
def test_a_bad_number_is_refused(rank_server: RankServer, tmp_path: Path, count: str) -> None:
    done = rank_server.launch(TRAIN, "--config", tmp_path / "none.yaml", "--profile", count).wait()
    assert done.returncode == 2
    assert "--profile" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
