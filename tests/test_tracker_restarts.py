"""What a killed attempt leaves in MLflow and in metrics.jsonl, and what the next one makes of it."""

import json
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient

from fulllora_dist.config import Config
from fulllora_dist.tracking.run import Tracker


def _config(folder: Path) -> Config:
    return Config.model_validate(
        {
            "model": {"backbone": "vit_tiny_patch16_224"},
            "threat": {"eps": "8/255"},
            "method": "standard",
            "data": {"train": "shards"},
            "run": {"output": str(folder / "run")},
            "tracking": {"uri": f"sqlite:///{folder}/mlflow.db"},
        }
    )


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "run").mkdir()
    return _config(tmp_path)


def _runs(config: Config) -> dict[str, str]:
    client = MlflowClient(config.tracking.uri)
    found = client.search_runs([client.get_experiment_by_name(config.tracking.experiment).experiment_id])
    return {run.info.run_id: run.info.status for run in found}


def _killed(work: Callable[[], object]) -> None:
    child = os.fork()
    if child == 0:
        try:
            work()
            os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_a_killed_attempt_is_mended_by_the_next(config: Config) -> None:
    """Before its first state the run is known by a file; later by the state; its status is that of the last attempt."""
    _killed(lambda: Tracker(config, active=True))
    ((run_id, status),) = _runs(config).items()
    assert status == "RUNNING"
    second = Tracker(config, active=True)  # no state yet
    assert second.run_id == run_id
    second.log({"train/loss": 1.0}, 1)
    second.commit(1)
    second.finish("KILLED")
    assert _runs(config) == {run_id: "KILLED"}

    _killed(lambda: Tracker(config, active=True, run_id=run_id, step=1))
    assert _runs(config) == {run_id: "RUNNING"}
    third = Tracker(config, active=True, run_id=run_id, step=1)
    third.finish("FINISHED")
    assert _runs(config) == {run_id: "FINISHED"}

    # its states are lost, so that it begins anew: what was sent stays with the old one, which says how it ended
    _killed(lambda: Tracker(config, active=True, run_id=run_id, step=1))
    anew = Tracker(config, active=True)
    assert anew.run_id != run_id
    assert _runs(config) == {run_id: "FAILED", anew.run_id: "RUNNING"}


def test_a_disk_that_takes_half_a_line(config: Config, capsys: pytest.CaptureFixture) -> None:
    settings = config.tracking.model_copy(update={"enabled": False})
    tracker = Tracker(config.model_copy(update={"tracking": settings}), active=True)
    tracker.log({"train/loss": 1.0}, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (os.path.getsize(tracker._path) + 20, limits[1]))
    try:
        for step in (2, 3):
            tracker.log({"train/loss": 1.0}, step)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    tracker.log({"train/loss": 1.0}, 4)
    lines = Path(tracker._path).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    assert capsys.readouterr().err.count("points are kept in memory until there is space") == 1, "said once"
