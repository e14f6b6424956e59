"""Names the rank for which the others wait: with its host, batch, phase and Python stack, in one line.

A thread of every rank writes a `Beat` into the ranks' key-value store every few seconds: no collective, nothing on the
device. Rank 0's reads those of all once its own main thread has not got on for a while. Where rank 0 itself does not
answer, and its store with it, one other rank of its host and one of another host say so. Nothing is ended here: that
is the timeout of collectives (`Comm.patience`).
"""

import contextlib
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType

import psutil
import torch.distributed as dist

from fulllora_dist.distributed import comm as comm_module
from fulllora_dist.distributed.comm import FLIGHT_RECORDS, Comm, processes

BEAT_S = 5.0
"""Seconds between two beats of a rank."""
WARN_S = 60.0
"""Seconds without progress after which the missing ranks are named."""
_LONGEST_PAUSE = 10.0  # times WARN_S, between two lines about the same ranks
_FRAMES, _RANKS = 8, 4  # shown of a stack, and of the missing ranks
_PLUMBING = ("/torch/nn/modules/module.py", "/torch/utils/_contextlib.py", "/torch/distributed/c10d_logger.py")
_COLLECTIVES = (os.path.dirname(dist.__file__) + os.sep, comm_module.__file__)
"""Files in whose frames the host computes nothing, so that it waits there for other ranks."""
_watching: "Watchdog | None" = None


@dataclass(frozen=True)
class Beat:
    """Where a rank is.

    Attributes:
        number: beats so far.
        phases: phases begun so far: equal on ranks that are equally far.
        step: batches trained on; -1 outside of the training.
        phase, seconds: what it does, and since when.
        stack: of the main thread, innermost frame first; empty where the phase has just begun.
        waits: whether the main thread waits for other ranks.
        held: child processes that are stopped, or wait for a disk.
        same: seconds since the stack was another one.
    """

    number: int
    phases: int
    step: int
    phase: str
    seconds: float
    stack: str = ""
    waits: bool = False
    held: str = ""
    same: float = 0.0

    @property
    def place(self) -> str:
        return f"in batch {self.step + 1}, {self.phase}" if self.step >= 0 else f"in {self.phase}"


class Watchdog:
    """Watches this rank and, on rank 0, all of them. Used as a context manager around the run.

    Args:
        comm: the ranks; nothing is started where there is only one.

    Attributes:
        step: number of batches trained on; -1 outside of the training.
        named: what the last line said of the missing ranks, without stacks; None while there is progress.
    """

    def __init__(self, comm: Comm):
        self.step: Callable[[], int] = lambda: -1
        self.named: str | None = None
        self._comm = comm
        self._begun = (0, "start", time.monotonic())
        self._stack = ("", 0.0)  # the last one, and when it was first seen
        self._number = 0
        self._end = threading.Event()
        self._heard = 0.0  # when rank 0's last beat came, on the ranks that look after it
        self._seen: dict[int, tuple[int, float]] = {}  # the last beat of each rank, and when it came
        self._said: tuple[tuple[int, ...], float, float] = ((), 0.0, 0.0)  # who was named, the pause, and its end

    def enter(self, phase: str) -> None:
        """The main thread begins a phase. All ranks call this equally often."""
        self._begun = (self._begun[0] + 1, phase, time.monotonic())

    def __enter__(self) -> "Watchdog":
        global _watching
        if self._comm.world > 1:
            _watching = self
            store = dist.distributed_c10d._get_default_store().clone()  # a connection that no collective waits on
            self._tell(store)
            threading.Thread(target=self._watch, args=(store,), name="watchdog", daemon=True).start()
            if self._comm.rank in _deputies():
                threading.Thread(target=self._watch_rank0, name="watchdog-of-rank-0", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.end()

    def end(self) -> None:
        """No rank waits for another one from here on."""
        self._end.set()

    # -- the threads ---------------------------------------------------------------------------------------------------

    def _watch(self, store: dist.Store) -> None:
        heard = -1
        with contextlib.suppress(RuntimeError):  # the store ends with rank 0
            while not self._end.wait(BEAT_S):
                self._tell(store)
                if self._still() < WARN_S / 2:
                    self._seen.clear()
                    self.named = None
                elif self._comm.is_main:
                    self._look(store)
                elif self._comm.rank in _deputies() and (number := _read(store, [0])[0].number) != heard:
                    heard, self._heard = number, time.monotonic()

    def _watch_rank0(self) -> None:
        last = time.monotonic()
        while not self._end.wait(BEAT_S):
            now = time.monotonic()
            if self._still() < WARN_S / 2 or now - last > 3 * BEAT_S:  # this process may have been stopped itself
                self._heard = now
            elif self._still() > WARN_S and (silent := now - self._heard) > WARN_S / 2:
                self._say([0], f"{_who([0])} has not answered for {silent:.0f} s", _NO_ANSWER)
            last = now

    def _still(self) -> float:
        """Seconds since the main thread began its phase."""
        return time.monotonic() - self._begun[2]

    def _tell(self, store: dist.Store) -> None:
        phases, phase, since = self._begun
        now, self._number = time.monotonic(), self._number + 1
        seconds = now - since
        told: tuple = ()
        if seconds > WARN_S / 4:
            stack, waits = _main_stack()
            if stack != self._stack[0]:
                self._stack = stack, now
            told = stack, waits, _held(), now - self._stack[1]
        store.set(f"watchdog/{self._comm.rank}", json.dumps([self._number, phases, self.step(), phase, seconds, *told]))

    def _look(self, store: dist.Store) -> None:
        beats, now = dict(enumerate(_read(store, range(self._comm.world)))), time.monotonic()
        for rank, beat in beats.items():
            if rank not in self._seen or self._seen[rank][0] != beat.number:
                self._seen[rank] = beat.number, now
        silent = {rank: now - since for rank, (_, since) in self._seen.items() if now - since > WARN_S / 2}
        if self._still() > WARN_S and (found := missing(beats, silent)):
            self._say(*found)

    def _say(self, ranks: Sequence[int], named: str, details: str) -> None:
        now, (before, pause, until) = time.monotonic(), self._said
        self.named = named
        if before != tuple(ranks):
            pause = WARN_S / 2
        elif now < until:
            return
        pause = min(2 * pause, _LONGEST_PAUSE * WARN_S)
        self._said = tuple(ranks), pause, now + pause
        minutes = self._comm.patience.total_seconds() / 60
        ends = f"; in training the limit is {minutes:.3g} minutes (distributed.timeout_minutes)"
        dump = os.environ.get(FLIGHT_RECORDS) if self._comm.device.type == "cuda" else None
        dump = f"; at the limit NCCL's collectives are written to {dump}*" if dump else ""
        _to_stderr(f"warning: no progress for {self._still():.0f} s: {named}; {details}{ends}{dump}")


_NO_ANSWER = "its process is stopped, its host is gone, or it hangs outside of Python"


def missing(beats: Mapping[int, Beat], silent: Mapping[int, float]) -> tuple[list[int], str, str] | None:
    """The ranks that the others wait for, where they are, and details of that; None where all are at work alike.

    Args:
        beats: of all ranks.
        silent: seconds since the last beat of those that do not answer.
    """
    if silent:
        first = min(silent)
        last = f"has not answered for {silent[first]:.0f} s, last heard of {beats[first].place}"
        return sorted(silent), f"{_who(sorted(silent))} {last}", _NO_ANSWER
    ahead = max(beat.phases for beat in beats.values())
    waited = max(beat.seconds for beat in beats.values() if beat.phases == ahead)
    behind = [rank for rank, beat in beats.items() if beat.phases < ahead and not beat.waits]
    if behind:
        beat = beats[behind[0]]
        held = f"; its processes {beat.held}" if beat.held else ""
        where, details = f"is still {beat.place}, for {beat.seconds:.0f} s", f"at {beat.stack or 'its beginning'}{held}"
        return (behind, f"{_who(behind)} {where}", details) if waited > WARN_S / 2 else None
    if not all(beat.waits and beat.same > WARN_S / 2 for beat in beats.values()):
        return None
    groups: dict[tuple[int, str], list[int]] = {}
    for rank, beat in beats.items():
        groups.setdefault((beat.phases, beat.stack), []).append(rank)
    odd, *others = sorted(groups.values(), key=lambda ranks: (len(ranks), 0 in ranks))
    here = beats[odd[0]]
    if not others:
        network = f"at {here.stack}; the network between them may be gone"
        return odd, f"all ranks wait in the same collective, {here.place}", network
    there = beats[others[-1][0]]
    rest = f"at {here.stack}; rank {others[-1][0]} waits {there.place}, at {there.stack}"
    return odd, f"{_who(odd)} waits in another collective than the others, {here.place}", rest


def named() -> str | None:
    """What is known of the ranks that are missing now; on rank 0."""
    return _watching.named if _watching else None


def _deputies() -> set[int]:
    """The ranks that say so where rank 0 does not answer."""
    hosts = [host for host, _ in processes()]
    return {1, next((rank for rank, host in enumerate(hosts) if host != hosts[0]), 1)}


def _read(store: dist.Store, ranks: Sequence[int]) -> list[Beat]:
    return [Beat(*json.loads(text)) for text in store.multi_get([f"watchdog/{rank}" for rank in ranks])]


def _who(ranks: Sequence[int]) -> str:
    known = processes()
    shown = [f"rank {rank} ({known[rank][0]}, process {known[rank][1]})" for rank in ranks[:_RANKS]]
    return ", ".join(shown) + (f" and {len(ranks) - _RANKS} more" if len(ranks) > _RANKS else "")


def _main_stack() -> tuple[str, bool]:
    """Of the main thread, and whether it waits for other ranks."""
    frames = traceback.walk_stack(sys._current_frames()[threading.main_thread().ident or 0])
    places = [(frame.f_code.co_filename, line, frame.f_code.co_name) for frame, line in frames]
    shown = [place for place in places if not place[0].endswith(_PLUMBING)][:_FRAMES]
    stack = " < ".join(f"{'/'.join(file.split('/')[-2:])}:{line} {name}" for file, line, name in shown)
    return stack, places[0][0].startswith(_COLLECTIVES)


def _held() -> str:
    with contextlib.suppress(psutil.Error):
        children = [(child.pid, child.status()) for child in psutil.Process().children(recursive=True)]
        held = (psutil.STATUS_STOPPED, psutil.STATUS_DISK_SLEEP)
        return ", ".join(f"{pid} ({status})" for pid, status in children if status in held)
    return ""


def _to_stderr(line: str) -> None:
    os.write(2, f"\n{line}\n".encode())  # not by print: the main thread may hold its lock
