"""What a rank takes at a time in an evaluation, and how far all ranks are."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from fulllora_dist.distributed.comm import Counters
from fulllora_dist.evaluation.attacks import EvalAttack

_CHECK_PASSES = 500  # of an image under all checks
STILL_SECONDS = 60.0  # without a pass anywhere; the collective that comes next knows whether a rank is gone


@dataclass(frozen=True)
class WorkItem:
    """One attack at one eps on one batch, or the checks (attack None), of one variant of the model."""

    name: str
    variant: str
    attack: EvalAttack | None
    radius: int  # number of the threat
    ids: np.ndarray

    @property
    def kind(self) -> str:
        return "checks" if self.attack is None else self.attack.name

    @property
    def passes(self) -> int:
        """At most, where an attack leaves out images that have fallen."""
        return len(self.ids) * (_CHECK_PASSES if self.attack is None else self.attack.passes)


class WorkQueue:
    """A bar over the passes of all ranks on rank 0, with the figures so far of the variant that it did last; brought up
    to date by each forward pass, at most once a second. What is left of an attack is reckoned by what its pieces have
    really taken, as most images fall before AutoAttack has made all its passes."""

    def __init__(
        self,
        items: list[WorkItem],
        left: list[WorkItem],
        known: dict[str, Any],
        counters: Counters,
        sizes: list[str],
        shows: bool,
    ):
        self.counters = counters
        self._sizes = sizes
        self._here = self._told = 0  # passes of the piece that is under way on this rank, and what all know of them
        self._left: dict[str, int] = {}
        for item in left:
            self._left[item.kind] = self._left.get(item.kind, 0) + item.passes
        total = sum(item.passes for item in items)
        self._known = total - sum(self._left.values())
        self._before: dict[str, int] = {}
        for item in items:
            if item.name in known:
                self._count(self._before, item, known[item.name])
        self._figures = {(item.variant, self._name(item)): None for item in items if item.attack}
        self._variant = items[0].variant
        self._shown_at = time.monotonic()
        self._bar = tqdm(
            total=total,
            initial=self._known,
            desc="evaluation",
            unit="pass",
            unit_scale=True,
            disable=not shows,
            dynamic_ncols=True,
            mininterval=0.5,
        )

    @staticmethod
    def _name(item: WorkItem) -> str:
        return f"{item.kind}#{item.radius}"

    def _count(self, into: dict[str, int], item: WorkItem, result: Any) -> None:
        if item.attack is not None:
            for what, number in (("seen", len(result)), ("right", sum(result))):
                key = f"{what} {item.variant} {self._name(item)}"
                into[key] = into.get(key, 0) + number

    def __enter__(self) -> "WorkQueue":
        return self

    def __exit__(self, *_: object) -> None:
        self._show()
        self._bar.close()

    @contextmanager
    def seen(self, predict: nn.Module) -> Iterator[None]:
        """Inside, forward passes keep the bar alive through a long attack."""

        def tick(_: nn.Module, inputs: tuple[Tensor, ...], __: object) -> None:
            self._here += len(inputs[0]) * (1 + torch.is_grad_enabled())  # the backward pass is to come
            if time.monotonic() - self._shown_at > 1:
                self.counters.add("alive", 1)
                self._tell(self._here)
                self._show()

        handle = predict.register_forward_hook(tick)
        try:
            yield
        finally:
            handle.remove()

    def _tell(self, passes: int) -> None:
        self.counters.add("under way", passes - self._told)
        self._told = passes

    def add(self, item: WorkItem, result: Any) -> None:
        """A piece is done on this rank."""
        self._variant = item.variant
        self._tell(0)
        self.counters.add(f"made {item.kind}", self._here)
        self.counters.add(f"planned {item.kind}", item.passes)
        self._here = 0
        counted: dict[str, int] = {}
        self._count(counted, item, result)
        for key, number in counted.items():
            self.counters.add(key, number)

    def await_all(self, world: int) -> None:
        """Wait until every rank is here, as long as some rank makes passes."""
        self.counters.add("here", 1)
        alive, since = -1, time.monotonic()
        while self.counters.add("here", 0) < world and time.monotonic() - since < STILL_SECONDS:
            time.sleep(0.05)
            if (now := self.counters.add("alive", 0)) != alive:
                alive, since = now, time.monotonic()
            if time.monotonic() - self._shown_at > 1:
                self._show()

    def _show(self) -> None:
        self._shown_at = time.monotonic()
        if self._bar.disable:
            return
        shares = {
            name: (self._now(f"right {variant} {name}"), self._now(f"seen {variant} {name}"))
            for variant, name in self._figures
            if variant == self._variant
        }
        several = any(name.endswith("#1") for name in shares)
        figures = {}
        for name, (right, seen) in shares.items():
            attack, _, radius = name.partition("#")
            if seen:
                at = f" at {self._sizes[int(radius)]}" if several and attack != "clean" else ""
                figures[attack + at] = f"{right / seen:.1%}"
        self._bar.set_postfix(figures, refresh=False)
        self._bar.set_description(f"evaluation {self._variant}".rstrip(), refresh=False)
        self._bar.n, self._bar.total = self.reckoned()
        self._bar.refresh()

    def reckoned(self) -> tuple[int, int]:
        """Passes that are made, and all that there will be."""
        done, left = self._known, 0.0
        for kind, passes in self._left.items():
            made, planned = (self._now(f"{what} {kind}") for what in ("made", "planned"))
            done += made
            left += (passes - planned) * (made / planned if planned else 1)
        now = done + self._now("under way")
        return now, max(now, round(done + left))

    def _now(self, key: str) -> int:
        return self._before.get(key, 0) + self.counters.add(key, 0)
