"""Stores that are not there yet, slow, killed, or without artifacts of their own: every point arrives, once, and the
thread that trains never waits for one."""

import json
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from mlflow import MlflowClient
from PIL import Image

from fulllora_dist.commands.sync import sync
from fulllora_dist.config.schema import Config
from fulllora_dist.core.errors import UserError
from fulllora_dist.data.index import Index
from fulllora_dist.data.shards.make import make_shards
from fulllora_dist.distributed.comm import free_port
from fulllora_dist.tracking.run import Tracker
from fulllora_dist.tracking.summary import DatasetInfo
from tests.services.mlflow_server import MlflowServer, SlowWay
from tools import sync_tracking

NAMES = ("loss", "accuracy", "learning_rate", "skipped", "gradient_norm", "other@1")
LINES = 1500 // len(NAMES)

_calling = False  # the tracker, on the main thread
_seen: set[str] = set()  # threads that connect to a server or a database


def _audit(event: str, args: tuple) -> None:
    if event in ("socket.connect", "socket.getaddrinfo", "sqlite3.connect"):
        thread = threading.current_thread()
        if _calling or thread is not threading.main_thread():
            _seen.add(thread.name)


@contextmanager
def _watched() -> Iterator[None]:
    global _calling
    _calling = True
    try:
        yield
    finally:
        _calling = False


def _config(folder: Path, uri: str, **tracking: object) -> Config:
    (folder / "run").mkdir(exist_ok=True)
    values = {
        "model": {"backbone": "vit_tiny_patch16_224"},
        "threat": {"eps": "8/255"},
        "method": "standard",
        "data": {"train": "shards"},
        "run": {"output_dir": str(folder / "run")},
        "tracking": {"uri": uri, "flush_timeout_s": 200, **tracking},
    }
    (folder / "run" / "config.yaml").write_text(json.dumps(values))
    return Config.model_validate(values)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for name in ("cat", "dog"):
        (folder / "pictures" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / "pictures" / name / "0.png")
    make_shards(folder / "pictures", folder / "shards", samples_per_shard=2, progress=False)
    return folder / "shards"


def _log_all(tracker: Tracker, at: dict[int, Callable[[], object]]) -> float:
    """1,500 metric values, a checkpoint every 25 lines; `at` is called after those. The longest call, in seconds."""
    longest = 0.0
    for step in range(1, LINES + 1):
        began = time.perf_counter()
        with _watched():
            tracker.log({f"train/{name}": step + i / 8 for i, name in enumerate(NAMES)}, step)
            if step % 25 == 0:
                tracker.commit(step)
        longest = max(longest, time.perf_counter() - began)
        if step in at:
            at[step]()
    return longest


def _check_curves(tracker: Tracker, uri: str) -> None:
    """What MLflow has is what metrics.jsonl has, with its times; nothing is missing or doubled."""
    client = MlflowClient(uri)
    lines, total = [line for line in tracker.lines() if line["step"] <= LINES], 0
    for name in NAMES:
        found = client.get_metric_history(tracker.run_id, f"train/{name.replace('@', '_')}")
        expected = [(line["step"], line[f"train/{name}"], line["time"]) for line in lines]
        assert sorted((point.step, point.value, point.timestamp) for point in found) == expected
        total += len(found)
    assert total == 1500


@pytest.mark.long
def test_a_server_that_comes_late_and_is_killed(
    tmp_path: Path, capsys: pytest.CaptureFixture, record_property: Callable
) -> None:
    sys.addaudithook(_audit)  # for good
    with MlflowServer(tmp_path / "server") as server:
        with _watched():
            tracker = Tracker(_config(tmp_path, server.uri).tracked_run(), active=True)

        def come() -> None:
            server.start()
            assert tracker.settle(60)

        longest = _log_all(tracker, {100: come, 150: server.kill, 225: server.start})
        tracker.log({"train/loss": float("nan"), "train/skipped": 1.0}, LINES + 1)  # no checkpoint covers this batch
        began = time.perf_counter()
        with _watched():
            tracker.finish("FINISHED")
        record_property("longest call, ms", 1000 * longest)
        record_property("end, s", time.perf_counter() - began)
        assert "tracking" in _seen, "or the watch sees nothing"
        assert threading.main_thread().name not in _seen
        assert longest < 1, "local files alone"

        (*lines, bad) = tracker.lines()
        assert (bad["nonfinite"], bad["train/skipped"]) == ({"train/loss": "nan"}, 1.0)
        assert len(lines) == LINES
        _check_curves(tracker, server.uri)
        found = MlflowClient(server.uri).get_run(tracker.run_id)
        assert found.info.status == "FINISHED"
        assert found.data.tags["nonfinite/train/loss"] == f"nan at batch {LINES + 1}"
        said = capsys.readouterr().err
        assert said.count(" is unreachable (") == 2, "a line for each outage"
        assert said.count(" is reachable again") == 2


@pytest.mark.long
def test_two_seconds_for_each_answer(tmp_path: Path, record_property: Callable, capsys: pytest.CaptureFixture) -> None:
    with MlflowServer(tmp_path / "server") as server:
        server.start()
        with SlowWay(server.uri, 2.0) as slow:
            tracker = Tracker(_config(tmp_path, slow.uri).tracked_run(), active=True)
            began = time.perf_counter()
            longest = _log_all(tracker, {})
            assert time.perf_counter() - began < 2, "all is logged before the first answer"
            tracker.finish("FINISHED")
            assert slow.answers > 5
        record_property("longest call, ms", 1000 * longest)
        record_property("answers", slow.answers)
        _check_curves(tracker, server.uri)
        assert "entries to http://127.0.0.1" in capsys.readouterr().err, "the end shows that it waits, and for what"


@pytest.mark.long
@pytest.mark.parametrize("serve_artifacts", [True, False])
def test_artifacts_and_data(tmp_path: Path, shards: Path, serve_artifacts: bool) -> None:
    with MlflowServer(tmp_path / "server", serve_artifacts=serve_artifacts) as server:
        server.start()
        tracker = Tracker(_config(tmp_path, server.uri).tracked_run(), active=True)
        output = tmp_path / "run"
        (output / "adapter").mkdir()
        (output / "adapter" / "adapter.json").write_text("{}")
        index = Index.load(shards)
        for split in ("train", "held_out"):  # even where it is the same data
            tracker.data(DatasetInfo(split, str(shards), index.hash, len(index), len(index.classes)))
        tracker.artifact(str(output / "adapter"), "adapter")
        tracker.artifact(str(output / "gone.png"))
        tracker.text("seed: 0", "config.yaml")
        tracker.finish("FINISHED")

        client = MlflowClient(server.uri)
        assert {file.path for file in client.list_artifacts(tracker.run_id)} == {"adapter", "config.yaml"}
        assert [file.path for file in client.list_artifacts(tracker.run_id, "adapter")] == ["adapter/adapter.json"]
        inputs = client.get_run(tracker.run_id).inputs.dataset_inputs
        assert {(i.dataset.name, i.tags[0].value) for i in inputs} == {("train", "training"), ("held_out", "held_out")}
        for found in inputs:
            assert found.dataset.digest == index.hash[:36]
            assert json.loads(found.dataset.profile)["index"] == index.hash
            assert json.loads(found.dataset.source) == {"uri": str(shards)}


def test_what_is_left_at_the_end_is_sent_by_a_tool(
    tmp_path: Path, database: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end waits no longer than it is told to, and says what to do; and the tool does it, more than once."""
    config = _config(tmp_path, f"http://127.0.0.1:{free_port()}", flush_timeout_s=1)
    tracker = Tracker(config.tracked_run(), active=True)
    _log_all(tracker, {})
    began = time.monotonic()
    tracker.finish("FINISHED")
    assert time.monotonic() - began < 5
    said = capsys.readouterr().err
    assert "1,500 metric values and 4 other entries could not be sent" in said
    assert f"fulllora sync {config.run.output_dir}" in said

    shutil.copy(database, tmp_path)
    store = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setattr(sys, "argv", ["sync_tracking.py", config.run.output_dir, "--uri", store, "--json"])
    assert sync_tracking.main() == 0
    found = json.loads(capsys.readouterr().out)
    assert not found["left"]
    tracker._outbox.run_id = found["run_id"]
    _check_curves(tracker, store)
    assert sync(config.run.output_dir, store, 60, print) == found, "again"
    _check_curves(tracker, store)
    assert MlflowClient(store).get_run(found["run_id"]).info.status == "FINISHED"
    with pytest.raises(UserError, match=f"{tmp_path} has no tracking/; give the output folder of a run with"):
        sync(str(tmp_path), store, 60, print)
