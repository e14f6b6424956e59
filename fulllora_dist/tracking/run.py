"""Metrics of a run: a file in the output folder first, MLflow second.

`metrics.jsonl` gets every point at once and is cut back to the state's step on resume. MLflow cannot delete points, so
it gets them when a durable state covers them (`commit`): a resumed run then has no doubled or future points. A
tracking store that fails costs a warning and never the run. What it missed is sent with the next commit of the same
attempt; an attempt that found no store, or was killed before it came back, leaves a gap there, but none in the file.
"""

import contextlib
import fcntl
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fulllora_dist.config import Config
from fulllora_dist.data.index_file import published
from fulllora_dist.data.urls import redacted

METRICS = "metrics.jsonl"
RUN_ID = "mlflow_run"  # a file with the id, for an attempt that is killed before it has a state
_BATCH = 1000  # points MLflow takes in one call


class Tracker:
    """The metrics of one run over all its restarts. Does nothing but on rank 0.

    Args:
        config: the run's.
        active: False on every rank but 0.
        run_id: of the MLflow run that this one continues.
        step: the state's; later lines of `metrics.jsonl` are dropped.
    """

    def __init__(self, config: Config, active: bool, run_id: str | None = None, step: int = 0):
        self.run_id = run_id
        self.uri: str | None = None
        self._active = active
        self._pending: list[tuple[str, float, int, int]] = []
        self._warned: set[str] = set()
        self._client: Any = None
        if not active:
            return
        self._path = os.path.join(config.run.output, METRICS)
        self._id_path = os.path.join(config.run.output, RUN_ID)
        self._unwritten = ""
        self._cut_back(step)
        if config.tracking.enabled:
            self.uri = config.tracking_uri()
            self._guarded(lambda: self._open(config))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Points at `step`; values that are not finite go to the file alone."""
        if not self._active:
            return
        now = int(time.time() * 1000)
        self._unwritten += json.dumps({"step": step, "time": now, **metrics}) + "\n"
        self._append()
        if self._client is not None:
            self._pending += [(k, v, now, step) for k, v in metrics.items() if math.isfinite(v)]

    def _append(self) -> None:
        """What a full disk did not take is tried again with the next point, and is never half a line."""
        size = os.path.getsize(self._path) if os.path.exists(self._path) else 0
        try:
            with open(self._path, "a") as file:
                file.write(self._unwritten)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(self._path, size)
            self._warn(f"warning: {self._path}: {error.strerror}; points are kept in memory until there is space")
        else:
            self._unwritten = ""

    def commit(self, step: int) -> None:
        """A durable state covers everything up to `step`: send it."""
        ready = [point for point in self._pending if point[3] <= step]
        if self._client is None or not ready:
            return
        from mlflow.entities import Metric

        def send() -> None:
            for i in range(0, len(ready), _BATCH):
                self._client.log_batch(self.run_id, metrics=[Metric(*point) for point in ready[i : i + _BATCH]])
                del self._pending[: len(ready[i : i + _BATCH])]  # points are in step order

        self._guarded(send)

    def go_back(self, step: int, kept_in: str) -> None:
        """The run goes back to `step`: later points move to a file of the name `kept_in` in the output folder, and the
        steps are logged again. MLflow keeps those that it has."""
        if not self._active:
            return
        self._append()
        dropped = self._cut_back(step)
        with published(Path(self._path).with_name(kept_in)) as file:
            file.write("".join(dropped).encode())
        self._pending = [point for point in self._pending if point[3] <= step]

    def artifact(self, path: str, folder: str | None = None) -> None:
        """A file or folder of the run, kept with it."""
        if self._client is not None:
            log = self._client.log_artifacts if os.path.isdir(path) else self._client.log_artifact
            self._guarded(lambda: log(self.run_id, path, folder))

    def text(self, text: str, name: str) -> None:
        """A file of that name, kept with the run."""
        if self._client is not None:
            self._guarded(lambda: self._client.log_text(self.run_id, text, name))

    def finish(self, status: str) -> None:
        """FINISHED, FAILED or KILLED (stopped, to be resumed)."""
        if self._client is not None:
            self._guarded(lambda: self._client.set_terminated(self.run_id, status))

    def _cut_back(self, step: int) -> list[str]:
        """Drop the lines after `step`; they are returned."""
        if not os.path.exists(self._path):
            return []
        with open(self._path) as file:
            found = file.readlines()
        # the final evaluation comes after the last state and is made again
        stays = [_step_of(line) <= step and '"eval/' not in line for line in found]
        if not all(stays):
            with published(Path(self._path)) as whole:
                whole.write("".join(itertools.compress(found, stays)).encode())
        return [line for line, kept in zip(found, stays, strict=True) if not kept]

    def _open(self, config: Config) -> None:
        # defaults would hold a dead server's caller for four minutes
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        from mlflow import MlflowClient

        assert self.uri is not None
        with _first_use_alone(self.uri):
            client = MlflowClient(self.uri)
            name = config.tracking.experiment
            found = client.get_experiment_by_name(name)
            experiment = found.experiment_id if found else client.create_experiment(name, _artifact_location(self.uri))
        self.run_id = self.run_id or self._begun(client)
        if self.run_id is None:
            run_name = config.tracking.run_name or os.path.basename(os.path.abspath(config.run.output))
            self.run_id = client.create_run(experiment, run_name=run_name).info.run_id
            with open(self._id_path, "w") as file:
                file.write(self.run_id)
            for key, value in _flat(config.model_dump(mode="json")):
                client.log_param(self.run_id, key, redacted(value))
        else:
            client.update_run(self.run_id, status="RUNNING")
        client.set_tag(self.run_id, "output", os.path.abspath(config.run.output))
        self._client = client

    def _begun(self, client: Any) -> str | None:
        """The MLflow run of an attempt that was killed before its first state: nothing was sent to it. One that has
        points belongs to states that are lost: it has failed, and this is another."""
        try:
            with open(self._id_path) as file:
                run_id = file.read()
        except FileNotFoundError:
            return None
        if not client.get_run(run_id).data.metrics:
            return run_id
        client.set_terminated(run_id, "FAILED")
        return None

    def _guarded(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # whatever a tracking store does, training goes on
            reason, where = redacted(error).split("\n")[0][:200], redacted(self.uri)
            self._warn(f"warning: MLflow at {where} failed ({reason}); points are kept in {self._path}")

    def _warn(self, line: str) -> None:
        """Once a run and kind of trouble."""
        kind = line.partition("(")[0]
        if kind not in self._warned:
            print(line, file=sys.stderr)
        self._warned.add(kind)


def _step_of(line: str) -> float:
    """A line that a kill cut short belongs to no step."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _artifact_location(uri: str) -> str | None:
    """Beside a sqlite file; MLflow's default is the working directory. A server has its own."""
    if not uri.startswith("sqlite:///"):
        return None
    return "file://" + os.path.join(os.path.dirname(os.path.abspath(uri.removeprefix("sqlite:///"))), "mlruns")


@contextlib.contextmanager
def _first_use_alone(uri: str) -> Iterator[None]:
    """A fresh sqlite store is migrated at first use, and two processes at once break it."""
    if not uri.startswith("sqlite:///"):
        yield
        return
    path = os.path.abspath(uri.removeprefix("sqlite:///"))
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path + ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
