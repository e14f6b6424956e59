"""Remote indexes whose download goes wrong, and files that several write."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from fulllora_dist.core.atomic import atomic_write
from fulllora_dist.data.index import Index
from fulllora_dist.data.index_file import DamagedIndex
from fulllora_dist.storage import store, urls
from fulllora_dist.storage.urls import ObjectInfo
from tests.services.fault_server import FaultServer


@pytest.fixture
def server(shards: Path) -> Iterator[FaultServer]:
    with FaultServer(shards) as server:
        yield server


def flipped(data: bytes) -> bytes:
    return data[:500] + bytes([data[500] ^ 1]) + data[501:]


def test_a_damaged_download_is_made_again_and_never_kept(
    server: FaultServer, shards: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, bad = store.read, 2

    def spoilt(url: str) -> bytes:
        nonlocal bad
        bad -= 1
        return flipped(read(url)) if bad >= 0 else read(url)

    monkeypatch.setattr(store, "read", spoilt)
    assert Index.load(server.url).hash == Index.load(shards).hash
    for kept in (own_cache / "indexes").iterdir():
        kept.unlink()
    bad = 99
    with pytest.raises(DamagedIndex, match=rf"{server.url}/index\.safetensors: the index is damaged"):
        Index.load(server.url)
    assert not list((own_cache / "indexes").glob("*.safetensors"))


@pytest.mark.parametrize("damage", [flipped, lambda data: data[:-40], lambda data: data[:10], lambda data: b""])
def test_a_damaged_copy_is_fetched_again(server: FaultServer, own_cache: Path, damage) -> None:
    whole = Index.load(server.url).hash
    (kept,) = (own_cache / "indexes").glob("*.safetensors")
    kept.write_bytes(damage(kept.read_bytes()))
    assert Index.load(server.url).hash == whole


def test_a_remote_index_is_read_once(server: FaultServer) -> None:
    assert Index.load(server.url) is Index.load(server.url)


def test_a_short_answer_is_asked_for_again(server: FaultServer, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = iter([ObjectInfo(7, None)])
    real = urls.object_info
    monkeypatch.setattr(store, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(urls, "object_info", lambda url: next(lengths, None) or real(url))
    assert store.read(f"{server.url}/index.safetensors") == (shards / "index.safetensors").read_bytes()


def test_two_writers_of_one_file_leave_it_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    (tmp_path / ".file.1-aa.tmp").touch()
    (tmp_path / ".file.2-bb.tmp").touch()
    os.utime(tmp_path / ".file.1-aa.tmp", (0, 0))  # of a killed process
    with atomic_write(path) as one:
        one.write(b"one" * 1000)
        with atomic_write(path) as other:
            other.write(b"other")
        assert path.read_bytes() == b"other"
    assert path.read_bytes() == b"one" * 1000
    assert {file.name for file in tmp_path.iterdir()} == {"file", ".file.2-bb.tmp"}
