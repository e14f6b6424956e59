"""How far an evaluation is on all ranks: finished items and accuracies so far, and whether anybody still works."""

import itertools
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from torch import nn

from fulllora_dist.attacks.threat import Threat
from fulllora_dist.core.units import number_in
from fulllora_dist.distributed.comm import Counters
from fulllora_dist.evaluation.attacks import EvalAttack
from fulllora_dist.evaluation.work_items import WorkItem, passes_of

INTERVAL_SECONDS = 10.0  # between two lines
STILL_SECONDS = 60.0  # without a pass anywhere; the collective that comes next knows whether a rank is gone


class Progress:
    """Counts finished items over all ranks; rank 0 prints their number, their rate, the time left, and the accuracies
    so far of the variant that it did last.

    Args:
        attacks: of the evaluation.
        n: number of its images.
        counters: shared by the ranks.
        world: number of ranks.
        threats: the balls.
        shows: whether this rank, which is rank 0, prints.
    """

    def __init__(
        self,
        attacks: Sequence[EvalAttack],
        n: int,
        counters: Counters,
        world: int,
        threats: Sequence[Threat],
        shows: bool,
    ):
        self._attacks, self._n, self._threats = attacks, n, threats
        self._counters, self._world, self._shows = counters, world, shows
        self._items: list[WorkItem] = []  # of this round and those before
        self._before = self._round = 0
        self._passes: Counter[str] = Counter()  # of each kind, that are to be made
        self._attacked: Counter[tuple[str, int, str]] = Counter()  # images of each variant, ball and attack
        self._started = self._shown_at = time.monotonic()

    def begin(self, number: int, items: Sequence[WorkItem], results: Mapping[str, Any]) -> None:
        """A round of items begins, of which some were done before: AutoAttack's part `number`, or (0) all else."""
        self._round = number
        self._items += items
        resumed = sum(item.name in results for item in items)
        self._before += resumed
        for item in items:
            self._passes[item.kind] += 0 if item.name in results else item.passes
            if item.attack is not None:
                self._attacked[item.variant, item.radius, item.attack.name] += len(item.ids)
            if self._shows:
                self._count(item, results.get(item.name, ()))
        if self._shows and resumed:
            self._print(f"resumes after {resumed} of {len(items)} work items" + (f" of part {number}" * (number > 0)))

    def _count(self, item: WorkItem, correct: Sequence[int]) -> None:
        if item.attack is not None:
            column = (item.variant, item.radius, item.attack.name)
            self._counters.add(f"seen {column}", len(correct))
            self._counters.add(f"correct {column}", sum(value == 1 for value in correct))

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
        shown = []
        for column in self._attacked:
            hits, seen = self._now(f"correct {column}"), self._now(f"seen {column}")
            if column[0] == variant and seen:
                ball = self._threats[column[1]]
                many = len(self._threats) > 1 and column[2] != "clean"
                at_eps = f" at {number_in(ball.norm, ball.eps)}" if many else ""
                parts = EvalAttack.parse(column[2]).parts
                score = f"{hits} of {seen} survive" if parts else f"{hits / seen:.1%}"
                shown.append(f"{parts[-1] if parts else column[2]}{at_eps} {score}")
        accuracies = f"{variant}: {', '.join(shown)}".removeprefix(": ")
        return f"{self._before + done} of {len(self._items)} work items, {rate:.3g}/s, {left} left; {accuracies}"

    def seconds_left(self) -> float:
        """By what finished items of each kind took; a kind of which none is finished takes as long for a pass as the
        others did, and all passes that it may make. AutoAttack's later parts meet as many images as survive what was
        measured at the same eps until now."""
        to_do = Counter(self._passes)
        numbers = ((attack, k) for attack in self._attacks for k in range(self._round + 1, len(attack.parts) + 1))
        later = dict.fromkeys(attack.parts[:k] for attack, k in numbers)
        for variant in dict.fromkeys(variant for variant, _, _ in self._attacked):
            for (radius, threat), parts in itertools.product(enumerate(self._threats), later):
                expected = self._standing(variant, radius, len(parts))
                to_do[parts[-1]] += round(expected * passes_of(parts[-1], threat.norm))
        done = {kind: self._now(f"passes {kind}") for kind in to_do}
        taken = {kind: self._now(f"milliseconds {kind}") / 1000 for kind in to_do}
        mean = sum(taken.values()) / max(1, sum(done.values()))
        pace = {kind: taken[kind] / done[kind] if done[kind] else mean for kind in done}
        return sum((to_do[kind] - done[kind]) * pace[kind] for kind in done) / self._world

    def _standing(self, variant: str, radius: int, part: int) -> float:
        """How many images part number `part` is expected to attack: the first one all that are classified correctly,
        the others no more than any attack has left."""
        expected = [float(self._n)]
        for column, attacked in self._attacked.items():
            clean = column[0] == variant and column[2] == "clean"
            if clean or (part > 1 and column[:2] == (variant, radius)):
                seen = self._now(f"seen {column}")
                expected.append(attacked * self._now(f"correct {column}") / seen if seen else attacked)
        return min(expected)

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


def wait_for_all(counters: Counters, world: int, number: int) -> None:
    """Wait until every rank is here, as long as some rank makes passes: the last items may take longer than the limit
    of a collective. `number` differs from call to call."""
    here = f"here {number}"
    counters.add(here, 1)
    beats, since = -1, time.monotonic()
    while counters.add(here, 0) < world and time.monotonic() - since < STILL_SECONDS:
        time.sleep(0.05)
        if (now := counters.add("beats", 0)) != beats:
            beats, since = now, time.monotonic()
