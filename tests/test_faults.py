"""train.py under the real launcher: signals, ranks that hang and ranks that die."""

import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from tests import test_train
from tests.test_train import end, rank_process, start, wait_for_state

config = test_train.config
LONG = ["optim.epochs=2000", "method=standard", "run.checkpoint_every=10"]  # ends when it is told to


def newest(output: Path) -> int:
    return max(int(p.name) for p in (output / "checkpoints").iterdir() if p.name.isdigit())


def status(config: Path, output: Path) -> str:
    client = MlflowClient(f"sqlite:///{config.parent}/mlflow.db")
    experiment = client.get_experiment_by_name("fulllora").experiment_id
    (run,) = [r for r in client.search_runs([experiment]) if r.data.tags["output"] == str(output)]
    return run.info.status


@pytest.mark.long
def test_signals_stop_it_and_a_second_one_ends_it_at_once(config: Path) -> None:
    output = config.parent / "signalled"
    launched = start(config, f"run.output_dir={output}", *LONG)
    wait_for_state(output, 10)
    ranks = [rank_process(launched, rank) for rank in (0, 1)]
    workers = [p for rank in ranks for p in rank.children(recursive=True)]
    assert len(workers) >= 4, "two servers and their workers"
    os.killpg(launched.pid, signal.SIGUSR1)  # SLURM's --signal reaches every process of the step; the launcher dies
    said = end(launched, code=-signal.SIGUSR1)
    assert "re-run the same command to resume from here" in said
    assert "Traceback" not in said
    stopped_at = int(said.partition("stopped at batch ")[2].split()[0])
    assert stopped_at == newest(output)
    assert status(config, output) == "KILLED"

    launched = start(config, f"run.output_dir={output}", *LONG)
    wait_for_state(output, stopped_at + 10)
    zero, one = (rank_process(launched, rank) for rank in (0, 1))
    one.suspend()  # rank 0 now waits for it in a collective
    time.sleep(0.5)
    os.killpg(launched.pid, signal.SIGTERM)  # and the launcher, signalled too, signals the ranks again
    time.sleep(1.5)
    assert zero.is_running()
    assert zero.status() != psutil.STATUS_ZOMBIE, "the launcher's copy is no second request"
    zero.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    assert psutil.wait_procs([zero], timeout=3)[0], "it does not wait for rank 1"
    assert time.monotonic() - asked < 3
    one.kill()
    assert f"resuming at batch {stopped_at}" in end(launched, code=None)


@pytest.mark.long
@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGUSR2])
def test_the_exit_code_names_the_signal(config: Path, kind: signal.Signals) -> None:
    output = config.parent / kind.name
    process = start(config, f"run.output_dir={output}", *LONG, "tracking.enabled=false", ranks=1)
    wait_for_state(output, 10)
    process.send_signal(kind)
    said = end(process, code=128 + kind)
    assert f"stopped at batch {newest(output)}" in said
    steps = [json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))


@pytest.mark.long
def test_a_killed_rank_takes_the_others_down(config: Path) -> None:
    """The launcher names the rank's command and code, rank 0 the rank; a checkpoint is there, and MLflow knows."""
    output = config.parent / "killed"
    launched = start(config, f"run.output_dir={output}", *LONG)
    wait_for_state(output, 10)
    survivors = [rank_process(launched, 0), *rank_process(launched, 0).children(recursive=True)]
    rank_process(launched, 1).kill()
    killed = time.monotonic()
    said = end(launched, code=None)
    assert time.monotonic() - killed < 40, "the launcher waits 30 s at most"
    assert launched.returncode != 0
    assert "--local_rank=1" in said.partition("exits with return code = -9")[0].splitlines()[-1]
    assert "error on rank 0: rank 1 has died (" in said
    assert "Traceback" not in said
    assert not psutil.wait_procs(survivors, timeout=5)[1], "workers too"
    assert status(config, output) in ("FAILED", "KILLED")
