"""The work of an evaluation: what a rank takes at a time, and in which order."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from fulllora_dist.attacks.threat import Threat
from fulllora_dist.data.batch import Batch
from fulllora_dist.data.plan import stratified_order
from fulllora_dist.distributed.comm import Counters
from fulllora_dist.evaluation.attacks import EvalAttack
from fulllora_dist.evaluation.images import EvalImages

_CHECK_BATCH = 16  # images; Square's many passes of an image make a small batch worth while
_CHECK_PASSES = 500  # of an image under all checks
_KEPT = 4096  # decoded images of each rank: attacks come to the same batches one after the other


@dataclass(frozen=True)
class WorkItem:
    """One attack in one ball on one batch, or the checks (attack None) on one batch, of one variant of the model.

    Attributes:
        name: differs from that of every other item; the result depends on it alone, given model, images and seed.
        radius: position of the ball among the evaluator's.
        ids: int64 [B], of the batch.
    """

    name: str
    variant: str
    attack: EvalAttack | None
    radius: int
    ids: np.ndarray

    @property
    def kind(self) -> str:
        return "checks" if self.attack is None else self.attack.name

    @property
    def passes(self) -> int:
        """Forward and backward passes of images, at most: AutoAttack leaves out images that have fallen."""
        return len(self.ids) * (_CHECK_PASSES if self.attack is None else self.attack.passes)


def work_items(
    variants: Iterable[str], attacks: Sequence[EvalAttack], threats: Sequence[Threat], images: EvalImages, checked: int
) -> list[WorkItem]:
    """All items in the order in which they are taken: clean images and the checks first, as they show what is wrong
    before hours of attacks; then the costliest first, so that the last ones, which some ranks have to wait for, are
    short.

    Args:
        checked: on how many images, drawn evenly over the classes, the checks are made; 0 makes none.
    """
    items = []
    ids = np.sort(np.concatenate(images.batches))
    for variant in variants:
        prefix = f"{variant}: " if variant else ""
        for attack in attacks:
            for radius, threat in enumerate(threats[:1] if attack.kind == "clean" else threats):
                for batch in images.batches:
                    name = f"{prefix}{attack.name} {threat.norm} {threat.eps!r} {int(batch[0])}"
                    items.append(WorkItem(name, variant, attack, radius, batch))
        if checked and threats[0].eps:
            chosen = ids[stratified_order(images.index.labels[ids])[:checked]]
            name = f"{prefix}checks of {checked} {threats[0].norm} {threats[0].eps!r}"
            for i, start in enumerate(range(0, len(chosen), _CHECK_BATCH)):
                batch = np.sort(chosen[start : start + _CHECK_BATCH])
                items.append(WorkItem(f"{name} {i}", variant, None, 0, batch))
    first = {"clean": 0, "checks": 1}
    return sorted(items, key=lambda item: (first.get(item.kind, len(first)), -item.passes / len(item.ids)))


def take_turns(
    items: Sequence[WorkItem], images: EvalImages, counters: Counters, world: int
) -> Iterator[tuple[WorkItem, Batch]]:
    """The items that this rank gets, with their images. Each rank takes the next one as soon as it is free. While many
    are left, the images of the next are read meanwhile."""
    kept: OrderedDict[bytes, Batch] = OrderedDict()

    def take() -> tuple[WorkItem, Batch] | None:
        turn = counters.add("taken", 1) - 1
        if turn >= len(items):
            return None
        item = items[turn]
        key = item.ids.tobytes()
        batch = kept.pop(key, None) or images.read(item.ids)
        kept[key] = batch
        while sum(map(len, kept.values())) > _KEPT:
            kept.popitem(last=False)
        return item, batch

    with ThreadPoolExecutor(1, "images") as reader:
        coming = reader.submit(take)
        while (taken := coming.result()) is not None:
            # towards the end a rank takes none that it does not begin yet: another one may be free before
            early = len(items) - counters.add("taken", 0) > 2 * world
            if early:
                coming = reader.submit(take)
            yield taken
            if not early:
                coming = reader.submit(take)
