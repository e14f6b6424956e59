"""How far an evaluation is on all ranks: finished items and accuracies so far, and whether anybody still works."""

import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from torch import nn

from fulllora_dist.distributed.comm import Counters
from fulllora_dist.evaluation.work_items import WorkItem

INTERVAL_SECONDS = 10.0  # between two lines
STILL_SECONDS = 60.0  # without a pass anywhere; the collective that comes next knows whether a rank is gone


class Progress:
    """Counts finished items over all ranks; rank 0 prints their number, their rate, the time left, and the accuracies
    so far of the variant that it did last.

    Args:
        items: all of the evaluation.
        results: of those that were done before, by their names.
        counters: shared by the ranks.
        world: number of ranks.
        sizes: of the balls, as they are written.
        shows: whether this rank, which is rank 0, prints.
    """

    def __init__(
        self,
        items: Sequence[WorkItem],
        results: Mapping[str, Any],
        counters: Counters,
        world: int,
        sizes: Sequence[str],
        shows: bool,
    ):
        self._items, self._sizes, self._counters, self._world, self._shows = items, sizes, counters, world, shows
        self._before = sum(item.name in results for item in items)
        self._passes: Counter[str] = Counter()  # of each kind, that are to be made
        for item in items:
            self._passes[item.kind] += 0 if item.name in results else item.passes
        self._started = self._shown_at = time.monotonic()
        if shows:
            for item in items:
                self._count(item, results.get(item.name, ()))
            if self._before:
                self._print(f"resumes after {self._before} of {len(items)} work items")

    def _count(self, item: WorkItem, correct: Sequence[int]) -> None:
        if item.attack is not None:
            self._counters.add(f"seen {self._column(item)}", len(correct))
            self._counters.add(f"correct {self._column(item)}", sum(value == 1 for value in correct))

    def _column(self, item: WorkItem) -> str:
        at_eps = f" at {self._sizes[item.radius]}" if len(self._sizes) > 1 and item.kind != "clean" else ""
        return f"{item.variant}: {item.kind}{at_eps}"

    def finished(self, item: WorkItem, result: Any, seconds: float) -> None:
        """This rank has done an item, in so many seconds."""
        for what, number in (("items", 1), ("passes", item.passes), ("milliseconds", round(1000 * seconds))):
            self._counters.add(f"{what} {item.kind}", number)
        self._count(item, result)
        if self._shows and time.monotonic() - self._shown_at > INTERVAL_SECONDS:
            self._shown_at = time.monotonic()
            self._print(self.line(item.variant))

    def line(self, variant: str = "") -> str:
        """What rank 0 prints, of all ranks."""
        done = sum(self._now(f"items {kind}") for kind in self._passes)
        rate = done / (time.monotonic() - self._started)
        left = timedelta(seconds=round(self.seconds_left()))
        columns = dict.fromkeys(self._column(item) for item in self._items if item.attack and item.variant == variant)
        counts = {name: (self._now(f"correct {name}"), self._now(f"seen {name}")) for name in columns}
        accuracies = [f"{name.partition(': ')[2]} {hits / n:.1%}" for name, (hits, n) in counts.items() if n]
        shown = f"{variant}: {', '.join(accuracies)}".removeprefix(": ")
        return f"{self._before + done} of {len(self._items)} work items, {rate:.3g}/s, {left} left; {shown}"

    def seconds_left(self) -> float:
        """By what finished items of each kind took; a kind of which none is finished takes as long for a pass as the
        others did, and all passes that it may make."""
        done = {kind: self._now(f"passes {kind}") for kind in self._passes}
        taken = {kind: self._now(f"milliseconds {kind}") / 1000 for kind in self._passes}
        mean = sum(taken.values()) / max(1, sum(done.values()))
        pace = {kind: taken[kind] / done[kind] if done[kind] else mean for kind in done}
        return sum((self._passes[kind] - done[kind]) * pace[kind] for kind in done) / self._world

    def _now(self, name: str) -> int:
        return self._counters.add(name, 0)

    def _print(self, text: str) -> None:
        print(f"evaluation: {text}", file=sys.stderr, flush=True)


@contextmanager
def heartbeat(predict: nn.Module, counters: Counters) -> Iterator[None]:
    """Inside, forward passes of this rank tell the others that it works, once a second."""
    told = 0.0

    def beat(*_: object) -> None:
        nonlocal told
        if time.monotonic() - told > 1:
            told = time.monotonic()
            counters.add("beats", 1)

    handle = predict.register_forward_hook(beat)
    try:
        yield
    finally:
        handle.remove()


def wait_for_all(counters: Counters, world: int) -> None:
    """Wait until every rank is here, as long as some rank makes passes: the last items may take longer than the limit
    of a collective."""
    counters.add("here", 1)
    beats, since = -1, time.monotonic()
    while counters.add("here", 0) < world and time.monotonic() - since < STILL_SECONDS:
        time.sleep(0.05)
        if (now := counters.add("beats", 0)) != beats:
            beats, since = now, time.monotonic()
