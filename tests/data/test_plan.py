import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fulllora_dist.data import plan

small = st.integers(1, 5)


@given(n=st.integers(1, 60), seed=st.integers(0, 2**31), epoch=st.integers(0, 9), world=small, share=small)
def test_the_ranks_blocks_side_by_side_are_the_order(n: int, seed: int, epoch: int, world: int, share: int) -> None:
    order = plan.epoch_order(n, seed, epoch)
    assert sorted(order) == list(range(n))
    size = world * share
    joined = [
        sample
        for batch in range(plan.steps_per_epoch(n, size))
        for rank in range(world)
        for sample in plan.batch_slots(order, batch, size, world, rank)
    ]
    assert joined == list(order[: n - plan.dropped(n, size)])
    assert [plan.first_slot(size, world, rank) for rank in range(world)] == list(range(0, size, share))


def test_orders_are_pinned_and_differ() -> None:
    # A changed order would silently resume an old run elsewhere: PLAN_VERSION must change with it.
    assert plan.PLAN_VERSION == 1
    assert plan.epoch_order(8, seed=3, epoch=2).tolist() == [6, 5, 1, 3, 7, 2, 0, 4]
    orders = {tuple(plan.epoch_order(50, seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_an_order_is_uniform() -> None:
    places = np.array([np.argsort(plan.epoch_order(5, 0, epoch)) for epoch in range(4000)])
    for sample in range(5):
        counts = np.bincount(places[:, sample], minlength=5)
        assert ((counts - 800) ** 2 / 800).sum() < 23.5  # chi-squared, 4 degrees of freedom, p = 1e-4


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
