"""A file of JSON lines that one thread appends to and another sends from.

What was sent is a position in the file. It is kept elsewhere, and believed only while the file still begins with the
bytes that were sent: whatever else happened to one of the two, everything is sent again, which adds nothing where the
lines carry their own time.
"""

import contextlib
import json
import math
import os
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fulllora_dist.core.atomic import atomic_write

_BLOCK = 1 << 20  # bytes read at once where a position is checked

Line = dict[str, Any]
Dropped = list[tuple[str, Line | None, bool]]
"""Lines that are cut off, what they say (None where one is torn), and whether each has been sent."""


@dataclass(frozen=True)
class Position:
    """So many bytes (`size`) from the beginning of a file, and their CRC-32."""

    size: int = 0
    crc: int = 0

    def behind(self, text: bytes) -> "Position":
        """After `text`, which follows here."""
        return Position(self.size + len(text), zlib.crc32(text, self.crc))


@dataclass(frozen=True)
class Part:
    """Lines to send, in order.

    Attributes:
        lines: each with the position behind it.
        cuts: how often the file had been cut when they were read.
    """

    lines: list[tuple[Line, Position]]
    cuts: int


class Spool:
    """Any thread may append, one sends, and one cuts; none waits for another's network.

    Args:
        path: the file; created by the first line.
        sent: position recorded by an earlier process.
    """

    def __init__(self, path: Path, sent: Position = Position()):
        self.path = path
        self.sent = sent if _begins_with(path, sent) else Position()
        self._lock = threading.Lock()  # of `sent` and `_cuts`
        self._writing = threading.Lock()  # of the file and `_unwritten`
        self._cuts = 0
        self._unwritten = b""

    def append(self, line: Mapping[str, Any]) -> None:
        """Write a line. What a full disk does not take is retried with the next line; half a line is never left.

        Raises:
            OSError: the line is only in memory for now.
        """
        with self._writing:
            self._unwritten += (json.dumps(line) + "\n").encode()
            self._flush()

    def _flush(self) -> None:
        if not self._unwritten:
            return
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with open(self.path, "ab") as file:
                file.write(self._unwritten)
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(self.path, size)
            raise
        self._unwritten = b""

    def __iter__(self) -> Iterator[Line]:
        """All whole lines."""
        return (line for _, line in self._read(0) if line is not None)

    def unsent(self, at_most: int | None = None, until: Callable[[Line], bool] = lambda line: False) -> Part:
        """The lines to send next: up to `at_most`, and none from the first one on that `until` holds for."""
        with self._lock:
            position, cuts = self.sent, self._cuts
        lines: list[tuple[Line, Position]] = []
        for text, line in self._read(position.size):
            if line is not None and (until(line) or len(lines) == at_most):
                break
            position = position.behind(text)
            if line is not None:
                lines.append((line, position))
        return Part(lines, cuts)

    def confirm(self, part: Part, lines: int | None = None) -> None:
        """Its first `lines` lines, or all, have been sent. A file that was cut in the meantime says so itself."""
        with self._lock:
            if self._cuts == part.cuts:
                self.sent = part.lines[-1 if lines is None else lines - 1][1]

    def rewind(self) -> None:
        """Everything is to be sent again."""
        self._replace(Position())

    def cut(self, stays: Callable[[Line], bool], before: Callable[[Dropped], None] = lambda dropped: None) -> None:
        """Drop lines, and the torn one that a kill left.

        Args:
            stays: whether a line does.
            before: called before the file is changed; `sent` is already that of the file to come.

        Raises:
            OSError: the file is as it was, and `sent` less than it was.
        """
        with self._writing:
            self._flush()
            kept, dropped = [], []
            end, sent = 0, Position()
            for text, line in self._read(0, torn=True):
                end += len(text)
                was_sent = end <= self.sent.size
                if line is not None and stays(line):
                    kept.append(text)
                    sent = sent.behind(text) if was_sent else sent
                else:
                    dropped.append((text.decode(errors="replace"), line, was_sent))
            self._replace(sent)
            before(dropped)
            if dropped:
                with atomic_write(self.path) as whole:
                    whole.write(b"".join(kept))
                self._replace(sent)  # what was read or confirmed in the meantime was of the old file

    def _replace(self, sent: Position) -> None:
        with self._lock:
            self.sent, self._cuts = sent, self._cuts + 1

    def _read(self, start: int, torn: bool = False) -> Iterator[tuple[bytes, Line | None]]:
        """(bytes, content) of the lines from `start` on; the content of an invalid one is None. A last line without its
        end is still being written, or was `torn` by a kill."""
        if not self.path.exists():
            return
        with open(self.path, "rb") as file:
            file.seek(start)
            for text in file:
                if not text.endswith(b"\n"):
                    if torn:
                        yield text, None
                    return
                try:
                    line = json.loads(text)
                except ValueError:
                    line = None
                yield text, line if isinstance(line, dict) else None


def step_of(line: Mapping[str, Any]) -> float:
    """Infinity for a line without one."""
    step = line.get("step")
    return step if isinstance(step, int) else math.inf


def metrics_of(line: Mapping[str, Any]) -> dict[str, float]:
    """{name: value} of its finite numbers."""
    values = {name: value for name, value in line.items() if name not in ("step", "time")}
    return {name: value for name, value in values.items() if isinstance(value, int | float) and math.isfinite(value)}


def _begins_with(path: Path, sent: Position) -> bool:
    at = Position()
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        while at.size < sent.size and (block := file.read(min(sent.size - at.size, _BLOCK))):
            at = at.behind(block)
    return at == sent
