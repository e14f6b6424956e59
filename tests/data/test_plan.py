import time
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fulllora_dist.data import plan
from fulllora_dist.data.plan import WINDOW, Segment, epoch_plan
from fulllora_dist.data.position import TrainWorks

IMAGENET = 1_281_167
sizes = st.integers(1, 12)


@given(n=st.integers(1, 700), batch_size=sizes, seed=st.integers(0, 2**31), epoch=st.integers(0, 9))
def test_an_epoch_holds_every_id_once_but_for_the_tail(n: int, batch_size: int, seed: int, epoch: int) -> None:
    batch_size = min(batch_size, n)
    whole = epoch_plan(n, seed, epoch, batch_size)
    ids = whole.lanes(0, batch_size)
    assert ids.shape == (batch_size, n // batch_size) == (batch_size, whole.steps)
    assert whole.dropped == n - ids.size == n % batch_size
    assert len(set(ids.ravel().tolist())) == ids.size
    assert set(ids.ravel().tolist()) <= set(range(n))


@given(n=st.integers(60, 700), batch_size=sizes, cut=st.integers(0, 12))
def test_a_lane_does_not_depend_on_who_else_is_asked_for(n: int, batch_size: int, cut: int) -> None:
    cut = min(cut, batch_size)
    whole = epoch_plan(n, 3, 1, batch_size)
    parts = [whole.lanes(0, cut), whole.lanes(cut, batch_size - cut)]
    assert np.array_equal(np.concatenate(parts), whole.lanes(0, batch_size))


def test_the_order_is_what_it_was() -> None:
    """A resumed run finds the order it began with, under any version of numpy."""
    assert epoch_plan(10, seed=3, epoch=2, batch_size=2).lanes(0, 2).tolist() == [[3, 5, 1, 8, 2], [7, 9, 0, 6, 4]]
    left = epoch_plan(40, 3, 2, 3, (Segment(2, 9),))
    assert left.lanes(0, 3)[:, :4].tolist() == [[35, 30, 9, 22], [34, 33, 6, 16], [20, 26, 10, 24]]
    big = epoch_plan(100_000, 0, 7, 4).lanes(2, 1)[0]
    assert big[[0, 1, 2, 1000, 20_000]].tolist() == [51488, 98040, 45513, 96107, 44288]


def test_another_seed_or_epoch_is_another_order_with_another_tail() -> None:
    plans = {(seed, epoch): epoch_plan(100, seed, epoch, 7) for seed in range(3) for epoch in range(3)}
    assert len({tuple(p.lanes(0, 7).ravel().tolist()) for p in plans.values()}) == 9
    tails = {frozenset(range(100)) - frozenset(p.lanes(0, 7).ravel().tolist()) for p in plans.values()}
    assert {len(tail) for tail in tails} == {2}
    assert len(tails) >= 8


def test_small_data_is_shuffled_uniformly() -> None:
    """Every sample is equally often in every place."""
    places = np.array([np.argsort(epoch_plan(6, 0, epoch, 2).lanes(0, 2).T.ravel()) for epoch in range(3000)])
    for sample in places.T:
        assert Counter(sample.tolist()).keys() == set(range(6))
        assert max(abs(count - 500) for count in Counter(sample.tolist()).values()) < 100  # 5 sigma


def test_a_window_is_made_of_whole_chunks_and_shuffled() -> None:
    whole = epoch_plan(64 * 400, 0, 0, 64)
    assert (whole.steps, whole.window) == (400, 128)
    for lane in (0, 17):
        ids = whole.lanes(lane, 1)[0]
        step, begins = 0, []
        while step < 400:
            first, end = whole.window_of(lane, step)
            assert first == step
            assert all(whole.window_of(lane, other) == (first, end) for other in range(first, end))
            begins.append(first)
            chunks = Counter((ids[first:end] // 16).tolist())
            assert len(chunks) <= (end - first) // 16 + 2  # neighbours: read together
            if end - first == 128:
                assert np.abs(np.corrcoef(np.arange(128), np.argsort(ids[first:end]))[0, 1]) < 0.35
                assert sorted(chunks.values())[-6:] == [16] * 6
            step = end
        assert begins[1] % 128 == (-lane * 79) % 128
    # the windows of different lanes begin at different steps, so reading is spread
    begins = Counter(whole.window_of(lane, 200)[0] for lane in range(64))
    assert max(begins.values()) == 1


@pytest.mark.parametrize(
    ("n", "classes", "batch_size"), [(IMAGENET, 1000, 256), (IMAGENET, 1000, 4096), (9469, 10, 64)]
)
def test_batches_of_shards_sorted_by_class_look_uniformly_shuffled(n: int, classes: int, batch_size: int) -> None:
    """The worst case. Tolerances: the variance of class counts is within 25 % of the multinomial one, neighbours in a
    batch share their class within 10 % as often as chance has it; the same slot of two batches in a row within 1.5 in
    WINDOW."""
    labels = np.arange(n) * classes // n
    ids = epoch_plan(n, 1, 0, batch_size).lanes(0, batch_size)[:, :300]
    found = labels[ids].T  # [batch, slot]
    counts = np.stack([np.bincount(row, minlength=classes) for row in found])
    share = 1 / classes
    assert counts.var(axis=0).mean() == pytest.approx(batch_size * share * (1 - share), rel=0.25)
    assert (found[:, 1:] == found[:, :-1]).mean() == pytest.approx(share, rel=0.1)
    assert (found[1:] == found[:-1]).mean() < share + 1.5 / WINDOW
    if n == IMAGENET:
        distinct = classes * (1 - (1 - share) ** batch_size)
        assert (counts > 0).sum(axis=1).mean() == pytest.approx(distinct, rel=0.02)


@settings(deadline=None)
@given(
    n=st.integers(1, 500),
    chain=st.lists(st.tuples(st.integers(1, 24), st.floats(0, 1)), min_size=1, max_size=5),
    seed=st.integers(0, 99),
)
def test_any_chain_of_batch_sizes_repeats_nothing_and_loses_only_the_last_tail(
    n: int, chain: list[tuple[int, float]], seed: int
) -> None:
    done: tuple[Segment, ...] = ()
    seen: list[int] = []
    for size, share in chain:
        part = epoch_plan(n, seed, 4, size, done)
        steps = round(share * part.steps)
        seen += part.lanes(0, size)[:, :steps].ravel().tolist()
        done = (*done, Segment(size, steps))
        assert part.steps * size + part.dropped == n - len(seen) + steps * size
    last = epoch_plan(n, seed, 4, 3, done)
    seen += last.lanes(0, 3).ravel().tolist()
    assert len(set(seen)) == len(seen) == n - last.dropped
    assert last.dropped < 3


def test_imagenet_on_64_ranks_with_8_workers_is_planned_in_2_seconds_and_300_mb() -> None:
    """All 512 parts in one process; and what each of a machine's 72 processes needs at its peak and keeps."""
    began = time.process_time()
    whole = epoch_plan(IMAGENET, 0, 0, 4096)
    assert sum(whole.lanes(*plan.share(4096, 512, part)).size for part in range(512)) == whole.steps * 4096
    assert time.process_time() - began < 2
    tracemalloc.start()
    works = TrainWorks(IMAGENET, 0, 4096, 64, 64, 0, (), 0)(3, 8)
    assert len(next(works).ids) == 8
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 300e6 / 72
    assert peak < 10e6


def test_stratified_order_is_that_of_a_pile_dealt_out() -> None:
    labels = [2, 0, 0, 1, 2, 0]
    assert plan.stratified_order(np.array(labels)).tolist() == [1, 3, 0, 2, 4, 5]


@given(labels=st.lists(st.integers(0, 4), min_size=1, max_size=40))
def test_stratified_order_deals_one_of_each_class_in_turn(labels: list[int]) -> None:
    piles = {label: [i for i, other in enumerate(labels) if other == label] for label in sorted(set(labels))}
    dealt = []
    while any(piles.values()):
        dealt += [pile.pop(0) for pile in piles.values() if pile]
    assert plan.stratified_order(np.array(labels)).tolist() == dealt


@given(n=st.integers(1, 40), size=st.integers(1, 7), world=st.integers(1, 8))
def test_eval_batches_are_equally_many_and_hold_every_id_once(n: int, size: int, world: int) -> None:
    ids = np.arange(100, 100 + n)
    ranks = [plan.eval_batches(ids, size, world, rank) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    assert len(ranks[0]) == int(np.ceil(np.ceil(n / size) / world))
    for rank, batches in enumerate(ranks):
        for turn, (slot, held) in enumerate(batches):
            i = turn * world + rank
            assert slot == i * size
            expected = ids[slot : slot + size].tolist()
            assert held.tolist() == expected + [-1] * (size - len(expected))
