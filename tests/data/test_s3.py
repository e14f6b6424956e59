"""Streams on mock S3 with signatures checked, and on a real endpoint where one is named."""

import os
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import s3fs
from byte_shards import Checksum, arrived, in_tars, write_shards

from fulllora_dist.core.errors import UserError
from fulllora_dist.data.loader import EvalStream, TrainStream
from fulllora_dist.data.shards.indexing import index_shards
from fulllora_dist.storage import store, urls
from fulllora_dist.storage.ranges import ChangedObject, ReadPolicy
from fulllora_dist.storage.small_files import read_files, write_files
from tests.services.metadata_service import MetadataService, metadata_service
from tests.services.mock_s3 import BUCKET, MockS3, mock_s3

QUICK = ReadPolicy(request_timeout_s=10, retry_timeout_s=20)


@pytest.fixture(scope="module")
def server() -> Iterator[MockS3]:
    with mock_s3() as s3:
        yield s3


@pytest.fixture
def s3(server: MockS3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[MockS3]:
    for name, value in (server.environment | {"XDG_CACHE_HOME": str(tmp_path / "xdg")}).items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()  # it keeps the credentials that it was made with
    yield server
    s3fs.S3FileSystem.clear_instance_cache()


def train(where: str, **more) -> TrainStream:
    return TrainStream(where, **{"batch_size": 10, "seed": 2, "transform": Checksum(), "policy": QUICK, **more})


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_from_s3_is_what_tarfile_reads(s3: MockS3, tmp_path: Path, workers: int) -> None:
    folder = write_shards(tmp_path / "shards", (50, 9, 41), size=3000)
    url = s3.upload(folder, f"epoch{workers}")
    index_shards([f"{url}/*.tar"], classes=10, progress=False)  # now with the etags of the store
    stream = train(url, workers=workers)
    assert all(shard.etag for shard in stream.index.shards)
    assert arrived(stream.index, islice(stream, 10)) == in_tars(folder)
    evaluated = EvalStream(url, batch_size=16, transform=Checksum(), workers=workers, policy=QUICK)
    assert arrived(stream.index, evaluated) == in_tars(folder)
    assert {get.status for get in s3.log} == {206}


def test_an_object_that_is_replaced_is_refused_by_the_store(s3: MockS3, tmp_path: Path) -> None:
    """If-Match: at the start by its etag, in the midst of an epoch by a 412."""
    folder = write_shards(tmp_path / "shards", (200, 200), size=1000)
    url = s3.upload(folder, "replaced")
    index_shards([f"{url}/*.tar"], classes=10, progress=False)
    stream = train(url, batch_size=2, max_bad_samples=99)
    batches = iter(stream)
    assert len(list(islice(batches, 5))) == 5
    data = bytearray((folder / "part-001.tar").read_bytes())
    data[5000] ^= 255
    s3.client().put_object(Bucket=BUCKET, Key="replaced/part-001.tar", Body=bytes(data))
    with pytest.raises(ChangedObject, match=r"part-001\.tar: has changed since it was indexed"):
        list(islice(batches, 1000))
    assert 412 in {get.status for get in s3.log}
    with pytest.raises(ChangedObject, match=r"part-001\.tar: has changed since it was indexed \(etag"):
        train(url)


def test_small_files_create_no_bucket(s3: MockS3) -> None:
    """A mistyped one is said; and of the bucket that is there only the objects are written, without asking for more."""
    files = {"a": b"1", "b": b"2"}
    with pytest.raises(
        UserError, match=r"^save: s3://buckett/x: cannot be written \(The specified bucket does not exist"
    ):
        write_files("s3://buckett/x", files, "save")
    assert [bucket["Name"] for bucket in s3.client().list_buckets()["Buckets"]] == [BUCKET]
    before = len(s3.puts)
    write_files(f"s3://{BUCKET}/x", files, "save")
    assert s3.puts[before:] == ["x/a", "x/b"]
    assert read_files(f"s3://{BUCKET}/x", ["a", "b"], "load", "give another") == [b"1", b"2"]


def test_wrong_credentials_and_missing_objects_are_said_at_once(
    s3: MockS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_shards(tmp_path / "shards", (30, 30))
    url = s3.upload(folder, "gone")
    s3.client().delete_object(Bucket=BUCKET, Key="gone/part-001.tar")
    with pytest.raises(UserError, match=r"s3://bucket/gone/part-001\.tar: does not exist; check bucket, path"):
        train(url)
    with pytest.raises(UserError, match=r"s3://bucket/nowhere/index\.safetensors: does not exist"):
        train("s3://bucket/nowhere")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(UserError, match=r"s3://bucket/gone/.*: access denied .*check the credentials") as caught:
        train(url)
    assert "wrong-secret" not in str(caught.value)
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(UserError, match=r"s3://bucket/gone/.*: access denied .*check the credentials"):
        train(url)


def test_a_store_that_fails_is_not_an_object_that_is_missing(
    s3: MockS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What make_shards asks before it writes: it would write anew what is there."""
    s3.client().put_object(Bucket=BUCKET, Key="there/x", Body=b"x")
    names = ("there/x", "there", "there/", "there/y", "nowhere/x")
    assert [store.exists(f"s3://{BUCKET}/{name}") for name in names] == [True, False, False, False, False]
    assert not store.exists("s3://no-such-bucket/x")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setattr(s3, "outage", tmp_path)
    monkeypatch.setattr(store, "PATIENCE_SECONDS", 0.0)
    with pytest.raises(UserError, match=r"^s3://bucket/there/x: .*\(tried for 0 s\)$"):
        store.exists(f"s3://{BUCKET}/there/x")


@pytest.fixture
def metadata(s3: MockS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MetadataService]:
    """Where alone the credentials are."""
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    with metadata_service(*(s3.environment[name] for name in names)) as service:
        for name in names:
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", service.endpoint)
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setattr(store, "_FIRST_PAUSE", 0.05)
        yield service


def test_a_metadata_service_that_throttles_is_asked_again(
    s3: MockS3, metadata: MetadataService, tmp_path: Path
) -> None:
    """At the start, by a stream, and where the credentials are renewed."""
    folder = write_shards(tmp_path / "shards", (30, 20), size=500)
    url = s3.upload(folder, "throttled")
    metadata.throttled = 20
    assert store.info(f"{url}/part-000.tar").bytes == (folder / "part-000.tar").stat().st_size
    assert metadata.throttled == 0
    index_shards([f"{url}/*.tar"], classes=10, progress=False)
    stream = train(url, batch_size=10, workers=0)
    s3fs.S3FileSystem.clear_instance_cache()
    metadata.throttled = 8  # three sessions: their pauses grow
    assert arrived(stream.index, islice(stream, 5)) == in_tars(folder)
    assert metadata.throttled == 0
    metadata.throttled = 20
    credentials = urls.filesystem(url).session._credentials
    credentials._expiry_time = datetime.now(UTC) + timedelta(minutes=5)  # as if most of the six hours had passed
    assert store.read(f"{url}/index.safetensors")
    assert metadata.throttled == 0


@pytest.mark.parametrize("ask", [store.info, store.exists])
def test_a_machine_without_a_role_is_told_so_when_the_patience_ends(
    metadata: MetadataService, monkeypatch: pytest.MonkeyPatch, ask: Callable[[str], object]
) -> None:
    metadata.role = False
    monkeypatch.setattr(store, "PATIENCE_SECONDS", 1.0)
    began = time.monotonic()
    with pytest.raises(
        UserError, match=r"^s3://bucket/x: no credentials .*; set AWS_ACCESS_KEY_ID .* \(tried for 1 s\)$"
    ) as error:
        ask("s3://bucket/x")
    assert "; set AWS_EC2_METADATA_DISABLED=true if there is no such service" in str(error.value)
    assert 0.5 < time.monotonic() - began < 20


@pytest.mark.skipif("FULLLORA_TEST_SHARDS" not in os.environ, reason="FULLLORA_TEST_SHARDS names no URL of shards")
def test_an_epoch_from_a_real_endpoint() -> None:
    """Every sample of the shards at that URL arrives with its checksum, once: in one epoch of training but for the
    tail, and in one evaluation."""
    url = os.environ["FULLLORA_TEST_SHARDS"]
    stream = TrainStream(url, batch_size=16, seed=0, transform=Checksum(), workers=2)
    crc32 = stream.index.columns["crc32"]
    for batches, whole in (
        (islice(stream, stream.steps_per_epoch), len(stream.index) - stream.dropped),
        (EvalStream(url, batch_size=16, transform=Checksum(), workers=2), len(stream.index)),
    ):
        found = arrived(stream.index, batches)
        assert max(found.values()) == 1
        assert len(found) == whole
        assert {crc for _, crc in found} <= set(np.asarray(crc32).tolist())
