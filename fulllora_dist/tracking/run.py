"""What a run says of itself: to files in the output folder at once, to MLflow from a thread (docs/tracking.md).

`metrics.jsonl` gets every point and is cut back to the state's step on resume. MLflow cannot delete points, so it gets
them when a durable state covers them (`commit`): a resumed run then has no doubled or future points.
"""

import contextlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from fulllora_dist.core.atomic import atomic_write
from fulllora_dist.core.settings import flattened
from fulllora_dist.data.index import Index
from fulllora_dist.storage.urls import is_remote, local_path, redacted
from fulllora_dist.tracking.outbox import METRICS, Outbox, belongs
from fulllora_dist.tracking.settings import TrackingSettings
from fulllora_dist.tracking.shipping import Shipper
from fulllora_dist.tracking.spool import Line, Spool

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURES = "figures"
AT_FAILURE = "metrics_at_failure.jsonl"
_VERSIONS = ("fulllora-dist", "torch", "deepspeed", "timm", "mlflow")
_CONTEXTS = {"train": "training", "validation": "validation", "held_out": "held_out"}
_CHANGED = " with changes"
_KILLED_SECONDS = 5.0  # a scheduler that has sent a signal kills soon


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker knows of its run.

    Attributes:
        output_dir: its output folder.
        settings: how it is tracked.
        uri: MLflow's tracking store.
        name: of the MLflow run, where it is made.
        params: all settings of the run; {section: {key: value}}.
    """

    output_dir: str
    settings: TrackingSettings
    uri: str
    name: str
    params: Mapping[str, Any]


class Tracker:
    """The metrics and artifacts of one run over all its restarts. Does nothing but on rank 0; there, no call waits for
    the network, or for a database.

    Args:
        run: the run.
        active: False on every rank but 0.
        run_id: of the MLflow run that this one continues, where the state knows it.
        step: of the run's own state that it goes on from, 0 where it has none; later lines of `metrics.jsonl` are
            dropped, earlier ones that MLflow has not got are sent.
        hosts: that of every rank.
    """

    def __init__(
        self, run: TrackedRun, active: bool, run_id: str | None = None, step: int = 0, hosts: Sequence[str] = ()
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
            self._metrics.cut(lambda line: belongs(line, step), lambda dropped: None)
            return
        self.uri, self._wait = run.uri, settings.flush_timeout_s
        self._outbox = Outbox(output)
        self._outbox.begin(run_id, step)
        self._metrics = self._outbox.metrics
        self._first_sample = next((line["time"] for line in self._outbox.system), None)
        self._shipper = Shipper(self._outbox, self.uri, settings.experiment_name, run.name, _say)
        self._drawing = ThreadPoolExecutor(1, "figures")
        self._begin_attempt(run, step, hosts)
        self._shipper.start()

    def _begin_attempt(self, run: TrackedRun, step: int, hosts: Sequence[str]) -> None:
        assert self._outbox is not None
        earlier = list(self._outbox.events)
        self._non_finite = {name for event in earlier if event["do"] == "tags" for name in event["values"]}
        number = 1 + sum(event == {"do": "status", "status": "RUNNING"} for event in earlier)
        if number == 1:
            params = {name: redacted(value) for name, value in flattened(run.params)}
            self._event("params", values=params)
        self._event("status", status="RUNNING")
        commit = git_commit()
        attempt = {
            "began_at_batch": step,
            "world_size": len(hosts),
            "hosts": ", ".join(dict.fromkeys(hosts)),
            "git_commit": commit,
        }
        tags = {
            "output": os.path.abspath(run.output_dir),
            "git_commit": commit,
            "mlflow.source.git.commit": commit and commit.removesuffix(_CHANGED),  # which MLflow's page shows
            **{f"version/{name}": _version(name) for name in _VERSIONS},
            **{f"attempt/{number}/{name}": value for name, value in attempt.items()},
        }
        self._event("tags", values={name: value for name, value in tags.items() if value is not None})

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None while it is not known, and where nothing is sent."""
        return None if self._outbox is None else self._outbox.run_id

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Points at `step`. Values that are not finite are named there, and MLflow gets a tag with the first."""
        if not self._active:
            return
        line: Line = {"step": step, "time": int(time.time() * 1000)}
        line |= {name: value for name, value in metrics.items() if math.isfinite(value)}
        bad = {name: str(float(value)) for name, value in metrics.items() if not math.isfinite(value)}
        if bad:
            line["nonfinite"] = bad
        if self._outbox is not None:
            line["time"] = self._outbox.earlier_time(line) or line["time"]
            for name in bad:
                self._tag_once(f"nonfinite/{name}", f"{bad[name]} at batch {step}")
        self._append(self._metrics, line)

    def _tag_once(self, name: str, value: str) -> None:
        if name not in self._non_finite:
            self._non_finite.add(name)
            self._event("tags", values={name: value})

    def system(self, samples: Sequence[Line]) -> None:
        """Samples of machines, as `SystemSampler` takes them; their step is the seconds since the run's first one."""
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
            self._warn(
                f"warning: {spool.path}: {error.strerror}; its lines are kept in memory until there is space",
            )

    def commit(self, step: int) -> None:
        """A durable state covers everything up to `step`: it may be sent."""
        if self._outbox is not None:
            try:
                self._outbox.cover(step)
            except OSError as error:
                self._warn(f"warning: {self._outbox.output}: {error.strerror}; what MLflow may have is not noted there")
            self._shipper.wake()

    def go_back(self, step: int, kept_in: str) -> None:
        """The run goes back to `step`: later points move to a file of the name `kept_in` in the output folder, and the
        steps are logged again. MLflow keeps those that it has."""
        if not self._active:
            return

        def keep(dropped: list[str]) -> None:
            with atomic_write(self._metrics.path.with_name(kept_in)) as file:
                file.write("".join(dropped).encode())

        if self._outbox is not None:
            self._outbox.cut_back(step, keep)
        else:
            self._metrics.cut(lambda line: belongs(line, step), lambda lines: keep([text for text, _ in lines]))

    def artifact(self, path: str, folder: str | None = None) -> None:
        """A file or folder of the run, kept with it."""
        if self._outbox is not None:
            self._event("artifact", path=os.path.relpath(path, self._outbox.output), folder=folder)

    def text(self, text: str, name: str) -> None:
        """A file of that name, kept with the run."""
        self._event("text", text=text, name=name)

    def data(self, split: str, where: str, index: Index) -> None:
        """What the run sees.

        Args:
            split: train, validation or held_out.
            where: folder or URL of the shards.
            index: theirs.
        """
        place = where if is_remote(where) else os.path.abspath(local_path(where))
        metadata = {
            "source": redacted(place),
            "digest": index.hash,
            "pictures": len(index),
            "classes": len(index.classes),
        }
        self._event("data", name=split, context=_CONTEXTS[split], **metadata)

    def figure(self, name: str, draw: "Callable[[], Figure]") -> None:
        """A PNG of that name, drawn in a thread, in the folder figures/ of the output folder and kept with the run."""
        if self._outbox is None:
            return
        path = self._outbox.output / FIGURES / f"{name}.png"

        def save() -> None:
            try:
                path.parent.mkdir(exist_ok=True)
                draw().savefig(path)
                self.artifact(str(path), FIGURES)
            except Exception as error:  # a run can do without an image
                self._warn(f"warning: no {path} ({type(error).__name__}: {error})")

        self._drawing.submit(save)

    def lines(self) -> Iterator[Line]:
        """All of metrics.jsonl."""
        return iter(self._metrics) if self._active else iter(())

    def settle(self, seconds: float | None = None) -> bool:
        """Wait until MLflow has all that it may have, `tracking.flush_timeout_s` at most; whether it has. For what
        comes after the training and asks MLflow itself: `uri` and `run_id` say whom and for what."""
        return self._outbox is not None and self._shipper.drain(self._wait if seconds is None else seconds)

    def finish(self, status: str) -> None:
        """FINISHED, FAILED or KILLED (stopped, to be resumed). Waits for what is not sent as `settle` does, but not
        long after a signal."""
        if self._outbox is None:
            return
        killed = status == "KILLED"
        if status == "FAILED":
            self._show_rest()
        self._drawing.shutdown(wait=not killed, cancel_futures=killed)
        self._event("status", status=status, time=int(time.time() * 1000))
        seconds = min(self._wait, _KILLED_SECONDS) if killed else self._wait
        if not self.settle(seconds):
            output = self._outbox.output
            _say(
                f"tracking: {self._shipper.left()} are not sent to MLflow at {redacted(self.uri)}; they are kept in "
                f"{output}. The next attempt of this run sends them, or: python tools/sync_tracking.py {output}"
            )
        self._shipper.stop()

    def _show_rest(self) -> None:
        """Points that no state covers are no points of MLflow's, as the run may go on and make them again; but where it
        diverged, they are what people look for."""
        assert self._outbox is not None
        path = self._outbox.output / AT_FAILURE
        rest = [json.dumps(line) + "\n" for line in self._outbox.metrics if self._outbox.is_uncovered(line)]
        if not rest:
            return
        try:
            with atomic_write(path) as file:
                file.write("".join(rest).encode())
        except OSError as error:
            self._warn(f"warning: no {path} ({error.strerror})")
        else:
            self.artifact(str(path))

    def _event(self, kind: str, **metadata: Any) -> None:
        if self._outbox is not None:
            self._append(self._outbox.events, {"do": kind, **metadata})
            self._shipper.wake()

    def _warn(self, line: str) -> None:
        """Once a run and kind of trouble."""
        kind = line.partition("(")[0]
        if kind not in self._warned:
            _say(line)
        self._warned.add(kind)


def _say(line: str) -> None:
    tqdm.write(line, file=sys.stderr)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """Of the code that runs, with a word on changes to it; None where nobody knows. A launched run (jobs/launch.py) has
    a copy of the code, and a note."""
    package = Path(__file__).parents[1]
    with contextlib.suppress(OSError, ValueError, KeyError):
        noted = json.loads((package.parents[1] / "code.json").read_text())
        return noted["commit"] + (_CHANGED if noted["changed"] else "")
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        commit, changes = (
            subprocess.run(["git", "-C", package, *command], capture_output=True, text=True, check=True).stdout.strip()
            for command in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no", "--", "."))
        )
        return commit + (_CHANGED if changes else "")
    return None
