"""The adapter of a run becomes a version: by the run itself, or later by the tool."""

import dataclasses
import hashlib
import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from fulllora_dist.config.schema import Config
from fulllora_dist.registry.publish_run import publish_run
from fulllora_dist.registry.registry import Registry
from tests.registry.conftest import evaluation, right
from tests.registry.test_tools import call

SETTINGS = "data:\n  train: https://h/digits?***\n"
SIGNED = SETTINGS.replace("***", "sig=dead")


@pytest.fixture
def config(sqlite: str, adapter: Callable[..., str], tmp_path: Path, request: pytest.FixtureRequest) -> Config:
    """Of a run that has ended, with an evaluation."""
    output = tmp_path / "my run"
    output.mkdir()
    Path(adapter(seed=30)).rename(output / "adapter")
    (output / "evaluation.json").write_text(json.dumps(evaluation(right(100))))
    (output / "config.yaml").write_text(SIGNED)
    return Config.model_validate(
        {
            "model": {"backbone": "none"},
            "data": {"train": "none"},
            "run": {"output_dir": str(output)},
            "optim": {"epochs": 1},
            "threat": {"eps": 0.1},
            "method": {"name": "fgsm_rs"},
            "tracking": {"registered_model_name": request.node.name, "uri": sqlite},
        }
    )


def run_of(registry: Registry) -> str:
    """A run that trained at commit c0ffee."""
    return registry.store.create_run(registry.store.experiment_id("runs"), tags={"git_commit": "c0ffee"}).info.run_id


def test_a_better_evaluation_stays(sqlite: str, config: Config) -> None:
    registry, name = Registry(sqlite, create=True), config.tracking.registered_model_name
    run = run_of(registry)
    said = publish_run(config.tracked_run(), SETTINGS, run)
    assert said == f"registered: models:/{name}/1; fulllora adapters promote {name}/1"
    first = registry.find(f"{config.tracking.registered_model_name}/1")
    assert first.run_id == run
    assert first.tags["git_commit"] == "c0ffee"
    assert first.tags["n"] == "200"
    better = Path(config.run.output_dir, "better.json")
    better.write_text(json.dumps(evaluation(right(200, 400))))
    call(sqlite, "publish", f"{config.run.output_dir}/adapter", "--evaluation", str(better), "--name", str(name))
    assert publish_run(config.tracked_run(), SETTINGS, run) == said
    assert registry.find(f"{config.tracking.registered_model_name}/1").tags["n"] == "400"


def test_the_command_for_later(sqlite: str, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does what the run could not."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    registry = Registry(sqlite, create=True)
    run = run_of(registry)
    away = dataclasses.replace(config.tracked_run(), uri="http://me:secret@127.0.0.1:9")
    said = publish_run(away, SETTINGS, run)
    assert said.startswith("warning: the adapter was not registered (MLflow at http://***@127.0.0.1:9: ")
    assert "secret" not in said
    command = said.partition("); to register it later: fulllora adapters ")[2]
    arguments = shlex.split(command)
    assert arguments[-2:] == ["--uri", "http://***@127.0.0.1:9"]
    call(sqlite, *arguments[:-2])
    version = registry.find(f"{config.tracking.registered_model_name}/1")
    assert version.run_id == run
    assert version.tags["git_commit"] == "c0ffee"
    assert version.tags["config_sha256"] == hashlib.sha256(SETTINGS.encode()).hexdigest()
    assert version.tags["n"] == "200"
    fetched = registry.fetch(version.address, str(tmp_path / "fetched"))
    assert Path(fetched, "config.yaml").read_text() == SETTINGS
