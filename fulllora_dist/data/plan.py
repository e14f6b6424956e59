"""Which samples are trained on when, and by whom: pure functions of numbers, the same on every rank.

Global batch b of an epoch is `order[b * B : (b + 1) * B]`; rank r of w holds its slots [r * B / w, (r + 1) * B / w).
So the global batches, and what sits in which slot of them, do not depend on the number of ranks.
"""

import numpy as np

from fulllora_dist.rng import numpy_rng

PLAN_VERSION = 1  # part of a stream's state: a changed plan must not continue an old one


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """int64 [n]: a permutation of the sample ids, another one for each (seed, epoch).

    Sorting raw Philox output rather than `Generator.permutation`: numpy keeps the raw stream between versions, the
    methods of a Generator not (NEP 19), and a resumed run must find the same order under a newer numpy.
    """
    bits = numpy_rng(seed, "epoch_order", epoch).bit_generator.random_raw(n)
    return np.argsort(bits, kind="stable").astype(np.int64)


def steps_per_epoch(n: int, batch_size: int) -> int:
    """Whole global batches in an epoch. The tail is dropped; as the order changes, another tail each epoch."""
    return n // batch_size


def dropped(n: int, batch_size: int) -> int:
    """Samples of the tail that an epoch leaves out."""
    return n % batch_size


def first_slot(batch_size: int, world: int, rank: int) -> int:
    """The first slot of the global batch that `rank` holds; it holds batch_size / world of them."""
    return rank * (batch_size // world)


def batch_slots(order: np.ndarray, batch: int, batch_size: int, world: int, rank: int) -> np.ndarray:
    """int64 [batch_size / world]: the sample ids of `rank` in global batch number `batch` of the epoch."""
    start = batch * batch_size + first_slot(batch_size, world, rank)
    return order[start : start + batch_size // world]


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
