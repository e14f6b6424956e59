"""Ctrl-C: what it does and what a second one would lose, at once; and no run stays RUNNING in MLflow."""

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from shutil import copyfile

import pytest

import fulllora_dist as fd
from tests.door.runs import EVALUATE, ROOT, TRAIN, make_config, reached, runs_in
from tests.ranks import RankServer
from tests.scripts import Launched
from tests.tiny import tiny

ENDLESS = ["optim.epochs=100000", "run.checkpoint_every=20"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_config(tmp_path_factory.mktemp("interrupt"))


@pytest.fixture
def store(tmp_path: Path, database: Path) -> Path:
    return Path(copyfile(database, tmp_path / "mlflow.db"))


@pytest.fixture
def start(rank_server: RankServer, config: Path, tmp_path: Path, store: Path) -> Callable[..., Launched]:
    """A training without end in `tmp_path/out`, once its first checkpoint is there."""

    def begin(*settings: str, ranks: int = 1, until: int = 20) -> Launched:
        command = ["--config", config, f"run.output_dir={tmp_path}/out", *ENDLESS, "tracking.enabled=true",
                   f"tracking.uri=sqlite:///{store}", *settings]  # fmt: skip
        run = rank_server.launch(TRAIN, *command, ranks=ranks, cwd=config.parent)
        reached(tmp_path / "out" / "checkpoints", until)
        return run

    return begin


def wait_for(condition: Callable[[], object], what: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def status(store: Path) -> str:
    ((state, start, end),) = runs_in(store)
    assert end is None or end >= start, "no negative duration"
    return state


@pytest.mark.parametrize(
    ("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM"), (signal.SIGHUP, "SIGHUP")]
)
def test_the_first_one_stops_after_the_batch_and_saves(
    start: Callable[..., Launched], store: Path, number: signal.Signals, name: str
) -> None:
    run = start(until=40)  # that of batch 20 is known to be whole by then
    run.rank(0).send_signal(number)
    done = run.wait()
    assert done.returncode == 128 + number
    told = re.search(
        rf"\n{name}: stopping after this batch \((\d+) of 600000\), then saving a checkpoint; {name} again ends "
        r"at once and loses the (\d+) batches since the checkpoint of batch (\d+)\n",
        done.stderr,
    )
    assert told is not None, done.stderr[-2000:]
    stopping, lost, newest = map(int, told.groups())
    assert lost == stopping - 1 - newest
    (stopped,) = map(int, re.findall(r"stopped at batch (\d+) of 600000; re-run the same .* from here", done.stderr))
    assert abs(stopped - stopping) <= 1, "a batch may have ended between the signal and the line"
    assert "Traceback" not in done.stderr
    assert status(store) == "KILLED"


def test_it_is_told_at_once_and_a_second_one_ends_at_once(
    start: Callable[..., Launched], store: Path, tmp_path: Path
) -> None:
    """Rank 0 waits in a collective for a rank that is stopped, as in a step of minutes."""
    run = start(ranks=2)
    wait_for(lambda: runs_in(store), "the run in MLflow")
    run.rank(1).suspend()
    time.sleep(0.3)
    run.rank(0).send_signal(signal.SIGINT)
    wait_for(lambda: "Ctrl-C: stopping after this batch" in run.stderr(0), "the line", seconds=3)
    assert run.rank(0).is_running()
    wait_for(lambda: status(store) == "KILLED", "MLflow knows before it has ended")
    time.sleep(1.1)
    run.rank(0).send_signal(signal.SIGINT)
    wait_for(lambda: "Ctrl-C again: ending without saving; re-run the same command to resume from the checkpoint of "
             "batch " in run.stderr(0), "the second line", seconds=3)  # fmt: skip
    run.kill()
    assert status(store) == "KILLED"


def test_a_killed_run_is_continued_by_the_next_start(
    start: Callable[..., Launched], store: Path, tmp_path: Path
) -> None:
    run = start()
    wait_for(lambda: runs_in(store), "the run in MLflow")
    run.kill()
    assert status(store) == "RUNNING", "nobody could say otherwise"
    newest = max(int(path.name) for path in (tmp_path / "out" / "checkpoints").iterdir())
    again = start(until=newest + 20)
    again.rank(0).send_signal(signal.SIGTERM)
    assert again.wait().returncode == 128 + signal.SIGTERM
    assert status(store) == "KILLED", "one run, and not RUNNING"


def test_a_run_that_fails_lasts_no_negative_time(rank_server: RankServer, config: Path, store: Path) -> None:
    """The store was found late: the run began when training did."""
    began = int(time.time() * 1000)
    done = rank_server.launch(
        TRAIN, "--config", config, f"run.output_dir={store.parent}/out", "optim.lr=1e30", "run.max_nonfinite_steps=0",
        "tracking.enabled=true", f"tracking.uri=sqlite:///{store}", cwd=config.parent,
    ).wait()  # fmt: skip
    assert done.returncode == 2, done.stderr
    ((state, start, end),) = runs_in(store)
    assert state == "FAILED"
    assert end is not None
    assert began <= start <= end


def test_before_anything_is_written_it_says_so(
    rank_server: RankServer, config: Path, tmp_path: Path, unchanged: Callable
) -> None:
    """While another machine's sign of life is waited for, say."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.lock.1").write_text("{")
    with unchanged(tmp_path):
        run = rank_server.launch(TRAIN, "--config", config, f"run.output_dir={tmp_path}/out", cwd=config.parent)
        wait_for(lambda: "waiting for a sign of life" in run.stderr(), "the wait")
        run.rank(0).send_signal(signal.SIGINT)
        done = run.wait()
        assert done.returncode == 130
        assert done.stderr.splitlines()[1:] == ["interrupted: nothing was changed"]


# -- other commands ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("output", [True, False])
def test_an_evaluation_says_what_it_keeps(rank_server: RankServer, config: Path, tmp_path: Path, output: bool) -> None:
    file = tmp_path / "evaluation.json"
    command = ["--config", config, "run.output_dir=x", "--attacks", "clean,pgd100x50", "evaluation.batch_size=2"]
    run = rank_server.launch(EVALUATE, *command, *(["--output", file] if output else []), cwd=config.parent)
    if output:
        wait_for(lambda: list(tmp_path.glob("*.partial/*/rank-0.jsonl")), "finished batches")
    else:
        wait_for(lambda: "%" in run.stderr() or "evaluat" in run.stderr(), "progress")
    run.rank(0).send_signal(signal.SIGINT)
    done = run.wait()
    assert done.returncode == 130
    assert "Traceback" not in done.stderr
    line = done.stderr.strip().splitlines()[-1]
    if output:
        kept = re.fullmatch(
            rf"interrupted: (\d+) finished batches are kept in {file}.partial; re-run the same command to resume", line
        )
        assert kept is not None, line
        (partial,) = tmp_path.glob("*.partial/*/rank-0.jsonl")
        assert int(kept[1]) == sum(map(bool, partial.read_text().splitlines())) >= 1
        assert not list(tmp_path.glob("*.lock*"))
    else:
        assert line == "interrupted: nothing is kept; with --output FILE the same command would resume"
        assert not list(tmp_path.iterdir())


def test_predictions_that_are_finished_are_kept(rank_server: RankServer, config: Path, tmp_path: Path) -> None:
    fd.save_adapter(tiny(num_classes=3), str(tmp_path / "adapter"))
    (tmp_path / "many").mkdir()
    for i in range(3000):
        os.link(config.parent / "images" / "class0" / "0.png", tmp_path / "many" / f"{i}.png")
    output = tmp_path / "predictions.jsonl"
    command = ["predict", tmp_path / "adapter", tmp_path / "many", "--output", output, "--batch-size", "1"]
    run = rank_server.launch(ROOT / "tools" / "adapters.py", *command)
    wait_for(lambda: output.exists() and output.read_bytes().count(b"\n") > 2, "some lines")
    run.rank(0).send_signal(signal.SIGINT)
    done = run.wait()
    assert done.returncode == 130, done.stderr
    line = f"interrupted: finished lines are kept in {output}; re-run the same command to resume"
    assert line in done.stderr
    assert 2 < output.read_bytes().count(b"\n") < 3000


@pytest.mark.parametrize("workers", ["1", "2"])
def test_shards_that_are_finished_are_kept(rank_server: RankServer, config: Path, tmp_path: Path, workers: str) -> None:
    many = tmp_path / "images"
    for label in range(3):
        (many / f"class{label}").mkdir(parents=True)
        (source,) = (config.parent / "images" / f"class{label}").glob("0.png")
        for i in range(400):
            os.link(source, many / f"class{label}" / f"{i}.png")
    shards = tmp_path / "shards"
    command = [many, shards, "--samples-per-shard", "20", "--workers", workers]
    run = rank_server.launch(ROOT / "tools" / "make_shards.py", *command)
    wait_for(lambda: len(list(shards.glob("*.tar"))) > 2, "some shards")
    run.rank(0).send_signal(signal.SIGINT)
    done = run.wait()
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    assert f"interrupted: what is finished is kept in {shards}; re-run the same command to resume" in done.stderr
    kept = {path.name: path.stat().st_mtime_ns for path in shards.glob("*.tar")}
    assert 2 < len(kept) < 60
    assert rank_server.launch(ROOT / "tools" / "make_shards.py", *command).wait().returncode == 0
    now = {path.name: path.stat().st_mtime_ns for path in shards.glob("*.tar")}
    assert len(now) == 60
    assert kept.items() <= now.items(), "those were not made again"
