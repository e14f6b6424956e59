"""Which samples are trained on when: pure functions of numbers, the same in every process.

Object stores want neighbours read together, a shuffle wants them apart. The ids are cut into chunks of CHUNK
neighbours, the chunks are permuted, and the permuted ids are cut into equal *lanes*, one for each slot of the global
batch. A lane is shuffled in windows of WINDOW chunks; global batch b holds sample b of every lane. So

- the images of one batch come from as many chunks as it has slots: its class mix is that of a uniform shuffle even
  where shards are sorted by class; only the same slot of batches close by is related (with probability 1 / WINDOW);
- nothing depends on ranks or workers: whoever holds a slot reads its lane, and nobody else does;
- a reader holds WINDOW chunks for each of its slots, half of them used up on average: the windows of the lanes begin
  at different batches.
"""

from typing import NamedTuple

import numpy as np

from fulllora_dist.core.rng import numpy_rng

PLAN_VERSION = 2  # part of a stream's position: a changed plan must not continue an old one
CHUNK = 16  # neighbours read together, about 2 MB of ImageNet
WINDOW = 8  # chunks
_LANES_AT_ONCE = 64


class Segment(NamedTuple):
    """`steps` global batches of `batch_size` that were taken from an epoch."""

    batch_size: int
    steps: int


def _permutation(n: int, seed: int, purpose: str, epoch: int) -> np.ndarray:
    """Sorting raw Philox output rather than `Generator.permutation`: numpy keeps the raw stream between versions, the
    methods of a Generator not (NEP 19), and a resumed run must find the same order under a newer numpy."""
    return np.argsort(numpy_rng(seed, purpose, epoch).bit_generator.random_raw(n), kind="stable")


def steps_per_epoch(n: int, batch_size: int) -> int:
    """Whole global batches in an epoch. The tail is dropped; as the order changes, another tail each epoch."""
    return n // batch_size


def dropped(n: int, batch_size: int) -> int:
    """Samples of the tail that an epoch leaves out."""
    return n % batch_size


class EpochPlan:
    """One epoch, or what earlier segments left of it, at one global batch size. `epoch_plan` makes it.

    Attributes:
        batch_size: slots of a global batch, and lanes.
        steps: global batches in it.
        dropped: samples of the tail that it leaves out.
        window: samples of a lane that are shuffled together.
    """

    def __init__(self, n: int, remaining: np.ndarray | None, seed: int, epoch: int, number: int, batch_size: int):
        self.batch_size = batch_size
        self._n, self._remaining, self._seed, self._epoch, self._number = n, remaining, seed, epoch, number
        total = n if remaining is None else int(np.count_nonzero(remaining))
        self.steps = steps_per_epoch(total, batch_size)
        self.dropped = dropped(total, batch_size)
        # few samples: smaller chunks, so that a lane still mixes those of many places
        self._chunk = min(CHUNK, max(1, self.steps // WINDOW))
        self.window = self._chunk * WINDOW
        starts = np.arange(0, n, self._chunk)
        sizes = np.diff(starts, append=n) if remaining is None else np.add.reduceat(remaining, starts, dtype=np.int64)
        self._order = _permutation(len(starts), seed, f"chunks/{number}", epoch).astype(np.int32)
        self._ends = np.cumsum(sizes[self._order])
        self._first = np.cumsum(sizes) - sizes  # of each chunk among the remaining ids

    def lanes(self, first: int, count: int) -> np.ndarray:
        """int64 [count, steps]: the ids of slots first .. first + count - 1 in each global batch."""
        numbers = np.arange(first, first + count)
        places = numbers[:, None] * self.steps + np.arange(self.steps)
        piece = np.searchsorted(self._ends, places, side="right")
        chunk = self._order[piece]
        sizes = np.diff(self._ends, prepend=0)
        ids = self._first[chunk] + places - (self._ends - sizes)[piece]
        if self._remaining is not None:
            ids = np.flatnonzero(self._remaining)[ids]
        bits = [
            numpy_rng(self._seed, f"lane/{self._number}", self._epoch, int(lane)).bit_generator.random_raw(self.steps)
            for lane in numbers
        ]
        window = (np.arange(self.steps) + self._phase(numbers)[:, None]) // self.window
        shuffled = np.lexsort((np.array(bits).reshape(ids.shape), window), axis=-1)
        return np.take_along_axis(ids, shuffled, axis=-1)

    def window_of(self, lane: int, step: int) -> tuple[int, int]:
        """(first, end): the steps whose samples were shuffled together with that of `step` in this lane."""
        phase = int(self._phase(np.array([lane]))[0])
        first = (step + phase) // self.window * self.window - phase
        return max(0, first), min(self.steps, first + self.window)

    def _phase(self, lanes: np.ndarray) -> np.ndarray:
        """Windows of neighbouring lanes begin far apart (golden section), so that reading is spread over the steps."""
        return lanes * round(self.window * 0.618) % self.window

    def remaining_after(self, steps: int) -> np.ndarray:
        """bool [n]: the ids that are still to be seen after so many global batches."""
        remaining = np.ones(self._n, dtype=bool) if self._remaining is None else self._remaining.copy()
        for first in range(0, self.batch_size, _LANES_AT_ONCE):
            lanes = self.lanes(first, min(_LANES_AT_ONCE, self.batch_size - first))
            remaining[lanes[:, :steps]] = False
        return remaining


def epoch_plan(n: int, seed: int, epoch: int, batch_size: int, done: tuple[Segment, ...] = ()) -> EpochPlan:
    """The plan of the rest of an epoch, after the segments that were taken from it at other batch sizes.

    A pure function of its arguments; n is the number of samples. What a segment's own tail would have dropped is
    planned again.
    """
    remaining = None
    for number, segment in enumerate(done):
        remaining = EpochPlan(n, remaining, seed, epoch, number, segment.batch_size).remaining_after(segment.steps)
    return EpochPlan(n, remaining, seed, epoch, len(done), batch_size)


def share(total: int, parts: int, part: int) -> tuple[int, int]:
    """(first, count): what `part` holds of `total` slots cut into contiguous parts, none larger by more than one."""
    first, end = part * total // parts, (part + 1) * total // parts
    return first, end - first


def stratified_order(labels: np.ndarray) -> np.ndarray:
    """int64 [N]: round-robin over the classes, each class in the given order, so that every prefix is balanced."""
    by_class = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[by_class], labels[by_class])
    turn = np.empty(len(labels), dtype=np.int64)
    turn[by_class] = np.arange(len(labels)) - starts
    return np.lexsort((labels, turn))


def eval_batches(ids: np.ndarray, batch_size: int, world: int, rank: int) -> list[tuple[int, np.ndarray]]:
    """(slot of the first sample, int64 [batch_size] ids) for each batch of `rank`; -1 pads.

    Batch i holds `ids[i * batch_size : (i + 1) * batch_size]` at any number of ranks and goes to rank i mod world. All
    ranks get equally many; those that are missing at the end are padding throughout.
    """
    per_rank = -(-len(ids) // (batch_size * world))
    padded = np.full(per_rank * world * batch_size, -1, dtype=np.int64)
    padded[: len(ids)] = ids
    batches = padded.reshape(-1, batch_size)
    return [(i * batch_size, batches[i]) for i in range(rank, len(batches), world)]
