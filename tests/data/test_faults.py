"""Remote shards on a server that goes wrong in every way that is known of."""

import io
import logging
import random
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from byte_shards import UNREADABLE, Checksum, arrived, in_tars, write_shards

from fulllora_dist.core.errors import UserError
from fulllora_dist.data import reader
from fulllora_dist.data.index import Index
from fulllora_dist.data.loader import EvalStream, TrainStream
from fulllora_dist.data.position import Spares, TrainWorks
from fulllora_dist.data.reader import DamagedSample, ShardReader
from fulllora_dist.data.shards.indexing import index_shards
from fulllora_dist.storage import ranges, store
from fulllora_dist.storage.ranges import ChangedObject, Piece, Range, RangeFetcher, ReadPolicy
from tests.services.fault_server import FATAL, PASSING, FaultServer, Request

AHEAD = 40 * reader._LEAST  # less than an epoch
QUICK = ReadPolicy(request_timeout_s=0.5, retry_timeout_s=30, read_ahead=AHEAD)
LENGTHS = (20, 3, 31, 46)  # 100


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "_FIRST_WAIT", 0.02)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("remote"), LENGTHS, size=3000)


@pytest.fixture
def server(folder: Path) -> Iterator[FaultServer]:
    with FaultServer(folder) as server:
        yield server


def train(where: str, **more) -> TrainStream:
    return TrainStream(where, **{"batch_size": 10, "seed": 2, "transform": Checksum(), "policy": QUICK, **more})


def _epoch(stream: TrainStream) -> Counter:
    return arrived(stream.index, islice(stream, stream.steps_per_epoch))


def at_first(*faults: str):
    """Each request fails once, in turn with each of `faults`."""
    kinds = iter(range(10**9))
    return lambda request: faults[next(kinds) % len(faults)] if request.turn == 0 else None


@pytest.mark.parametrize("fault", PASSING)
def test_a_passing_fault_changes_nothing(folder: Path, server: FaultServer, fault: str) -> None:
    server.fault = at_first(fault)
    server.stall = 0.6
    assert _epoch(train(server.url)) == in_tars(folder)
    assert Counter(kind for _, kind in server.log)[fault] > 15


def test_samples_are_read_in_chunks_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neighbours travel together, and an epoch costs hardly more bytes than the shards have."""
    monkeypatch.setattr(reader, "_MAX_GAP", 4 << 10)  # as small against these images as the real one is against real
    write_shards(tmp_path, (700, 580), size=1000)
    with FaultServer(tmp_path) as server:
        stream = train(server.url, batch_size=8)
        assert stream.steps_per_epoch == 160
        found = arrived(stream.index, islice(stream, 150))  # what is read ahead does not reach the next epoch
        assert not found - in_tars(tmp_path)
        asked = [request for request, _ in server.log]
    assert len(asked) < 1280 / 8, "far fewer requests than samples"
    total = sum(shard.bytes for shard in stream.index.shards)
    assert sum(request.end - request.start for request in asked) < 1.15 * total  # small gaps are read along
    assert {request.turn for request in asked} == {0}


def test_a_bad_image_is_replaced_in_the_same_way_everywhere(
    folder: Path, server: FaultServer, caplog: pytest.LogCaptureFixture
) -> None:
    """A range whose bytes stay wrong. The same sample stands in on any ranks and workers, remote or not."""
    index = train(server.url).index
    victim = index.sample(60)
    name = victim.url.rpartition("/")[2]

    def rotten(request: Request) -> str | None:
        inside = request.name == name and request.start <= victim.offset < request.end
        return f"flip at {victim.offset - request.start}" if inside else None

    server.fault = rotten
    found = {}
    for world in (1, 2, 5):
        caplog.clear()
        streams = [train(server.url, world=world, rank=rank, max_bad_samples=3) for rank in range(world)]
        rows = [list(islice(stream, 10)) for stream in streams]
        found[world] = [[i for row in rows for i in row[step].ids.tolist()] for step in range(10)]
        lines = [record.getMessage() for record in caplog.records if "replaced by" in record.getMessage()]
        assert lines == [
            f"unreadable image replaced by another: {server.url}/{name}: sample {victim.key} at offset "
            f"{victim.offset}: crc32 differs from the index; the shard is damaged"
        ]
    assert found[1] == found[2] == found[5]
    clean = [batch.ids.tolist() for batch in islice(train(str(folder)), 10)]
    assert [b for a, b in zip(np.ravel(found[1]), np.ravel(clean), strict=True) if a != b] == [60]
    with pytest.raises(DamagedSample, match=r"sample d3/0006 at offset"):
        list(EvalStream(server.url, batch_size=10, transform=Checksum(), policy=QUICK))
    with pytest.raises(UserError, match=r"1 unreadable images exceed data.max_bad_samples=0; .*d3/0006"):
        list(islice(train(server.url), 10))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ("403", UserError, r"part-001\.tar: access denied \(403.*check the credentials"),
        ("404", UserError, r"part-001\.tar: does not exist; check bucket, path and endpoint"),
        ("changed", ChangedObject, r"part-001\.tar: has changed since it was indexed \(the store answers 412\)"),
    ],
)
def test_what_only_the_user_can_fix_ends_the_run_at_once(
    server: FaultServer, fault: str, error: type, message: str, workers: int
) -> None:
    assert fault in FATAL
    batches = iter(train(server.url, max_bad_samples=99, workers=workers))
    assert len(list(islice(batches, 10))) == 10  # an epoch: now the etags are known
    server.fault = lambda request: fault if request.name == "part-001.tar" else None
    began = time.monotonic()
    with pytest.raises(error, match=message) as caught:
        list(islice(batches, 20))  # the second of these epochs cannot have been read ahead
    assert time.monotonic() - began < 5
    assert "\n" not in str(caught.value)


def test_a_shard_that_is_replaced_is_an_error_and_never_mixed(tmp_path: Path) -> None:
    """Another shard of the same length and layout, put in place in the midst of an epoch."""
    write_shards(tmp_path, (150, 150), size=3000)
    before = set(in_tars(tmp_path))
    with FaultServer(tmp_path) as server:
        stream = train(server.url, batch_size=2, max_bad_samples=99)
        batches = iter(stream)
        found = arrived(stream.index, islice(batches, 20))
        path = tmp_path / "part-001.tar"
        data = bytearray(path.read_bytes())
        data[5000] ^= 255
        path.write_bytes(bytes(data))
        with pytest.raises(ChangedObject, match=r"part-001\.tar: has changed"):
            found += arrived(stream.index, islice(batches, 600))
        assert set(found) <= before
        path.write_bytes(bytes(data[:-512]))
        with pytest.raises(UserError, match=r"part-001\.tar: \d+ bytes where the index has"):
            train(server.url)


def test_an_outage_is_waited_for_and_no_longer_than_allowed(server: FaultServer, folder: Path) -> None:
    began = time.monotonic()
    server.fault = lambda request: "503" if time.monotonic() - began < 1 else None
    assert _epoch(train(server.url)) == in_tars(folder)
    assert time.monotonic() - began > 1
    server.fault = lambda request: "503"
    began = time.monotonic()
    impatient = ReadPolicy(request_timeout_s=0.5, retry_timeout_s=1.5)
    with pytest.raises(UserError, match=r"503.*gave up after [12] s \(data.retry_timeout_s=1.5\): check the store"):
        list(islice(train(server.url, policy=impatient), 1))
    assert time.monotonic() - began < 5


def test_patience_begins_with_the_first_try(tmp_path: Path) -> None:
    """Ranges that wait for a connection longer than a store may be in trouble; the last then meets one error."""
    write_shards(tmp_path, (4,) * 10)
    index = Index.load(tmp_path)
    last = index.shards[9].url
    with FaultServer(tmp_path) as server:
        server.late = 0.15
        server.fault = lambda request: "503" if request.name == last and request.turn == 0 else "late"
        fetcher = RangeFetcher(ReadPolicy(connections=1, retry_timeout_s=1))
        whole = [Range(f"{server.url}/{shard.url}", None, 0, shard.bytes) for shard in index.shards]
        began = time.monotonic()
        for future in [fetcher.submit(wanted, [Piece(0, 1, 0, wanted=False)]) for wanted in whole]:
            future.result()
        assert time.monotonic() - began > 1.3


def test_the_quotes_of_an_etag_are_no_change(server: FaultServer) -> None:
    index = Index.load(server.url)
    etags = [str(store.info(f"{server.url}/{shard.url}").etag).strip('"') for shard in index.shards]
    shards = tuple(replace(shard, etag=etag) for shard, etag in zip(index.shards, etags, strict=True))
    ShardReader(replace(index, shards=shards)).check()
    with pytest.raises(ChangedObject):
        ShardReader(replace(index, shards=(replace(shards[0], etag="other"), *shards[1:]))).check()


def test_a_server_that_hangs_is_given_up(server: FaultServer) -> None:
    server.fault = lambda request: "stall"
    server.stall = 30
    began = time.monotonic()
    with pytest.raises(UserError, match=r"no answer in time; gave up after"):
        list(islice(train(server.url, policy=replace(QUICK, request_timeout_s=0.3, retry_timeout_s=1)), 1))
    assert time.monotonic() - began < 6


@pytest.mark.parametrize("workers", [0, 1])
def test_no_credential_is_ever_said(server: FaultServer, caplog: pytest.LogCaptureFixture, workers: int) -> None:
    caplog.set_level(logging.DEBUG, logger="fulllora_dist")
    secret = server.url + "/?sig=swordfish"
    stream = train(secret)
    server.fault = at_first("flip", "503")
    assert sum(_epoch(stream).values()) == 100
    server.fault = lambda request: "403"
    with pytest.raises(UserError) as caught:
        list(islice(train(secret, workers=workers), 1))
    with pytest.raises(UserError, match=r"a URL must not hold user:password@") as refused:
        train(server.url.replace("://", "://user:hunter2@"))
    said = [str(caught.value), str(refused.value), *(record.getMessage() for record in caplog.records)]
    assert len(said) > 3
    assert any("***@127.0.0.1" in line for line in said)
    assert any("?***" in line for line in said)
    assert not [line for line in said if "hunter2" in line or "swordfish" in line]


def random_faults(seed: int):
    """Half of the requests go wrong, some of them again and again."""
    rng = random.Random(seed)

    def fault(request: Request) -> str | None:
        return rng.choice(PASSING) if rng.random() < 0.5 * 0.6**request.turn else None

    return fault


def _survives(folder: Path, seed: int) -> None:
    with FaultServer(folder, random_faults(seed)) as server:
        server.stall = 0.4
        stream = train(
            server.url,
            policy=replace(QUICK, request_timeout_s=0.25, retry_timeout_s=60, connections=1 + seed % 5),
        )
        assert _epoch(stream) == in_tars(folder)
        assert sum(kind is not None for _, kind in server.log) > 5


@pytest.mark.parametrize("seed", range(12))
def test_random_faults(folder: Path, seed: int) -> None:
    _survives(folder, seed)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(12, 212))
def test_200_more_seeds_of_random_faults(folder: Path, seed: int) -> None:
    _survives(folder, seed)


def spoil(folder: Path, *numbers: int) -> None:
    """Give some samples of the only shard bytes that are no image, and index it again."""
    path = folder / "part-000.tar"
    with tarfile.open(path) as tar:
        members = [(m, tar.extractfile(m).read()) for m in tar.getmembers()]
    with tarfile.open(path, "w") as tar:
        for i, (member, data) in enumerate(members):
            if member.name.endswith(".jpg") and i // 2 in numbers:
                data = UNREADABLE + bytes([i])
                member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    index_shards([str(folder)], classes=10, progress=False)


def test_a_window_without_another_image_ends_no_run(tmp_path: Path) -> None:
    """One batch an epoch: every window is one sample. The next lanes stand in, the same ones everywhere."""
    write_shards(tmp_path, (6,))
    order = [batch.ids.tolist() for batch in islice(train(str(tmp_path), batch_size=6), 2)]
    spoil(tmp_path, order[0][2], order[0][3])
    found = {}
    for world, workers in ((1, 0), (2, 0), (3, 0), (1, 2)):
        given = {"batch_size": 6, "world": world, "workers": workers, "max_bad_samples": 2}
        rows = [list(islice(train(str(tmp_path), rank=rank, **given), 2)) for rank in range(world)]
        found[world, workers] = [[i for row in rows for i in row[step].ids.tolist()] for step in range(2)]
    a, b, _, _, e, f = order[0]
    assert found[1, 0][0] == [a, b, e, e, e, f]
    assert not {*order[0][2:4]} & {*found[1, 0][1]}
    assert all(ids == found[1, 0] for ids in found.values())


def test_a_lane_stands_in_beyond_its_window_and_then_the_others(tmp_path: Path) -> None:
    write_shards(tmp_path, (64,))
    (plan, lanes, step) = next(TrainWorks(64, 2, 2, 1, 1, 0, (), 0)()).spares
    mine, other = lanes[0].tolist(), plan.lanes(0, 1)[0].tolist()
    start, end = plan.window_of(1, step)
    assert 0 == start < end < len(mine)
    assert list(Spares(plan, lanes, step).of(1, 0)) == mine[1:] + other
    assert list(Spares(plan, lanes, end + 1).of(1, 0))[-len(other) - end :] == mine[:end] + other


def test_unreadable_images_are_counted_once_and_limited(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Bytes as indexed, but no images: two of them are allowed, in any number of epochs; a third is not."""
    write_shards(tmp_path, (30,))
    spoil(tmp_path, 3, 17)
    stream = train(str(tmp_path), max_bad_samples=2)
    for step, batch in enumerate(islice(stream, 9), 1):  # three epochs
        assert not {3, 17} & set(batch.ids.tolist())
        stream.commit(step)
        stream.count_bad(list)
    lines = [r.getMessage() for r in caplog.records if "replaced" in r.getMessage()]
    assert len(lines) == 2
    assert all("no readable image" in line and "at offset" in line for line in lines)
    assert stream.state_dict()["bad_samples"] == [3, 17]
    spoil(tmp_path, 3, 17, 20)
    with pytest.raises(UserError, match=r"3 unreadable images exceed data\.max_bad_samples=2"):
        list(islice(train(str(tmp_path), max_bad_samples=2), 9))
    spoil(tmp_path, *range(30))
    with pytest.raises(UserError, match="no readable image"):  # nothing can stand in
        list(islice(train(str(tmp_path), max_bad_samples=99), 9))
