"""Graceful stop on a signal: finish the step, save, exit."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# sent by users, and by schedulers before a time limit: SLURM sends the one named by --signal, submitit SIGUSR2
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
ECHO_SECONDS = 1.0  # a repeat within this time is the launcher forwarding a signal that the scheduler sent to all


class GracefulStop:
    """Ends the run on SIGINT (Ctrl-C), SIGTERM, SIGHUP (the terminal is closed), SIGUSR1 or SIGUSR2: at once by
    SystemExit, or after the step while `deferred`.

    The same signal more than a second later exits immediately without saving, whatever the main thread waits for. Used
    as a context manager around the run; on exit the previous handlers are restored. Under nohup, SIGHUP stays
    ignored.

    Attributes:
        announce: called with the signal's number, whether the end is deferred, and whether it is the second signal, at
            once and from a thread of its own.
    """

    def __init__(self) -> None:
        self.announce: Callable[[int, bool, bool], None] = lambda number, deferred, again: None
        self._received: int | None = None
        self._elsewhere: int | None = None
        self._deferred = self._was_deferred = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "GracefulStop":
        arrivals, self._arrival = os.pipe()
        os.set_blocking(self._arrival, False)
        threading.Thread(target=self._watch, args=(arrivals,), daemon=True).start()
        self._wakeup_before = signal.set_wakeup_fd(self._arrival, warn_on_full_buffer=False)
        nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        heard = [number for number in SIGNALS if not (nohup and number == signal.SIGHUP)]
        self._before = {number: signal.signal(number, self._on_signal) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._arrival)  # which ends the thread

    @property
    def signal(self) -> int | None:
        """Number of the first signal received here, else of one received by another rank, else None."""
        return self._received or self._elsewhere

    def hear(self, number: int) -> None:
        """Note that another rank received this signal. If it also arrives here, it counts as the first."""
        self._elsewhere = number

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, a signal is only recorded: the training loop checks `signal` between steps."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        again, self._received = self.signal is not None, self._received or number
        self._was_deferred |= self._deferred
        if not self._deferred and not again:
            raise SystemExit(128 + number)

    def _watch(self, arrivals: int) -> None:
        """Announce the first signal, and exit on a repeated one. Runs in a thread, as a handler would wait until the
        main thread returns from a collective, which may never happen."""
        first: dict[int, float] = {}
        while arrived := os.read(arrivals, 1):
            number, now = arrived[0], time.monotonic()
            if number not in self._before:
                continue
            if not first:
                # a quick step may be over by now
                self.announce(number, self._deferred or self._was_deferred, False)
            if now - first.setdefault(number, now) > ECHO_SECONDS:
                self.announce(number, self._deferred, True)
                os._exit(128 + number)
        os.close(arrivals)
