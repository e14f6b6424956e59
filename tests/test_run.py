"""The frame of a run: what it shows of its settings."""

import threading
import time
from pathlib import Path

import pytest
import torch

from fulllora_dist.config.schema import Config
from fulllora_dist.distributed.comm import Comm, free_port
from fulllora_dist.distributed.signals import GracefulStop
from fulllora_dist.training.context import RunContext


def _opened(folder: Path) -> RunContext:
    config = Config.model_validate(
        {
            "model": {"backbone": "none"},
            "data": {"train": "https://host/train?sig=swordfish"},
            "run": {"output_dir": str(folder / "run")},
            "threat": {"eps": 0.1},
            "method": {"name": "standard"},
            "optim": {"epochs": 1},
            "tracking": {"uri": f"http://user:hunter2@127.0.0.1:{free_port()}", "flush_timeout_s": 0},
        }
    )
    run = RunContext(config, Comm(0, 1, torch.device("cpu"), None), GracefulStop())
    run.open()
    return run


def test_a_signed_url_is_kept_for_the_next_start_and_shown_to_nobody(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = _opened(tmp_path)
    shown, deadline = "", time.monotonic() + 60
    while "warning: MLflow" not in shown and time.monotonic() < deadline:  # nobody serves there
        time.sleep(0.1)
        shown += capsys.readouterr().err
    run.tracker.finish("FAILED")
    shown += capsys.readouterr().err
    told = "".join(path.read_text() for path in (tmp_path / "run" / "tracking").iterdir())
    assert '"data.train": "https://host/train?***"' in told
    assert "warning: MLflow at http://***@127.0.0.1" in shown
    assert "could not be sent to MLflow at http://***@127.0.0.1" in shown
    for text in (told, shown):
        assert "https://host/train?***" in text
        assert "http://***@127.0.0.1" in text
        assert "swordfish" not in text
        assert "hunter2" not in text
    assert "https://host/train?sig=swordfish" in (tmp_path / "run" / "config.yaml").read_text()


def test_a_run_leaves_no_thread_that_samples(tmp_path: Path) -> None:
    def sampling() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name == "system" and thread not in before]

    before = threading.enumerate()
    run = _opened(tmp_path)
    (thread,) = sampling()
    run.close("FINISHED")
    thread.join(10)
    assert not sampling()


def test_a_free_port_is_none_that_others_are_given_meanwhile() -> None:
    """Between its choice and its use ranks make connections, each from a port of the system's choice."""
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports = {free_port() for _ in range(100)}
    assert max(ports) < min(lowest, 30_000)
    assert len(ports) > 90
