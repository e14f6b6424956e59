"""What a run logs, in files of its output folder; `shipping.py` sends them.

metrics.jsonl           metrics of the training, cut back with it
tracking/system.jsonl   metrics of the machines
tracking/events.jsonl   parameters, tags, data sets, artifacts, statuses, in the order in which to set them
tracking/covered        the batch up to which a durable checkpoint covers metrics.jsonl
tracking/sent.json      the MLflow run, and how much of each of the three it has
"""

import json
import secrets
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fulllora_dist.core.atomic import write_text
from fulllora_dist.tracking.spool import Dropped, Line, Position, Spool, metrics_of, step_of

METRICS = "metrics.jsonl"
FOLDER = "tracking"


class Outbox:
    """Attributes:
    metrics, system, events: the files.
    key: the run's own key, by which a store finds it.
    run_id, store: of MLflow, once known; the id belongs to that store.
    ended: {id: status} of earlier MLflow runs of this folder, still to be set.
    covered: batch up to which a durable checkpoint covers the metrics: these may be sent.
    """

    def __init__(self, output: str):
        self.output = Path(output)
        self._folder = self.output / FOLDER
        self._lock = threading.Lock()  # of sent.json
        saved: dict[str, Any] = {}
        with suppress(OSError, ValueError):
            saved = json.loads((self._folder / "sent.json").read_text())
        self.key: str = saved.get("key") or secrets.token_hex(16)
        self.run_id: str | None = saved.get("run_id")
        self.store: str | None = saved.get("store")
        self.ended: dict[str, str] = saved.get("ended", {})
        self._times: dict[str, int] = saved.get("times", {})
        folders = {"metrics": self.output, "system": self._folder, "events": self._folder}
        sent = saved.get("sent", {})
        self._spools = {
            name: Spool(folder / f"{name}.jsonl", Position(*sent.get(name, ()))) for name, folder in folders.items()
        }
        self.metrics, self.system, self.events = self._spools.values()
        self.covered = 0
        with suppress(OSError, ValueError):
            self.covered = int((self._folder / "covered").read_text())

    def begin(self, run_id: str | None, step: int) -> None:
        """A process of the run resumes from its checkpoint after batch `step`, 0 where there is none.

        Args:
            run_id: of MLflow, as recorded in the checkpoint.
        """
        self._folder.mkdir(exist_ok=True)
        anew = run_id is None and step == 0 and self.metrics.sent.size > 0
        if anew:
            # the checkpoints that covered what was sent are lost: that run has failed, and this is another
            if self.run_id is not None:
                self.ended[self.run_id] = "FAILED"
            self.key, self.run_id = secrets.token_hex(16), None
            self._times = {}
        else:
            self.run_id = run_id or self.run_id
        for spool in (self.events, self.system):
            spool.cut(lambda line: not anew)  # half a line goes anyway
        self.cut_back(step)

    def cut_back(self, step: int, keep: Callable[[Dropped], None] = lambda dropped: None) -> None:
        """Training resumes from batch `step`. MLflow keeps those of the later metrics that it has.

        Args:
            keep: is given the lines of metrics.jsonl that are dropped, before they are.

        Raises:
            OSError: the disk cannot be written; no line is dropped.
        """

        def before(dropped: Dropped) -> None:
            keep(dropped)
            for _, line, was_sent in dropped:
                # a covered one may be in flight, or its answer lost: MLflow has it, or will
                if line is not None and (was_sent or not self.is_uncovered(line)):
                    self._times[_content(line)] = line["time"]
            self.cover(step)
            self.save()

        self.metrics.cut(lambda line: belongs(line, step), before)

    def earlier_time(self, line: Line) -> int | None:
        """Time of the same line, in ms, if it may have been sent before the training was rolled back: MLflow then
        takes the two for one."""
        return self._times.get(_content(line)) if self._times else None

    def cover(self, step: int) -> None:
        """A durable checkpoint covers everything up to `step`. Written for whoever sends after this process has ended,
        without waiting for the disk: if that is lost, less is sent until the run is resumed.

        Raises:
            OSError: it is only in memory.
        """
        self.covered = step
        (self._folder / "covered").write_text(str(step))

    def is_uncovered(self, line: Line) -> bool:
        """Whether a line of metrics.jsonl has to wait for a checkpoint."""
        return step_of(line) > self.covered

    @property
    def started(self) -> int | None:
        """When the run began, in ms."""
        return next((event["time"] for event in self.events if event["do"] == "status"), None)

    def forget_sent(self) -> None:
        """For a store, or a run, that has nothing yet."""
        for spool in self._spools.values():
            spool.rewind()

    def unsent(self) -> tuple[int, int]:
        """How many metric values, and how many parameters, tags, artifacts and the like, are waiting to be sent."""
        lines = [*self.metrics.unsent(until=self.is_uncovered).lines, *self.system.unsent().lines]
        return sum(len(metrics_of(line)) for line, _ in lines), len(self.events.unsent().lines)

    def save(self) -> None:
        """Write sent.json."""
        with self._lock:
            content = {
                "key": self.key,
                "store": self.store,
                "run_id": self.run_id,
                "ended": self.ended,
                "sent": {name: [spool.sent.size, spool.sent.crc] for name, spool in self._spools.items()},
                "times": self._times,
            }
            write_text(self._folder / "sent.json", json.dumps(content))


def belongs(line: Line, step: int) -> bool:
    """Whether a line of metrics.jsonl stays when training resumes from batch `step`. The final evaluation comes after
    the last checkpoint, and is repeated."""
    return step_of(line) <= step and not any(name.startswith("eval/") for name in line)


def _content(line: Mapping[str, Any]) -> str:
    """A line without its time."""
    return json.dumps({name: value for name, value in line.items() if name != "time"}, sort_keys=True)
