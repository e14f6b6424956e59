"""Requests to stop: finish the step, save, leave."""

import os
import signal
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Remembers SIGINT (Ctrl-C) or SIGTERM until the step ends; a second one leaves at once.

    Used as a context manager around the loop; the handlers from before come back at its end.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        # a terminal's Ctrl-C and the launcher's own answer to it come as two signals of different kinds
        if self.signal == number:
            os._exit(128 + number)
        self.signal = self.signal or number
