"""The local cache of remote ranges: hits, damage, its cap, several processes, kill -9."""

import contextlib
import fcntl
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import weakref
import zlib
from collections.abc import Iterator
from concurrent.futures import Future
from itertools import islice
from pathlib import Path

import pytest
from byte_shards import Checksum, arrived, in_tars, write_shards

from fulllora_dist.core.errors import UserError
from fulllora_dist.data import reader
from fulllora_dist.data.index import Index
from fulllora_dist.data.loader import TrainStream
from fulllora_dist.data.position import StreamPosition, Work
from fulllora_dist.data.reader import ShardReader
from fulllora_dist.storage.cache import RangeCache
from fulllora_dist.storage.ranges import RangeFetcher, ReadPolicy
from tests.services.fault_server import FaultServer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("remote"), (60, 7, 33), size=3000)


def kept(cache: Path) -> dict[Path, int]:
    """Sizes; a thread that reads ahead may still delete some."""
    sizes = {}
    for path in cache.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            if len(path.name) == 64 and path.is_file():
                sizes[path] = path.stat().st_size
    return sizes


def read_epoch(url: str, cache: Path, gb: float = 1.0, seed: int = 0) -> TrainStream:
    """Read an epoch, compare it with the tars."""
    policy = ReadPolicy(cache=str(cache), cache_gb=gb)
    stream = TrainStream(url, batch_size=10, seed=seed, transform=Checksum(), policy=policy)
    found = arrived(stream.index, islice(stream, stream.steps_per_epoch))
    assert sum(found.values()) == 100
    assert not found - in_tars(FOLDER_OF[url])
    return stream


FOLDER_OF: dict[str, Path] = {}


def test_what_was_read_once_is_not_asked_for_again(folder: Path, tmp_path: Path) -> None:
    with FaultServer(folder) as server:
        FOLDER_OF[server.url] = folder
        read_epoch(server.url, tmp_path)
        asked = len(server.log)
        assert asked == len({(r.name, r.start, r.end) for r, _ in server.log}) == len(kept(tmp_path))
        read_epoch(server.url, tmp_path, seed=1)  # another order, the same ranges
        assert len(server.log) == asked


def test_a_process_holds_what_it_will_use_and_nothing_else(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks are fetched whole and shared with other ranks; six epochs of one rank of two keep as much as one does."""
    asked: list[weakref.ref[Future]] = []
    submit = RangeFetcher.submit

    def watched(*args) -> Future:
        asked.append(weakref.ref(future := submit(*args)))
        return future

    monkeypatch.setattr(RangeFetcher, "submit", watched)

    def held() -> int:
        alive = [future for ref in asked if (future := ref()) is not None]
        return sum(piece is not None for future in alive for piece in future.result())

    begun = used = 0

    def counted(works: Iterator[Work]) -> Iterator[Work]:
        nonlocal begun
        for work in works:
            begun += len(work.begin)
            yield work

    with FaultServer(folder) as server:
        index = Index.load(server.url)
        works = StreamPosition(index, 0, 10).works(world=2, rank=1)
        steps = ShardReader(index, ReadPolicy(cache=str(tmp_path), read_ahead=20 * reader._LEAST)).ahead(
            counted(works())
        )
        for step, (work, read) in zip(range(60), steps, strict=False):
            for sample in work.ids.tolist():
                assert zlib.crc32(read(sample)) == index.sample(sample).crc32
            used += len(work.ids)
            if step % 10 == 9:
                assert held() == begun - used > 0


def test_damaged_files_are_dropped_and_read_again(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with FaultServer(folder) as server:
        FOLDER_OF[server.url] = folder
        read_epoch(server.url, tmp_path)
        asked = len(server.log)
        flipped, cut, emptied = sorted(kept(tmp_path))[:3]
        data = bytearray(flipped.read_bytes())
        middle = len(data) // 2
        data[middle : middle + 2000] = bytes(2000)  # reaches a sample, whatever lies between samples
        flipped.write_bytes(bytes(data))
        os.truncate(cut, 1000)
        os.truncate(emptied, 0)
        read_epoch(server.url, tmp_path)
        assert len(server.log) == asked + 3
        assert len([r for r in caplog.records if "the cached copy is damaged" in r.getMessage()]) == 3
        read_epoch(server.url, tmp_path)
        assert len(server.log) == asked + 3


def test_damage_on_the_way_is_never_kept(folder: Path, tmp_path: Path) -> None:
    with FaultServer(folder, lambda request: "flip" if request.turn == 0 else None) as server:
        FOLDER_OF[server.url] = folder
        read_epoch(server.url, tmp_path)
        asked = len(server.log)
        read_epoch(server.url, tmp_path)
        assert len(server.log) == asked


def test_the_cap_holds_and_the_oldest_go_first(tmp_path: Path) -> None:
    cache = RangeCache(tmp_path, 10_000)
    for i in range(10):
        cache.put(f"r{i}", bytes([i]) * 1000)
        os.utime(next(iter(sorted(kept(tmp_path), key=os.path.getmtime, reverse=True))))
        time.sleep(0.01)
    assert cache.get("r0") == bytes(1000)  # used: now the youngest
    time.sleep(0.01)
    cache.put("r10", bytes(1000))
    assert sum(kept(tmp_path).values()) <= 10_000
    assert cache.get("r0") is not None
    assert cache.get("r1") is None
    assert cache.get("r10") is not None
    cache.put("large", bytes(10_001))
    assert cache.get("large") is None
    assert cache.get("r10") is not None  # nothing made room for what cannot be kept
    (tmp_path / "lock").write_bytes(b"")  # the count is lost: it is counted again
    RangeCache(tmp_path, 10_000).put("r11", bytes(3000))
    assert sum(kept(tmp_path).values()) <= 10_000


def test_an_epoch_through_a_cache_that_is_far_too_small(folder: Path, tmp_path: Path) -> None:
    with FaultServer(folder) as server:
        FOLDER_OF[server.url] = folder
        read_epoch(server.url, tmp_path, gb=1e-4)
        assert 0 < sum(kept(tmp_path).values()) <= 100_000


def test_a_folder_that_cannot_be_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with FaultServer(folder) as server:
        FOLDER_OF[server.url] = folder
        with pytest.raises(UserError, match=r"data.cache_dir: .*cannot be used"):
            read_epoch(server.url, tmp_path / "file")


def _hammer(folder: str, seed: int) -> None:
    """Puts and gets of names that others use too; what is found is what was put under that name."""
    cache = RangeCache(folder, 60_000)
    for turn in range(150):
        i = (turn * 7 + seed * 13) % 50
        if (data := cache.get(f"n{i}")) is not None:
            assert data == bytes([i]) * 3000
        cache.put(f"n{i}", bytes([i]) * 3000)


def test_several_processes_share_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_hammer, args=(str(tmp_path), seed)) for seed in range(4)]
    for process in processes:
        process.start()
    largest = 0
    with open(tmp_path / "lock", "a") as lock:
        while any(process.is_alive() for process in processes):
            fcntl.flock(lock, fcntl.LOCK_EX)  # else files come and go while they are counted
            largest = max(largest, sum(kept(tmp_path).values()))
            fcntl.flock(lock, fcntl.LOCK_UN)
    assert [process.exitcode for process in processes] == [0] * 4
    assert 30_000 < largest <= 60_000


WRITER = """
import sys
from fulllora_dist.storage.cache import RangeCache
cache = RangeCache(sys.argv[1], 10**9)
print("up", flush=True)
i = 0
while True:
    cache.put(f"n{i % 200}", bytes([i % 200]) * 500_000)
    i += 1
    if i % 200 == 0:
        for j in range(200):
            cache.drop(f"n{j}")
"""


def test_killed_writers_leave_nothing_half_and_no_lock(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    for pause in (0.0, 0.011, 0.023, 0.037, 0.05):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, tmp_path], env=environment, stdout=subprocess.PIPE
        ) as process:
            process.stdout.readline()
            time.sleep(pause)
            process.send_signal(signal.SIGKILL)
    cache = RangeCache(tmp_path, 10**9)
    found = [(i, data) for i in range(200) if (data := cache.get(f"n{i}")) is not None]
    assert found
    assert all(data == bytes([i]) * 500_000 for i, data in found)
    cache.put("new", b"new")
    assert cache.get("new") == b"new"
    # what the killed left under temporary names goes when it is old and room is needed
    leftovers = [path for path in tmp_path.rglob(".*") if path.is_file()]
    for path in [*leftovers, tmp_path / "ranges" / next(os.scandir(tmp_path / "ranges")).name / ".old"]:
        path.touch()
        os.utime(path, (0, 0))
    RangeCache(tmp_path, 1000).put("more", bytes(900))
    assert not [path for path in tmp_path.rglob(".*") if path.is_file()]
    assert sum(kept(tmp_path).values()) <= 1000
