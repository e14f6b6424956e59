"""Epochs against what tarfile reads, on any ranks and workers, through any chain of restarts."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch
from byte_shards import Checksum, arrived, in_tars, write_shards
from hypothesis import given, settings
from hypothesis import strategies as st

from fulllora_dist.data.index import Index
from fulllora_dist.data.loader import EvalStream, TrainStream
from fulllora_dist.data.position import StreamPosition
from fulllora_dist.data.reader import ShardReader

UNEVEN = (1, 40, 2, 17, 33, 5, 9)  # 107
BATCH = 24


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("uneven"), UNEVEN)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fewer shards than ranks."""
    return write_shards(tmp_path_factory.mktemp("two"), (30, 71), seed=1)


def train(folder: Path | str, **more) -> TrainStream:
    return TrainStream(folder, **{"batch_size": BATCH, "seed": 5, "transform": Checksum(), **more})


def _check_epochs(folder: Path, world: int, workers: int, epochs: int = 2) -> None:
    streams = [train(folder, world=world, rank=rank, workers=workers) for rank in range(world)]
    index, steps, expected = streams[0].index, streams[0].steps_per_epoch, in_tars(folder)
    rows = [iter(stream) for stream in streams]
    tails = []
    for _ in range(epochs):
        held = [list(islice(row, steps)) for row in rows]
        assert {len(batches) for batches in held} == {steps}
        found = arrived(index, (batch for batches in held for batch in batches))
        assert not found - expected
        tails.append(expected - found)
        assert sum(tails[-1].values()) == streams[0].dropped == len(index) % BATCH
    assert tails[0] != tails[1]
    evaluated = [
        EvalStream(folder, batch_size=7, transform=Checksum(), world=world, rank=rank, workers=workers)
        for rank in range(world)
    ]
    assert arrived(index, (batch for stream in evaluated for batch in stream)) == expected


SHORT = [(1, 0), (2, 0), (3, 0), (8, 0), (1, 2), (3, 2), (1, 5)]
LONG = [(2, 2), (8, 2), (2, 5), (3, 5), (8, 5)]


@pytest.mark.parametrize(("world", "workers"), SHORT)
def test_an_epoch_is_what_tarfile_reads(uneven: Path, world: int, workers: int) -> None:
    _check_epochs(uneven, world, workers)


@pytest.mark.parametrize("world", [3, 8])
def test_fewer_shards_than_ranks(two: Path, world: int) -> None:
    _check_epochs(two, world, 0)


@pytest.mark.long
@pytest.mark.parametrize(("world", "workers"), LONG)
def test_an_epoch_is_what_tarfile_reads_on_more_workers(two: Path, uneven: Path, world: int, workers: int) -> None:
    _check_epochs(two, world, workers)
    _check_epochs(uneven, world, workers)


def _read(index: Index, position: StreamPosition, world: int, workers: int, steps: int) -> list[list[int]]:
    """Ids of global batches, put together from the parts of all workers of all ranks, bytes checked."""
    reader = ShardReader(index)
    parts = []
    for rank in range(world):
        works = position.works(world, rank)
        for worker in range(min(workers, works.count)):
            part = []
            for work, read in islice(reader.ahead(works(worker, min(workers, works.count))), steps):
                assert all(read(i) for i in work.ids.tolist())
                part.append(work.ids.tolist())
            parts.append(part)
    return [[i for part in parts for i in part[step]] for step in range(steps)]


TOPOLOGY = st.tuples(st.sampled_from([1, 2, 3, 8]), st.sampled_from([1, 2, 5]), st.sampled_from([24, 24, 48, 16]))


@settings(deadline=None, max_examples=25)
@given(chain=st.lists(st.tuples(TOPOLOGY, st.integers(0, 4)), min_size=2, max_size=6))
def test_any_chain_of_topologies_repeats_nothing_within_an_epoch(uneven: Path, chain: list) -> None:
    index = Index.load(uneven)
    step, state = 0, None
    by_epoch: dict[int, list[int]] = {}
    tail = {}
    for (world, workers, batch_size), steps in chain:
        if batch_size % world:
            batch_size = 24
        position = StreamPosition(index, 5, batch_size)
        if state is not None:
            position.load_state_dict(json.loads(state))
        tail[json.loads(state)["epoch"] if state else 0] = position.dropped
        batches = _read(index, position, world, workers, steps)
        for ids in batches:
            assert len(ids) == batch_size
            position.commit(step)  # where it is before this batch
            by_epoch.setdefault(position.epoch, []).extend(ids)
            tail.setdefault(position.epoch, len(index) % batch_size)
            step += 1
            position.commit(step)
        state = json.dumps(position.state_dict())
    for epoch, ids in by_epoch.items():
        assert len(set(ids)) == len(ids)
        if epoch < position.epoch:  # whole
            assert len(ids) == len(index) - tail[epoch]


@pytest.mark.parametrize("batch_size", [16, 48])
def test_another_batch_size_continues_with_the_rest_of_the_epoch(
    uneven: Path, batch_size: int, caplog: pytest.LogCaptureFixture
) -> None:
    first = train(uneven)
    batches = list(islice(first, 4))
    first.commit(2)
    second = train(uneven, batch_size=batch_size)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    rest = (len(second.index) - 2 * BATCH) // batch_size
    tail = len(second.index) - 2 * BATCH - rest * batch_size
    assert f"{tail} images of the epoch fill no batch" in caplog.text
    batches = batches[:2] + list(islice(second, rest))
    found = arrived(second.index, batches)
    assert max(found.values()) == 1
    assert sum(found.values()) == len(second.index) - tail
    second.commit(2 + rest)
    state = second.state_dict()
    assert (state["epoch"], state["segments"]) == (1, [{"batch_size": batch_size, "steps": 0}])


def test_the_state_says_what_it_counts(uneven: Path) -> None:
    stream = train(uneven)
    stream.commit(6)
    state = stream.state_dict()
    assert state == json.loads(json.dumps(state))
    assert state == {
        "plan": 2,
        "index_hash": stream.index.hash,
        "seed": 5,
        "step": 6,
        "epoch": 1,
        "segments": [{"batch_size": BATCH, "steps": 2}],
        "bad_samples": [],
    }


CONSUMER = """
import sys
from byte_shards import Checksum
from fulllora_dist.data.loader import TrainStream
if __name__ == "__main__":
    stream = TrainStream(sys.argv[1], batch_size=24, seed=5, transform=Checksum(), workers=2)
    for step, batch in enumerate(stream, 1):
        stream.commit(step)
        import json
        print(json.dumps([stream.state_dict(), batch.ids.tolist()]), flush=True)
        if step == 6:
            import time
            time.sleep(60)  # with full queues, until it is killed
"""


def test_a_consumer_killed_with_full_queues_loses_nothing(uneven: Path, tmp_path: Path) -> None:
    script = tmp_path / "consumer.py"
    script.write_text(CONSUMER)
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
    environment = os.environ | {"PYTHONPATH": paths}
    with subprocess.Popen(
        [sys.executable, script, uneven], env=environment, stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        lines = [json.loads(process.stdout.readline()) for _ in range(6)]
        os.killpg(process.pid, signal.SIGKILL)
    ids = [ids for _, ids in lines]
    whole = [batch.ids.tolist() for batch in islice(train(uneven), 12)]
    assert ids == whole[:6]
    for world, workers in ((1, 0), (2, 0), (1, 2)):
        resumed = [train(uneven, world=world, rank=rank, workers=workers) for rank in range(world)]
        for stream in resumed:
            stream.load_state_dict(lines[-1][0])
        rest = [[i for b in row for i in b.ids.tolist()] for row in islice(zip(*resumed, strict=True), 6)]
        assert rest == whole[6:]


def test_pixels_of_a_sample_differ_between_epochs_and_not_between_topologies(uneven: Path) -> None:
    rows = {}
    for world, workers in ((1, 0), (2, 2)):
        streams = [train(uneven, world=world, rank=rank, workers=workers) for rank in range(world)]
        rows[world] = [torch.cat([b.images for b in row]) for row in islice(zip(*streams, strict=True), 9)]
    assert all(torch.equal(a, b) for a, b in zip(rows[1], rows[2], strict=True))
    draws = Counter(image[1].numpy().tobytes() for images in rows[1] for image in images)
    assert max(draws.values()) == 1
