"""The work of an evaluation: what a rank takes at a time, and in which order."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from fulllora_dist.attacks.settings import Norm
from fulllora_dist.attacks.threat import Threat
from fulllora_dist.data.batch import Batch
from fulllora_dist.data.plan import stratified_order
from fulllora_dist.distributed.comm import Counters
from fulllora_dist.evaluation.attacks import EvalAttack
from fulllora_dist.evaluation.images import EvalImages

_CHECK_BATCH = 16  # images; Square's many passes of an image make a small batch worth while
_CHECK_PASSES = 550  # of an image under all checks
_KEPT = 4096  # decoded images of each rank: attacks come to the same batches one after the other


@dataclass(frozen=True)
class WorkItem:
    """One attack in one ball on one batch, or the checks (attack None) on one batch, of one variant of the model.

    Attributes:
        name: differs from that of every other item; the result depends on it alone, given model, images and seed.
        attack: of AutoAttack, the parts up to the one that is run, on images that have survived the others.
        radius: position of the ball among the evaluator's.
        norm: of the ball.
        ids: int64 [B], of the batch.
    """

    name: str
    variant: str
    attack: EvalAttack | None
    radius: int
    norm: Norm
    ids: np.ndarray

    @property
    def kind(self) -> str:
        """What takes its time: the checks, an attack, or a part of AutoAttack."""
        if self.attack is None:
            return "checks"
        return self.attack.parts[-1] if self.attack.parts else self.attack.name

    @property
    def passes(self) -> int:
        """Forward and backward passes of images, at most: AutoAttack leaves out images that have fallen."""
        return len(self.ids) * (_CHECK_PASSES if self.attack is None else passes_of(self.kind, self.norm))


def passes_of(kind: str, norm: Norm) -> int:
    """Of an image, at most."""
    return EvalAttack.parse(kind).passes(norm)


def first_items(
    variants: Iterable[str], attacks: Sequence[EvalAttack], threats: Sequence[Threat], images: EvalImages, checked: int
) -> list[WorkItem]:
    """All items but AutoAttack's, in the order in which they are taken: clean images and the checks first, as they show
    what is wrong before hours of attacks; then the costliest first, so that the last ones, which some ranks have to
    wait for, are short. AutoAttack needs the clean images, asked for or not.

    Args:
        checked: on how many images, drawn evenly over the classes, the checks are made; 0 makes none.
    """
    items = []
    ids = np.sort(np.concatenate(images.batches))
    plain = [attack for attack in attacks if not attack.parts]
    if all(attack.kind != "clean" for attack in plain) and len(plain) < len(attacks):
        plain.append(EvalAttack.parse("clean"))
    for variant in variants:
        for attack in plain:
            for radius, threat in enumerate(threats[:1] if attack.kind == "clean" else threats):
                for batch in images.batches:
                    name = _name(variant, attack.name, threat, batch)
                    items.append(WorkItem(name, variant, attack, radius, threat.norm, batch))
        if checked and threats[0].eps:
            chosen = ids[stratified_order(images.index.labels[ids])[:checked]]
            for start in range(0, len(chosen), _CHECK_BATCH):
                batch = np.sort(chosen[start : start + _CHECK_BATCH])
                name = _name(variant, f"checks of {checked}", threats[0], batch)
                items.append(WorkItem(name, variant, None, 0, threats[0].norm, batch))
    first = {"clean": 0, "checks": 1}
    return sorted(items, key=lambda item: (first.get(item.kind, len(first)), -item.passes / len(item.ids)))


def part_items(
    number: int,
    variants: Iterable[str],
    attacks: Sequence[EvalAttack],
    threats: Sequence[Threat],
    batch_size: int,
    survivors: Callable[[str, int, Sequence[str]], np.ndarray],
) -> list[WorkItem]:
    """The items of AutoAttack's part `number` (from 1): whoever the parts before have left, in full batches and in the
    order of ids, as the official evaluation takes them. Attacks that begin with the same parts share them.

    Args:
        survivors: (variant, radius, parts before) -> their ids, sorted.
    """
    chains = [EvalAttack.parse("+".join(attack.parts[:number])) for attack in attacks if len(attack.parts) >= number]
    items: dict[str, WorkItem] = {}
    for variant in variants:
        for chain in dict.fromkeys(chains):
            for radius, threat in enumerate(threats):
                left = survivors(variant, radius, chain.parts[:-1]) if threat.eps else np.empty(0, np.int64)
                for start in range(0, len(left), batch_size):
                    batch = left[start : start + batch_size]
                    name = f"{'+'.join(chain.parts[:-1])} > {chain.parts[-1]}"
                    name = _name(variant, name, threat, batch)
                    items[name] = WorkItem(name, variant, chain, radius, threat.norm, batch)
    return sorted(items.values(), key=lambda item: -item.passes)


def _name(variant: str, what: str, threat: Threat, batch: np.ndarray) -> str:
    digest = hashlib.sha256(batch.astype("<i8").tobytes()).hexdigest()[:16]
    return f"{variant}: {what} {threat.norm} {threat.eps!r} {digest}".removeprefix(": ")


def take_turns(
    items: Sequence[WorkItem], images: EvalImages, counters: Counters, world: int, number: int
) -> Iterator[tuple[WorkItem, Batch]]:
    """The items that this rank gets, with their images. Each rank takes the next one as soon as it is free. While many
    are left, the images of the next are read meanwhile. `number` differs from call to call, alike on all ranks."""
    kept: OrderedDict[bytes, Batch] = OrderedDict()
    taken = f"taken {number}"

    def take() -> tuple[WorkItem, Batch] | None:
        turn = counters.add(taken, 1) - 1
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
        while (item_and_batch := coming.result()) is not None:
            # towards the end a rank takes none that it does not begin yet: another one may be free before
            early = len(items) - counters.add(taken, 0) > 2 * world
            if early:
                coming = reader.submit(take)
            yield item_and_batch
            if not early:
                coming = reader.submit(take)
