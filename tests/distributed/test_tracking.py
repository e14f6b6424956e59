"""Training on two ranks, tracked: what MLflow has in the end is what was trained, whatever happened to its server or to
the ranks."""

import json
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from cases import ARCHITECTURE, BATCH, noise_shards
from mlflow import MlflowClient
from omegaconf import OmegaConf

from fulllora_dist.commands import train
from fulllora_dist.data.batch import Batch
from fulllora_dist.data.index import Index
from fulllora_dist.distributed.comm import Comm, free_port
from fulllora_dist.storage import folder_lock
from fulllora_dist.training.trainer import Trainer
from tests.ranks import RankError, RankServer
from tests.services.mlflow_server import MlflowServer

BATCHES = 300
NAMES = ("loss", "accuracy", "learning_rate", "skipped", "gradient_norm")
assert BATCHES * len(NAMES) == 1500

_seen: set[tuple[str, str]] = set()


def _config(folder: Path, shards: str, uri: str, batches: int = BATCHES, **sections: dict[str, Any]) -> Path:
    """Of a run in `folder`; 24 images make three batches an epoch."""
    values: dict[str, Any] = {
        "model": {
            "backbone": "vit_tiny_patch16_224",
            "pretrained": False,
            "num_classes": 3,
            "image_size": 16,
            "model_kwargs": ARCHITECTURE,
        },
        "adapter": {"rank": 2},
        "threat": {"eps": 8 / 255},
        "method": "standard",
        "data": {"train": shards, "num_workers": 0},
        "optim": {"batch_size": BATCH, "epochs": batches / 3, "grad_clip": 1.0},
        "run": {"output_dir": str(folder / "run"), "checkpoint_every": 25, "log_every": 1},
        "evaluation": {"attacks": ["clean", "pgd2"], "gradient_masking_samples": 0},
        "tracking": {"uri": uri, "flush_timeout_s": 200, "system_metrics_interval_s": 0.5},
    }
    for section, settings in sections.items():
        values[section] = values.get(section, {}) | settings
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(values)))
    return folder / "config.yaml"


def _audit(event: str, args: tuple) -> None:
    """Calls that may block, by thread; gloo's connections are no calls of Python's."""
    connects = event == "socket.connect" and isinstance(args[1], tuple)
    imports = event == "import" and args[0].partition(".")[0] == "mlflow"
    if connects or imports or event == "sqlite3.connect":
        _seen.add((event, threading.current_thread().name))


def _train(comm: Comm, config: str, stops: Sequence[int], kill: int | None = None) -> tuple[set, float]:
    """train.py on a node of its own for each rank. After the batches `stops`, rank 0 waits for the test; after `kill`
    it is killed. What was seen of `_audit`, and the longest call of the tracker in seconds."""
    advance, gate = Trainer.advance, Path(config).with_name("gate")
    longest = 0.0

    def paced(trainer: Trainer, batch: Batch) -> None:
        nonlocal longest
        tracker = trainer._run.tracker
        if not hasattr(tracker, "timed"):
            tracker.timed = True  # type: ignore[attr-defined]
            for name in ("log", "commit", "system"):
                setattr(tracker, name, timed(getattr(tracker, name)))
        advance(trainer, batch)
        if comm.rank == 0 and kill:
            trainer._run.settle()  # or a checkpoint that is due waits for a slow one, and comes a batch later
        if comm.rank == 0 and trainer.step == kill:
            os.kill(os.getpid(), signal.SIGKILL)
        if comm.rank == 0 and trainer.step in stops:
            gate.with_suffix(f".{trainer.step}").touch()
            while gate.with_suffix(f".{trainer.step}").exists():
                time.sleep(0.02)

    def timed(call: Any) -> Any:
        def wrapped(*args: Any) -> None:
            nonlocal longest
            began = time.perf_counter()
            call(*args)
            longest = max(longest, time.perf_counter() - began)

        return wrapped

    Trainer.advance = paced  # type: ignore[method-assign]
    socket.gethostname = lambda: f"node{comm.rank}"
    folder_lock.HEARTBEAT_SECONDS, folder_lock.STALE_SECONDS = 1.0, 9.0  # of a killed run, too
    sys.addaudithook(_audit)
    assert train.main(["--config", config]) == 0
    return _seen, longest


def _curve(uri: str, run_id: str, prefix: str = "") -> list[tuple[str, int, float, int]]:
    """(name, step, value, time) of every point."""
    client = MlflowClient(uri)
    names = [name for name in client.get_run(run_id).data.metrics if name.startswith(prefix)]
    return sorted(
        (name, point.step, point.value, point.timestamp)
        for name in names
        for point in client.get_metric_history(run_id, name)
    )


def _written(output: Path) -> list[tuple[str, int, float, int]]:
    """The same, of metrics.jsonl."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return sorted(
        (name, line["step"], value, line["time"])
        for line in lines
        for name, value in line.items()
        if name not in ("step", "time")
    )


def _run(uri: str, output: Path) -> Any:
    """The one MLflow run of an output folder."""
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("fulllora").experiment_id
    (run,) = [r for r in client.search_runs([experiment]) if r.data.tags["output"] == str(output)]
    return run


def _begun(output: Path) -> bool:
    """Whether MLflow has got metrics."""
    return json.loads((output / "tracking" / "sent.json").read_text())["sent"]["metrics"][0] > 0


def _await(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 200
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("late", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_server_that_is_killed(
    server: RankServer, shards: str, database: Path, tmp_path: Path, late: bool, record_property: Any
) -> None:
    """1,500 metric values in, 1,500 out, and all else that a run logs.

    The server starts with the training, which is there first; or late in its midst, away again for 100 batches.
    """
    held_out, validation = (noise_shards(tmp_path / name, seed) for name, seed in (("held", 1), ("val", 2)))
    with MlflowServer(tmp_path / "server", database) as mlflow:
        config = _config(
            tmp_path / "a",
            shards,
            mlflow.uri,
            data={"held_out": held_out, "validation": validation},
            guard={"every": 100, "num_samples": 8, "steps": 1},
        )
        batches = [50, 150, 250] if late else [150]
        gates = {batch: tmp_path / "a" / f"gate.{batch}" for batch in batches}
        outcome: dict[str, Any] = {}

        def train_on_two() -> None:
            outcome["ranks"] = server.run(2, _train, str(config), batches, timeout=400)

        training = threading.Thread(target=train_on_two)
        training.start()
        if late:
            _await(gates[50].exists)
        mlflow.start(wait=False)
        if late:
            mlflow.wait()
            gates[50].unlink()
        _await(gates[150].exists)
        _await(lambda: _begun(tmp_path / "a" / "run"))
        mlflow.kill()
        if late:
            gates[150].unlink()
            _await(gates[250].exists)
        mlflow.start(wait=False)
        gates[batches[-1]].unlink()
        training.join()
        (seen, longest), (seen_by_one, _) = outcome["ranks"]
        record_property("longest call of the tracker on the training thread, ms", 1000 * longest)

        assert threading.main_thread().name not in {thread for _, thread in seen}
        assert {("socket.connect", "tracking"), ("import", "tracking")} <= seen, "or the watch sees nothing"
        assert not seen_by_one
        output = tmp_path / "a" / "run"
        run = _run(mlflow.uri, output)
        run_id, tags = run.info.run_id, run.data.tags
        curve = [point for point in _curve(mlflow.uri, run_id) if not point[0].startswith("system/")]
        assert curve == _written(output)
        assert Counter(name for name, *_ in curve if name.startswith("train/")) == {f"train/{n}": 300 for n in NAMES}

        assert run.info.status == "FINISHED"
        assert (tags["restart/1/world_size"], tags["restart/1/hosts"]) == ("2", "node0, node1")
        assert {"version/torch", "version/deepspeed", "version/timm", "version/mlflow"} <= tags.keys()
        assert run.data.params["optim.batch_size"] == str(BATCH)
        for node in ("node0", "node1"):
            sampled = _curve(mlflow.uri, run_id, f"system/{node}/")
            assert {name.rpartition("/")[2] for name, *_ in sampled} >= {
                "cpu_utilization_percentage",
                "system_memory_usage_megabytes",
                "disk_available_megabytes",
                "network_receive_megabytes",
            }
            steps = [step for name, step, *_ in sampled if name.endswith("cpu_utilization_percentage")]
            assert len(steps) > 3
        data = {i.dataset.name: json.loads(i.dataset.profile)["index"] for i in run.inputs.dataset_inputs}
        folders = {"train": shards, "held_out": held_out, "validation": validation}
        assert data == {split: Index.load(folder).hash for split, folder in folders.items()}

        client = MlflowClient(mlflow.uri)
        kept = {file.path for file in client.list_artifacts(run_id)}
        assert kept >= {"adapter", "adapter_best", "config.yaml", "evaluation.json", "evaluation_classes.png"}
        images = {Path(file.path).name for file in client.list_artifacts(run_id, "figures")}
        checks = {f"examples_{batch:08d}.png" for batch in (100, 200, 300)}
        assert images == checks | {"examples.png", "curves.png", "adapter_norms.png"}


@pytest.mark.long
def test_a_killed_run_ends_like_the_uninterrupted_one(
    server: RankServer, shards: str, database: Path, tmp_path: Path
) -> None:
    """Killed where MLflow has heard of nothing, as its server is away, and once more where it has got a part."""
    with MlflowServer(tmp_path / "server", database) as mlflow:
        away = f"http://127.0.0.1:{free_port()}"
        batches = 12
        frame = {"run": {"output_dir": str(tmp_path / "cut" / "run"), "checkpoint_every": 3, "log_every": 1}}
        configs = {
            uri: str(_config(tmp_path / name, shards, uri, batches, **frame))
            for name, uri in (("away", away), ("here", mlflow.uri))
        }
        with pytest.raises(RankError):
            server.run(2, _train, configs[away], [], 5)
        mlflow.start()
        with pytest.raises(RankError):
            server.run(2, _train, configs[mlflow.uri], [], 10)
        client = MlflowClient(mlflow.uri)  # it may not have got the tags yet
        (begun,) = client.search_runs([client.get_experiment_by_name("fulllora").experiment_id])
        assert begun.info.status == "RUNNING"
        server.run(2, _train, configs[mlflow.uri], [])
        run = _run(mlflow.uri, tmp_path / "cut" / "run")
        assert run.info.status == "FINISHED"
        assert [run.data.tags[f"restart/{n}/began_at_batch"] for n in (1, 2, 3)] == ["0", "3", "9"]
        cut = [point for point in _curve(mlflow.uri, run.info.run_id) if not point[0].startswith("system/")]
        assert cut == _written(tmp_path / "cut" / "run")

        server.run(2, _train, str(_config(tmp_path / "whole", shards, mlflow.uri, batches)), [])
        whole = _curve(mlflow.uri, _run(mlflow.uri, tmp_path / "whole" / "run").info.run_id, "train/")
        assert [point[:3] for point in cut if point[0].startswith("train/")] == [point[:3] for point in whole]
