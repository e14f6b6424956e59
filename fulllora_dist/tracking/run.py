"""The tracker of a run: writes to files in the output folder at once, to MLflow from a thread (docs/tracking.md).

`metrics.jsonl` gets all metrics and is cut back to the checkpoint's step on resume. MLflow cannot delete metrics, so it
gets them once a durable checkpoint covers them (`commit`): a resumed run then has no duplicate or future metrics.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from fulllora_dist.core.atomic import write_text
from fulllora_dist.core.messages import redacted
from fulllora_dist.core.settings import flattened
from fulllora_dist.storage.urls import is_remote, local_path
from fulllora_dist.tracking.outbox import METRICS, Outbox, belongs
from fulllora_dist.tracking.provenance import CHANGED, git_commit, package_versions
from fulllora_dist.tracking.shipping import Shipper
from fulllora_dist.tracking.spool import Dropped, Line, Spool
from fulllora_dist.tracking.summary import DatasetInfo, RunSummary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURES = "figures"
AT_FAILURE = "metrics_at_failure.jsonl"
_CONTEXTS = {"train": "training", "validation": "validation", "held_out": "held_out"}
_KILLED_SECONDS = 5.0  # a scheduler that has sent a signal kills soon


class Tracker:
    """The metrics and artifacts of one run over all its restarts. Does nothing but on rank 0; there, no call waits for
    the network, or for a database.

    Args:
        run: the run.
        active: False on every rank but 0.
        run_id: of the MLflow run that this one continues, if its checkpoint knows it.
        step: of the run's own checkpoint that it resumes from, 0 where there is none; later lines of `metrics.jsonl`
            are dropped, earlier ones that MLflow does not have are sent.
        hosts: host of every rank.
    """

    def __init__(
        self, run: RunSummary, active: bool, run_id: str | None = None, step: int = 0, hosts: Sequence[str] = ()
    ):
        self.uri: str | None = None
        self._active = active
        self._warned: set[str] = set()
        self._outbox: Outbox | None = None
        if not active:
            return
        output, settings = run.output_dir, run.settings
        if not settings.enabled:
            self._metrics = Spool(Path(output) / METRICS)
            self._metrics.cut(lambda line: belongs(line, step))
            return
        self.uri, self._wait = run.uri, settings.flush_timeout_s
        self._outbox = Outbox(output)
        self._outbox.begin(run_id, step)
        self._metrics = self._outbox.metrics
        self._first_sample = next((line["time"] for line in self._outbox.system), None)
        self._shipper = Shipper(self._outbox, self.uri, settings.experiment_name, run.name, _say)
        self._drawing = ThreadPoolExecutor(1, "figures")
        self._log_start(run, step, hosts)
        self._shipper.start()

    def _log_start(self, run: RunSummary, step: int, hosts: Sequence[str]) -> None:
        """Parameters at the first start; status and tags at every one. The first start is restart 1."""
        assert self._outbox is not None
        earlier = list(self._outbox.events)
        self._tagged = {name for event in earlier if event["do"] == "tags" for name in event["values"]}
        restart = 1 + sum(event["do"] == "status" and event["status"] == "RUNNING" for event in earlier)
        if restart == 1:
            self._event("params", values={name: redacted(value) for name, value in flattened(run.params)})
        self._event("status", status="RUNNING", time=int(time.time() * 1000))
        commit = git_commit()
        tags = {
            "output": os.path.abspath(run.output_dir),
            "git_commit": commit,
            "mlflow.source.git.commit": commit and commit.removesuffix(CHANGED),  # which MLflow's page shows
            **{f"version/{package}": version for package, version in package_versions().items()},
            f"restart/{restart}/began_at_batch": step,
            f"restart/{restart}/world_size": len(hosts),
            f"restart/{restart}/hosts": ", ".join(dict.fromkeys(hosts)),
            f"restart/{restart}/git_commit": commit,
        }
        self._event("tags", values={name: value for name, value in tags.items() if value is not None})

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None until it is known, and where nothing is sent."""
        return None if self._outbox is None else self._outbox.run_id

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Metrics at `step`. Non-finite values are listed in the line apart, and MLflow gets a tag with the first."""
        if not self._active:
            return
        line: Line = {"step": step, "time": int(time.time() * 1000)}
        line |= {name: value for name, value in metrics.items() if math.isfinite(value)}
        nonfinite = {name: str(float(value)) for name, value in metrics.items() if not math.isfinite(value)}
        if nonfinite:
            line["nonfinite"] = nonfinite
        if self._outbox is not None:
            line["time"] = self._outbox.earlier_time(line) or line["time"]
            for name, value in nonfinite.items():
                tag = f"nonfinite/{name}"
                if tag not in self._tagged:
                    self._tagged.add(tag)
                    self._event("tags", values={tag: f"{value} at batch {step}"})
        self._append(self._metrics, line)

    def system(self, samples: Sequence[Line]) -> None:
        """Samples that a `SystemSampler` took; their step is the number of seconds since the run's first one."""
        if self._outbox is None or not samples:
            return
        for sample in samples:
            self._first_sample = self._first_sample or sample["time"]
            seconds = round((sample["time"] - self._first_sample) / 1000)
            self._append(self._outbox.system, {"step": seconds, **sample})
        self._shipper.wake()

    def _append(self, spool: Spool, line: Line) -> None:
        try:
            spool.append(line)
        except OSError as error:
            self._warn(f"warning: {spool.path}: {error.strerror}; its lines are kept in memory until there is space")

    def commit(self, step: int) -> None:
        """A durable checkpoint covers everything up to `step`: it may be sent."""
        if self._outbox is not None:
            try:
                self._outbox.cover(step)
            except OSError as error:
                self._warn(
                    f"warning: {self._outbox.output}: {error.strerror}; the progress of sending is not saved there"
                )
            self._shipper.wake()

    def go_back(self, step: int, kept_in: str) -> None:
        """The run rolls back to `step`: later metrics move to the file `kept_in` in the output folder, and the steps
        are logged again. MLflow keeps those that it has."""
        if not self._active:
            return

        def keep(dropped: Dropped) -> None:
            write_text(self._metrics.path.with_name(kept_in), "".join(text for text, *_ in dropped))

        if self._outbox is not None:
            self._outbox.cut_back(step, keep)
        else:
            self._metrics.cut(lambda line: belongs(line, step), keep)

    def artifact(self, path: str, folder: str | None = None) -> None:
        """Log a file or folder of the output folder."""
        if self._outbox is not None:
            self._event("artifact", path=os.path.relpath(path, self._outbox.output), folder=folder)

    def text(self, text: str, name: str) -> None:
        """Log `text` as a file of that name."""
        self._event("text", text=text, name=name)

    def data(self, data: DatasetInfo) -> None:
        """Log a split of the run's data."""
        source = data.source if is_remote(data.source) else os.path.abspath(local_path(data.source))
        details = asdict(data) | {"source": redacted(source), "context": _CONTEXTS[data.split]}
        self._event("data", **details)

    def figure(self, name: str, draw: "Callable[[], Figure]") -> None:
        """Draw a PNG in a thread, into figures/ of the output folder, and log it."""
        if self._outbox is None:
            return
        path = self._outbox.output / FIGURES / f"{name}.png"

        def save() -> None:
            try:
                path.parent.mkdir(exist_ok=True)
                draw().savefig(path)
                self.artifact(str(path), FIGURES)
            except Exception as error:  # no figure is worth a run
                self._warn(f"warning: no {path} ({type(error).__name__}: {error})")

        self._drawing.submit(save)

    def lines(self) -> Iterator[Line]:
        """All lines of metrics.jsonl."""
        return iter(self._metrics) if self._active else iter(())

    def settle(self, seconds: float | None = None) -> bool:
        """Wait until everything that may be sent is, for `tracking.flush_timeout_s` at most; whether it is."""
        return self._outbox is not None and self._shipper.drain(self._wait if seconds is None else seconds)

    def finish(self, status: str) -> None:
        """Set the status: FINISHED, FAILED or KILLED (stopped, to be resumed). Waits like `settle`, but only shortly
        after a signal."""
        if self._outbox is None:
            return
        killed = status == "KILLED"
        if status == "FAILED":
            self._log_uncovered()
        self._drawing.shutdown(wait=not killed, cancel_futures=killed)
        self._event("status", status=status, time=int(time.time() * 1000))
        seconds = min(self._wait, _KILLED_SECONDS) if killed else self._wait
        if not self.settle(seconds):
            output = self._outbox.output
            _say(
                f"tracking: {self._shipper.pending()} could not be sent to MLflow at {redacted(self.uri)} and are kept "
                f"in {output}; resuming the run sends them, or: fulllora sync {output}"
            )
        self._shipper.stop()

    def interrupted(self) -> None:
        """A signal has come: should the process end at once, its run must not stay RUNNING. Does not wait."""
        self._event("status", status="KILLED", time=int(time.time() * 1000))

    def _log_uncovered(self) -> None:
        """Metrics that no checkpoint covers go to MLflow as a file: as metrics they might be duplicated, since the run
        may be resumed; but where it diverged, they are what people look for."""
        assert self._outbox is not None
        path = self._outbox.output / AT_FAILURE
        uncovered = [json.dumps(line) + "\n" for line in self._outbox.metrics if self._outbox.is_uncovered(line)]
        if not uncovered:
            return
        try:
            write_text(path, "".join(uncovered))
        except OSError as error:
            self._warn(f"warning: no {path} ({error.strerror})")
        else:
            self.artifact(str(path))

    def _event(self, kind: str, **details: Any) -> None:
        if self._outbox is not None:
            self._append(self._outbox.events, {"do": kind, **details})
            self._shipper.wake()

    def _warn(self, line: str) -> None:
        """Once for each kind of trouble."""
        kind = line.partition("(")[0]
        if kind not in self._warned:
            _say(line)
        self._warned.add(kind)


def _say(line: str) -> None:
    tqdm.write(line, file=sys.stderr)
