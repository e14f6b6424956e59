"""What a killed run leaves in MLflow and in the output folder, and what the next start makes of it."""

import json
import os
import re
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from mlflow import MlflowClient

from fulllora_dist.config.schema import Config
from fulllora_dist.tracking import mlflow_store
from fulllora_dist.tracking.mlflow_run import MlflowRun
from fulllora_dist.tracking.mlflow_store import first_use_alone
from fulllora_dist.tracking.outbox import Outbox
from fulllora_dist.tracking.run import Tracker
from fulllora_dist.tracking.spool import Dropped


def _config(folder: Path) -> Config:
    return Config.model_validate(
        {
            "model": {"backbone": "vit_tiny_patch16_224"},
            "threat": {"eps": "8/255"},
            "method": "standard",
            "data": {"train": "shards"},
            "run": {"output_dir": str(folder / "run")},
            "tracking": {"uri": f"sqlite:///{folder}/mlflow.db"},
        }
    )


@pytest.fixture
def config(tmp_path: Path, database: Path) -> Config:
    (tmp_path / "run").mkdir()
    shutil.copy(database, tmp_path)
    return _config(tmp_path)


def _runs(config: Config) -> dict[str, str]:
    client = MlflowClient(config.tracking.uri)
    found = client.search_runs([client.get_experiment_by_name(config.tracking.experiment_name).experiment_id])
    return {run.info.run_id: run.info.status for run in found}


def _points(config: Config, run_id: str | None, name: str) -> list[tuple[int, float]]:
    history = MlflowClient(config.tracking.uri).get_metric_history(run_id, name)
    return sorted((point.step, point.value) for point in history)


def _killed(work: Callable[[], object]) -> None:
    child = os.fork()
    if child == 0:
        try:
            work()
            os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def _sent(config: Config, run_id: str | None = None, step: int = 0, then: Callable[[Tracker], object] = id) -> None:
    """A start that has sent what it may, does `then` and is killed."""

    def work() -> None:
        tracker = Tracker(config.tracked_run(), active=True, run_id=run_id, step=step)
        assert tracker.settle()
        then(tracker)

    _killed(work)


def test_a_killed_run_is_mended_by_the_next(config: Config) -> None:
    """Before its first checkpoint the run is known by a file; later by that; its status is that of the last start."""
    _killed(lambda: Tracker(config.tracked_run(), active=True))  # MLflow may or may not have heard of it
    _sent(config)
    ((run_id, status),) = _runs(config).items()
    assert status == "RUNNING"
    second = Tracker(config.tracked_run(), active=True)  # no checkpoint yet
    assert second.run_id == run_id
    second.log({"train/loss": 1.0}, 1)
    second.commit(1)
    second.finish("KILLED")
    assert _runs(config) == {run_id: "KILLED"}

    _sent(config, run_id, 1)
    assert _runs(config) == {run_id: "RUNNING"}
    third = Tracker(config.tracked_run(), active=True, run_id=run_id, step=1, hosts=["a", "a", "b"])
    third.finish("FINISHED")
    assert _runs(config) == {run_id: "FINISHED"}
    tags = MlflowClient(config.tracking.uri).get_run(run_id).data.tags
    assert tags["restart/5/world_size"] == "3"
    assert tags["restart/5/hosts"] == "a, b"
    assert tags["restart/5/began_at_batch"] == "1"

    # its checkpoints are lost, so that it begins anew: what was sent stays with the old one, which says how it ended
    _sent(config, run_id, 1)
    anew = Tracker(config.tracked_run(), active=True)
    anew.settle()
    assert anew.run_id != run_id
    assert _runs(config) == {run_id: "FAILED", anew.run_id: "RUNNING"}
    anew.finish("FINISHED")


def test_what_a_killed_run_has_not_sent_is_sent_by_the_next(config: Config) -> None:
    """Metrics that a checkpoint covers, whether or not MLflow had heard of the run; those after it are made again."""

    def unsent(tracker: Tracker) -> None:
        for step in (1, 2, 3):
            tracker.log({"train/loss": float(step)}, step)

    _killed(lambda: unsent(Tracker(config.tracked_run(), active=True)))
    second = Tracker(config.tracked_run(), active=True, step=2)  # its checkpoint, which does not know MLflow's id
    second.log({"train/loss": 30.0}, 3)
    second.finish("KILLED")
    assert len(_runs(config)) == 1
    assert _points(config, second.run_id, "train/loss") == [(1, 1.0), (2, 2.0)], "no checkpoint covers the third"

    # the answer to the request that made the run was lost, or the file
    os.unlink(Path(config.run.output_dir, "tracking", "sent.json"))
    third = Tracker(config.tracked_run(), active=True, run_id=second.run_id, step=3)
    third.finish("KILLED")
    assert third.run_id == second.run_id
    assert _points(config, third.run_id, "train/loss") == [(1, 1.0), (2, 2.0), (3, 30.0)], "sent again, none doubled"


def test_the_run_is_found_whose_making_was_not_heard_of(config: Config) -> None:
    tracker = Tracker(config.tracked_run(), active=True)
    tracker.finish("KILLED")
    path = Path(config.run.output_dir, "tracking", "sent.json")
    noted = json.loads(path.read_text())
    path.write_text(json.dumps({"key": noted["key"]}))
    again = Tracker(config.tracked_run(), active=True)
    again.finish("FINISHED")
    assert _runs(config) == {tracker.run_id: "FINISHED"}


def test_steps_that_are_made_again_are_not_doubled(config: Config) -> None:
    """A final evaluation that is repeated, and steps after a checkpoint that was lost: the same values are the same
    metrics, others are further ones."""
    first = Tracker(config.tracked_run(), active=True)
    for step in (1, 2, 3):
        first.log({"train/loss": float(step), "train/accuracy": 0.5}, step)
    first.log({"eval/clean": 0.75}, 3)
    first.commit(3)
    first.finish("FINISHED")
    written = Path(config.run.output_dir, "metrics.jsonl").read_bytes()

    again = Tracker(
        config.tracked_run(), active=True, run_id=first.run_id, step=1
    )  # the checkpoint of batch 3 is damaged
    assert len(list(again.lines())) == 1
    for step in (2, 3):
        again.log({"train/loss": float(step), "train/accuracy": 0.5}, step)
    again.log({"eval/clean": 0.75}, 3)
    again.commit(3)
    again.finish("FINISHED")
    assert Path(config.run.output_dir, "metrics.jsonl").read_bytes() == written
    assert _points(config, first.run_id, "train/loss") == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert _points(config, first.run_id, "eval/clean") == [(3, 0.75)]

    other = Tracker(config.tracked_run(), active=True, run_id=first.run_id, step=3)
    other.log({"eval/clean": 0.5}, 3)  # evaluated otherwise
    other.commit(3)
    other.finish("FINISHED")
    assert _points(config, first.run_id, "eval/clean") == [(3, 0.5), (3, 0.75)]
    client = MlflowClient(config.tracking.uri)
    assert client.get_run(first.run_id).data.metrics["eval/clean"] == 0.5, "the newest is what MLflow shows"


def test_a_run_that_goes_back(config: Config) -> None:
    """What MLflow has got stays there; what it has not got of the abandoned part never comes."""
    tracker = Tracker(config.tracked_run(), active=True)
    for step in range(1, 7):
        tracker.log({"train/loss": float(step)}, step)
        if step == 4:
            tracker.commit(4)
            assert tracker.settle()
    Path(config.run.output_dir, "occupied").mkdir()
    with pytest.raises(IsADirectoryError):
        tracker.go_back(2, "occupied")
    assert len(list(tracker.lines())) == 6, "no line is dropped that is not kept elsewhere"
    tracker.go_back(2, "before.jsonl")
    for step in range(3, 7):
        tracker.log({"train/loss": 10.0 * step}, step)
    tracker.commit(6)
    tracker.finish("FINISHED")
    kept = [json.loads(line)["step"] for line in Path(config.run.output_dir, "before.jsonl").read_text().splitlines()]
    assert kept == [3, 4, 5, 6]
    assert [line["train/loss"] for line in tracker.lines()] == [1.0, 2.0, 30.0, 40.0, 50.0, 60.0]
    sent_before, after = [(s, float(s)) for s in (1, 2, 3, 4)], [(s, 10.0 * s) for s in (3, 4, 5, 6)]
    assert _points(config, tracker.run_id, "train/loss") == sorted(sent_before + after)


def test_lines_that_are_under_way_when_training_goes_back(tmp_path: Path) -> None:
    """Made again with the same values, they are the same metrics; and no later line is skipped."""
    outbox = Outbox(str(tmp_path))
    outbox.begin(None, 0)
    for step in (1, 2, 3, 4):
        outbox.metrics.append({"step": step, "time": step, "train/loss": 1.0})
    outbox.cover(3)
    early = outbox.metrics.unsent(until=outbox.is_uncovered)
    assert len(early.lines) == 3

    def meanwhile(dropped: Dropped) -> None:
        assert len(dropped) == 3
        outbox.metrics.confirm(outbox.metrics.unsent(until=outbox.is_uncovered))

    outbox.cut_back(1, meanwhile)
    outbox.metrics.confirm(early)
    times = [outbox.earlier_time({"step": step, "time": 9, "train/loss": 1.0}) for step in (2, 3, 4)]
    assert times == [2, 3, None], "MLflow cannot have the fourth"
    outbox.metrics.append({"step": 2, "time": 2, "train/loss": 1.0})
    outbox.cover(2)
    assert [line["step"] for line, _ in outbox.metrics.unsent(until=outbox.is_uncovered).lines] == [1, 2]


def test_one_process_at_a_time_makes_a_store(tmp_path: Path) -> None:
    """MLflow migrates a fresh file where its client is made; two at once break it."""
    uri, lock = f"sqlite:///{tmp_path}/mlflow.db", str(tmp_path / "mlflow.db.lock")
    with first_use_alone(uri):
        child = os.fork()
        if child == 0:
            MlflowRun(uri, "e", "r", "key", None)
            os._exit(1)
        try:
            while [os.path.realpath(fd) for fd in Path(f"/proc/{child}/fd").iterdir()].count(lock) < 2:
                time.sleep(0.01)  # one it has from here
            assert list(map(str, tmp_path.iterdir())) == [lock], "it waits, and has made nothing"
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def test_a_name_that_mlflow_refuses(config: Config, capsys: pytest.CaptureFixture) -> None:
    """Its metrics stay in the file, said once; all others arrive, and so does what comes after them."""
    tracker = Tracker(config.tracked_run(), active=True)
    for step in (1, 2):
        tracker.log({"train/loss": 1.0, "train//x": 2.0, "train/accuracy": 0.5}, step)
        tracker.commit(step)
        assert tracker.settle()
    tracker.finish("FINISHED")
    assert _runs(config) == {tracker.run_id: "FINISHED"}
    assert _points(config, tracker.run_id, "train/loss") == [(1, 1.0), (2, 1.0)]
    assert _points(config, tracker.run_id, "train/accuracy") == [(1, 0.5), (2, 0.5)]
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "train//x" in line]
    assert "rejects the metric 'train//x'" in line
    assert re.search(r"; it is only in \S+/metrics\.jsonl$", line)


def test_a_run_in_mlflows_bin_gets_everything_once_it_is_taken_out(config: Config) -> None:
    """MLflow refuses them with the same code as a bad name."""
    client = MlflowClient(config.tracking.uri)
    tracker = Tracker(config.tracked_run(), active=True)
    assert tracker.settle()
    client.delete_run(tracker.run_id)
    tracker.log({"train/loss": float("nan"), "train/norm": float("-inf")}, 1)  # tags, no metrics
    assert not tracker.settle(0.5)
    tracker.log({"train/loss": 1.0}, 2)
    tracker.commit(2)
    assert not tracker.settle(0.5)
    client.restore_run(tracker.run_id)
    tracker.finish("FINISHED")
    found = client.get_run(tracker.run_id).data
    assert found.tags["nonfinite/train/loss"] == "nan at batch 1"
    assert found.tags["nonfinite/train/norm"] == "-inf at batch 1"
    assert found.metrics == {"train/loss": 1.0}
    assert _points(config, tracker.run_id, "train/loss") == [(2, 1.0)]


def test_a_run_that_fails_shows_its_last_points(config: Config) -> None:
    """No checkpoint covers them, so that they may be made again: a file has them."""
    tracker = Tracker(config.tracked_run(), active=True)
    for step in (1, 2, 3):
        tracker.log({"train/loss": 10.0**step}, step)
    tracker.commit(1)
    tracker.finish("FAILED")
    assert _points(config, tracker.run_id, "train/loss") == [(1, 10.0)]
    file = MlflowClient(config.tracking.uri).download_artifacts(tracker.run_id, "metrics_at_failure.jsonl")
    kept = [json.loads(line) for line in Path(file).read_text().splitlines()]
    assert [(line["step"], line["train/loss"]) for line in kept] == [(2, 100.0), (3, 1000.0)]


def test_a_tracker_decides_how_often_mlflow_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that makes a run must not be sent twice, whoever else of the process asks for more."""
    name = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
    for asked, expected in (([2], "2"), ([0, 2], "0"), ([2, 0], "0")):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(mlflow_store, "_retries", None)
        for retries in asked:
            mlflow_store.set_defaults(retries)
        assert os.environ[name] == expected
    monkeypatch.setenv(name, "5")
    mlflow_store.set_defaults(0)
    assert os.environ[name] == "5", "its user's"


def test_a_signal_leaves_no_time_for_images(config: Config) -> None:
    tracker = Tracker(config.tracked_run(), active=True)
    going_on, drawn = threading.Event(), []

    def draw(name: str) -> Figure:
        going_on.wait(3)
        drawn.append(name)
        return Figure()

    tracker.figure("a", lambda: draw("a"))
    tracker.figure("b", lambda: draw("b"))
    tracker.finish("KILLED")
    assert not drawn, "it waits for none"
    going_on.set()
    tracker._drawing.shutdown()
    assert drawn == ["a"]


def test_a_disk_that_takes_half_a_line(config: Config, capsys: pytest.CaptureFixture) -> None:
    settings = config.tracking.model_copy(update={"enabled": False})
    tracker = Tracker(config.model_copy(update={"tracking": settings}).tracked_run(), active=True)
    tracker.log({"train/loss": 1.0}, 1)
    path = Path(config.run.output_dir, "metrics.jsonl")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, limits[1]))
    try:
        for step in (2, 3):
            tracker.log({"train/loss": 1.0}, step)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    tracker.log({"train/loss": 1.0}, 4)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]
    assert capsys.readouterr().err.count("kept in memory until there is space") == 1, "said once"
