"""Requests to stop: finish the step, save, leave."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    """SIGINT (Ctrl-C), SIGTERM and SIGUSR1/2 (a scheduler's) end the run: at once, by SystemExit, or
    after the step while `deferred`.

    A second SIGINT leaves without anything. Used as a context manager around the run; the handlers
    from before come back at its end.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._elsewhere: int | None = None
        self._deferred = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

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
        # only a person asks twice: a scheduler signals the ranks, and the launcher, signalled too, signals them again
        if self._received == number == signal.SIGINT:
            os._exit(128 + number)
        again, self._received = self._received is not None, self._received or number
        if not self._deferred and not again:
            raise SystemExit(128 + number)
