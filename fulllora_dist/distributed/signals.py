"""Requests to stop: finish the step, save, leave."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# a person's, and those that schedulers send ahead of the end: SLURM the one that --signal names, submitit SIGUSR2
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
ECHO_SECONDS = 1.0  # within it, the same signal again is the launcher's copy of one that a scheduler sent to all


class GracefulStop:
    """SIGINT (Ctrl-C), SIGTERM, SIGUSR1 and SIGUSR2 end the run: at once, by SystemExit, or after the step while
    `deferred`.

    The same signal again, over a second later, leaves without anything, whatever the main thread waits for. Used as a
    context manager around the run; the handlers from before come back at its end.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._elsewhere: int | None = None
        self._deferred = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "GracefulStop":
        arrivals, self._arrival = os.pipe()
        os.set_blocking(self._arrival, False)
        threading.Thread(target=_leave_on_the_second, args=(arrivals,), daemon=True).start()
        self._wakeup_before = signal.set_wakeup_fd(self._arrival, warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._arrival)  # which ends the thread

    @property
    def signal(self) -> int | None:
        """Number of the first signal that came here, else of one that came to another rank, else None."""
        return self._received or self._elsewhere

    def hear(self, number: int) -> None:
        """Another rank got this signal. The same one coming here is then still the first."""
        self._elsewhere = number

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, a signal is only remembered: whoever runs the loop looks at `signal` between steps."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        again, self._received = self.signal is not None, self._received or number
        if not self._deferred and not again:
            raise SystemExit(128 + number)


def _leave_on_the_second(arrivals: int) -> None:
    """In a thread, as a handler would have to wait until the main thread comes back from a collective, if ever."""
    first: dict[int, float] = {}
    while arrived := os.read(arrivals, 1):
        number, now = arrived[0], time.monotonic()
        if number in SIGNALS and now - first.setdefault(number, now) > ECHO_SECONDS:
            os._exit(128 + number)
    os.close(arrivals)
