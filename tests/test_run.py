"""The frame of a run: what it shows of its settings."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import mlflow
import pytest
import torch

from fulllora_dist.config import Config
from fulllora_dist.distributed.preemption import StopRequest
from fulllora_dist.distributed.ranks import Ranks
from fulllora_dist.run import Run


class Recorder:
    """An MLflow client that keeps what it is told."""

    told: ClassVar[list[Any]] = []

    def __init__(self, uri: str):
        pass

    def get_experiment_by_name(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(experiment_id="0")

    def create_run(self, experiment: str, run_name: str) -> SimpleNamespace:
        return SimpleNamespace(info=SimpleNamespace(run_id="0"))

    def __getattr__(self, name: str):
        return lambda *args: self.told.append((name, *args))


def test_a_signed_url_is_kept_for_the_next_start_and_shown_to_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(mlflow, "MlflowClient", Recorder)
    config = Config.model_validate(
        {
            "model": {"backbone": "none"},
            "data": {"train": "https://host/train?sig=swordfish"},
            "run": {"output": str(tmp_path / "run")},
            "threat": {"eps": 0.1},
            "method": {"name": "standard"},
            "optim": {"epochs": 1},
            "tracking": {"uri": "http://user:hunter2@mlflow"},
        }
    )
    run = Run(config, Ranks(0, 1, torch.device("cpu"), None), StopRequest())
    run.tracker.text(run.settings, "config.yaml")
    told, shown = str(Recorder.told), capsys.readouterr().err
    assert "('log_param', '0', 'data.train', 'https://host/train?***')" in told
    assert "'log_text'" in told
    for text in (told, shown):
        assert "https://host/train?***" in text
        assert "http://***@mlflow" in text
        assert "swordfish" not in text
        assert "hunter2" not in text
    assert "https://host/train?sig=swordfish" in (tmp_path / "run" / "config.yaml").read_text()
