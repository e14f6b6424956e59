"""From the outbox to MLflow, in a thread: a store that is down, slow or not yet there delays, and loses nothing."""

import threading
import time
from collections.abc import Callable
from typing import Any

from fulllora_dist.core.messages import one_line, redacted
from fulllora_dist.tracking.mlflow_run import ARTIFACTS, MlflowRun, Refused
from fulllora_dist.tracking.outbox import Outbox

_FIRST_PAUSE, _MAX_PAUSE = 1.0, 30.0  # seconds
_LINES = 200  # sent before the position is saved
_PROGRESS_SECONDS = 5.0


class Shipper:
    """Sends what the outbox holds, in one thread; the training's thread calls `wake` alone.

    Args:
        outbox: of the run.
        uri: of the store.
        experiment, run_name: of a run that is created there.
        say: prints a line for people.
    """

    def __init__(self, outbox: Outbox, uri: str, experiment: str, run_name: str, say: Callable[[str], None]):
        self._outbox, self._uri, self._say = outbox, uri, say
        self._named = experiment, run_name
        self._run: MlflowRun | None = None
        self._failing_since: float | None = None
        self._waking, self._hurry, self._ending = (threading.Event() for _ in range(3))
        self._idle = threading.Event()  # all that may be sent is sent
        self._lock = threading.Lock()  # an idle one has not been woken
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)

    def start(self) -> None:
        """Begin to send, now and whenever there is something."""
        self.wake()
        self._thread.start()

    def wake(self) -> None:
        """There is something to send."""
        with self._lock:
            self._idle.clear()
            self._waking.set()

    def drain(self, seconds: float) -> bool:
        """Wait until all is sent, for `seconds` at most; whether it is. Reports progress."""
        self._hurry.set()
        self.wake()
        deadline = time.monotonic() + seconds
        while not self._idle.wait(max(0.0, min(_PROGRESS_SECONDS, deadline - time.monotonic()))):
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return False
            self._say(f"tracking: sending {self.pending()} to {redacted(self._uri)}; giving up in {remaining:.0f} s")
        return True

    def stop(self) -> None:
        """Send no more; a call in progress ends with the process."""
        for event in (self._ending, self._hurry, self._waking):
            event.set()
        self._thread.join(1.0)

    def pending(self) -> str:
        """What is not yet sent, for people."""
        metrics, entries = self._outbox.unsent()
        return f"{metrics:,} metric values and {entries} other entries"

    def _work(self) -> None:
        pause = 0.0
        while not self._ending.is_set():
            if not pause:
                self._waking.wait()
            elif not self._hurry.is_set():
                self._hurry.wait(pause)
            else:
                self._ending.wait(min(pause, _FIRST_PAUSE))
            if self._ending.is_set():
                return
            self._waking.clear()
            try:
                run = self._opened()
                self._send_metrics(run)
                self._send_events(run)
            except Exception as error:  # whatever a store does, training continues; the rest is sent next time
                pause = min(2 * pause, _MAX_PAUSE) or _FIRST_PAUSE
                self._failed(error)
            else:
                pause = 0.0
                self._answered()
                with self._lock:
                    if not self._waking.is_set():
                        self._idle.set()

    def _failed(self, error: Exception) -> None:
        if self._failing_since is None:
            self._failing_since = time.monotonic()
            self._say(
                f"warning: MLflow at {redacted(self._uri)} is unreachable ({_reason(error)}); "
                f"buffering in {self._outbox.output} and retrying"
            )

    def _answered(self) -> None:
        if self._failing_since is not None:
            outage, self._failing_since = time.monotonic() - self._failing_since, None
            self._say(f"MLflow at {redacted(self._uri)} is reachable again: all of {outage:.0f} s is sent")

    def _opened(self) -> MlflowRun:
        if self._run is not None:
            return self._run
        outbox, store = self._outbox, redacted(self._uri)
        elsewhere = outbox.store is not None and outbox.store != store
        run = MlflowRun(self._uri, *self._named, outbox.key, None if elsewhere else outbox.run_id, outbox.started)
        if elsewhere or run.is_new:
            outbox.forget_sent()
        outbox.run_id, outbox.store = run.id, store
        outbox.save()
        for run_id in list(outbox.ended):
            run.end(run_id, outbox.ended[run_id])
            del outbox.ended[run_id]
        outbox.save()
        self._run = run
        return run

    def _send_metrics(self, run: MlflowRun) -> None:
        outbox = self._outbox
        for spool, until in ((outbox.metrics, outbox.is_uncovered), (outbox.system, lambda line: False)):
            while (part := spool.unsent(_LINES, until)).lines:
                for name, reason in run.log(line for line, _ in part.lines).items():
                    self._say(
                        f"warning: MLflow at {redacted(self._uri)} rejects the metric {name!r} ({reason}); it is "
                        f"only in {spool.path}"
                    )
                spool.confirm(part)
                outbox.save()

    def _send_events(self, run: MlflowRun) -> None:
        """In order. An artifact store that fails holds up artifacts alone: the rest is done, and repeated once the
        artifacts are, which changes nothing."""
        outbox = self._outbox
        failed: Any = None
        part = outbox.events.unsent()
        for number, (event, _) in enumerate(part.lines, 1):
            if failed is not None and event["do"] in ARTIFACTS:
                continue
            try:
                run.do(event, str(outbox.output))
            except Refused as error:
                self._say(f"warning: MLflow at {redacted(self._uri)} rejects {event['do']} ({error})")
            except Exception as error:
                if event["do"] not in ARTIFACTS:
                    raise
                failed = error
            if failed is None:
                outbox.events.confirm(part, number)
                outbox.save()
        if failed is not None:
            raise failed


def _reason(error: BaseException) -> str:
    """The root cause, in a line."""
    root = error
    while (below := root.__cause__ or root.__context__) is not None:
        root = below
    return one_line((isinstance(root, OSError) and root.strerror) or str(root) or type(root).__name__)
