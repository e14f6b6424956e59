"""What a rank reads again when it starts from a checkpoint, by the log of a server: the windows of samples in use, and
`read_ahead` once, whatever the number of workers."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from byte_shards import Checksum, write_shards

from fulllora_dist.data import reader
from fulllora_dist.data.index import Index
from fulllora_dist.data.loader import TrainStream
from fulllora_dist.data.plan import CHUNK, WINDOW
from fulllora_dist.data.position import StreamPosition, Work
from fulllora_dist.data.reader import _LEAST, ShardReader
from fulllora_dist.data.worker_dataset import PREFETCH
from fulllora_dist.storage.ranges import ReadPolicy
from tests.services.fault_server import FaultServer

CHUNKS, SLOTS = 150, 8
RESTART = 100  # batches that were trained on, of 300


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard for each chunk, so that no range holds two."""
    return write_shards(tmp_path_factory.mktemp("chunks"), [CHUNK] * CHUNKS)


def restart(server: FaultServer, workers: int, policy: ReadPolicy) -> TrainStream:
    stream = TrainStream(server.url, batch_size=SLOTS, seed=3, transform=Checksum(), workers=workers, policy=policy)
    stream.commit(RESTART)
    return stream


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_a_restart_reads_as_much_on_any_number_of_workers(folder: Path, workers: int) -> None:
    policy = ReadPolicy()
    with FaultServer(folder) as server:
        batches = iter(restart(server, workers, policy))
        next(batches)
        seen = -1
        while len(server.log) > seen:  # until it has read ahead as far as it will
            seen = len(server.log)
            time.sleep(0.3)
        chunks = {request.name for request, _ in server.log}
    steps = policy.read_ahead / _LEAST / SLOTS + PREFETCH + 2  # and the batch that is yielded, and the next
    begun = SLOTS * (1 + steps / (CHUNK * WINDOW)) * WINDOW
    assert begun - SLOTS < len(chunks) <= begun + WINDOW < CHUNKS


@pytest.mark.parametrize(("read_ahead", "workers"), [(40_000, 1), (40_000, 4), (1, 1)])
def test_a_worker_has_its_part_of_the_bytes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, read_ahead: int, workers: int
) -> None:
    """As many whole works as hold its part of `read_ahead`, and at least the next one."""
    monkeypatch.setattr(reader, "_LEAST", 1)
    taken: list[Work] = []

    def counted(works: Iterator[Work]) -> Iterator[Work]:
        for work in works:
            taken.append(work)
            yield work

    with FaultServer(folder) as server:
        index = Index.load(server.url)
        works = StreamPosition(index, 3, SLOTS).works(world=1, rank=0)
        steps = ShardReader(index, ReadPolicy(read_ahead=read_ahead)).ahead(counted(works(0, workers)), workers)
        sizes = index.columns["size"]
        for used in range(1, 20):
            next(steps)
            coming = [int(sizes[work.ids].sum()) for work in taken[used - 1 :]]
            assert len(coming) == 2 or sum(coming[:-1]) < read_ahead / workers <= sum(coming)
            assert len(coming) == 2 if read_ahead == 1 else len(coming) > 2


def test_what_the_first_batch_needs_is_asked_for_first(folder: Path) -> None:
    with FaultServer(folder) as server:
        first = next(iter(restart(server, 0, ReadPolicy(connections=1))))
        asked = {request.name for request, _ in server.log[:SLOTS]}
        index = Index.load(server.url)
    assert asked == {index.sample(i).url.rpartition("/")[2] for i in first.ids.tolist()}
