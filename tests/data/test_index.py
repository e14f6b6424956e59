import hashlib
import io
import pickle
import shutil
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from fulllora_dist.core.errors import UserError
from fulllora_dist.data.index import Index, content_hash
from fulllora_dist.data.index_file import map_columns, pack_columns
from fulllora_dist.data.shards.scan import IMAGE_EXTENSIONS, scan_file


def write_tar(path: Path, samples: list[tuple[str, int]]) -> None:
    with tarfile.open(path, "w") as tar:
        for key, label in samples:
            for name, data in ((f"{key}.jpg", key.encode()), (f"{key}.cls", b"%d" % label)):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def build(folder: Path, classes: Sequence[str] | None = None) -> Index:
    """In memory, of all shards of a folder."""
    return Index.from_scans(folder, [scan_file(path) for path in sorted(folder.glob("*.tar"))], classes)


def same(a: Index, b: Index) -> bool:
    return (a.classes, a.shards, a.hash) == (b.classes, b.shards, b.hash) and all(
        np.array_equal(a.columns[name], b.columns[name]) for name in a.columns
    )


def test_a_saved_index_is_the_one_that_a_fresh_pass_makes(shards: Path) -> None:
    loaded = Index.load(shards)
    assert same(loaded, build(shards, ["ant", "bee", "cat"]))
    assert (len(loaded), loaded.classes, loaded.labels.dtype) == (32, ("ant", "bee", "cat"), np.int64)
    assert build(shards).classes == ("0", "1", "2")


def test_the_hash_pins_samples_and_not_their_packing(tmp_path: Path) -> None:
    def built(name: str, *parts: list[tuple[str, int]]) -> str:
        (tmp_path / name).mkdir()
        for i, part in enumerate(parts):
            write_tar(tmp_path / name / f"{i}.tar", part)
        return build(tmp_path / name, ["x", "y"]).hash

    one, two, three = ("a", 0), ("b", 1), ("c", 0)
    packed = built("one", [one, two, three])
    assert built("two", [one], [two, three]) == packed
    others = [built("order", [two, one, three]), built("label", [one, ("b", 0), three]), built("fewer", [one, two])]
    assert len({packed, *others}) == 4


def test_names_and_etags_are_no_part_of_the_hash(shards: Path, tmp_path: Path) -> None:
    index = Index.load(shards)
    moved = [replace(shard, url=f"s3://elsewhere/{i}.tar", etag=f"e{i}") for i, shard in enumerate(index.shards)]
    replace(index, base=str(tmp_path), shards=tuple(moved)).save()
    assert Index.load(tmp_path).hash == index.hash


def test_every_row_is_what_tarfile_reads(shards: Path) -> None:
    index = Index.load(shards)
    seen = 0
    for shard in index.shards:
        data = (shards / shard.url).read_bytes()
        assert (shard.bytes, shard.sha256) == (len(data), hashlib.sha256(data).hexdigest())
        assert shard.etag is None
        with tarfile.open(shards / shard.url) as tar:
            members = {m.name: m for m in tar.getmembers()}
            for name, member in members.items():
                key, _, extension = name.rpartition(".")
                if extension == "cls":
                    continue
                sample = index.sample(seen)
                image = tar.extractfile(member).read()
                assert (sample.id, sample.key, sample.ext) == (seen, key, extension)
                assert (sample.offset, sample.size, sample.crc32) == (
                    member.offset_data,
                    member.size,
                    zlib.crc32(image),
                )
                assert sample.label == int(tar.extractfile(members[f"{key}.cls"]).read())
                assert sample.url == index.shard_url(sample.shard) == str(shards / shard.url)
                assert str(sample) == f"{shards / shard.url}: sample {key} at offset {member.offset_data}"
                seen += 1
    assert seen == len(index) == 32


def test_the_file_is_safetensors(shards: Path) -> None:
    index, arrays = Index.load(shards), load_file(shards / "index.safetensors")
    assert set(arrays) == {*index.columns, "sha256"}
    assert all(np.array_equal(arrays[name], column) for name, column in index.columns.items())
    assert bytes(arrays["sha256"]) == hashlib.sha256((shards / "index.safetensors").read_bytes()[:-32]).digest()
    assert [IMAGE_EXTENSIONS[ext] for ext in arrays["ext"]].count("png") > 0


def test_refusals_over_several_shards(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("k", 0), ("l", 1)])
    with pytest.raises(UserError, match=r"a\.tar: sample l at offset \d+ has label 1; there are 1 classes"):
        build(tmp_path, ["only"])
    write_tar(tmp_path / "b.tar", [("m", 0), ("k", 0)])
    expected = r"b\.tar: sample k at offset 1536: the key is also that of .*a\.tar: sample k at offset 512"
    with pytest.raises(UserError, match=expected.replace("1536", r"\d+")):
        build(tmp_path)
    write_tar(tmp_path / "b.tar", [])
    assert len(build(tmp_path)) == 2  # an empty shard between others is no harm


def test_a_missing_index_or_another_format_is_refused(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"index\.safetensors: no index there; .*fulllora index from"):
        Index.load(tmp_path)
    meta, columns, _ = map_columns(shards / "index.safetensors")
    path = tmp_path / "named.safetensors"
    path.write_bytes(pack_columns({**meta, "version": 99}, columns))
    with pytest.raises(UserError, match=r"named\.safetensors: index format 99"):
        Index.load(path)
    for strange in (b"", b"no index" * 9, (lambda d: d + hashlib.sha256(d).digest())(b"\x02" + bytes(7) + b"{}")):
        path.write_bytes(strange)
        with pytest.raises(UserError, match=r"named\.safetensors: "):
            Index.load(path)


def test_a_file_is_read_once_until_it_changes(shards: Path, tmp_path: Path) -> None:
    shutil.copytree(shards, tmp_path, dirs_exist_ok=True)
    first = Index.load(tmp_path)
    assert Index.load(str(tmp_path)) is first
    assert Index.load(tmp_path / "index.safetensors") is first
    replace(first, classes=("a", "b", "c"), hash=content_hash(("a", "b", "c"), first.columns)).save()
    assert Index.load(tmp_path).classes == ("a", "b", "c")
    assert first.classes == ("ant", "bee", "cat")


def test_an_index_may_lie_elsewhere(shards: Path, tmp_path: Path) -> None:
    index = Index.load(shards)
    absolute = tuple(replace(shard, url=str(shards / shard.url)) for shard in index.shards)
    replace(index, base=str(tmp_path), shards=absolute).save("mine.safetensors")
    loaded = Index.load(tmp_path / "mine.safetensors")
    assert loaded.hash == index.hash
    assert [loaded.sample(i).url for i in range(32)] == [index.sample(i).url for i in range(32)]


def test_other_processes_map_the_file_and_copy_nothing(shards: Path, tmp_path: Path) -> None:
    """A pickled index is small, and its arrays are pages of the file: the kernel says so of another process."""
    shutil.copytree(shards, tmp_path, dirs_exist_ok=True)
    index = Index.load(tmp_path)
    times, blob = 30_000, index.columns["keys"]
    columns = {name: np.repeat(column, times) for name, column in index.columns.items()}
    columns["keys"] = np.tile(blob, times)
    columns["key_end"] = (index.columns["key_end"] + len(blob) * np.arange(times)[:, None]).ravel()
    shards_of_many = tuple(replace(shard, samples=times * shard.samples) for shard in index.shards)
    hash = content_hash(index.classes, columns)
    big = replace(index, base=str(tmp_path), shards=shards_of_many, columns=columns, hash=hash)
    big.save()
    size = (tmp_path / "index.safetensors").stat().st_size
    assert size > 40 << 20
    big = Index.load(tmp_path)
    code = (
        "import pickle, re, sys\n"
        "index = pickle.loads(sys.stdin.buffer.read())\n"
        "total = sum(int(column.sum(dtype='u8')) for column in index.columns.values())\n"  # touches every page
        "status = open('/proc/self/status').read()\n"
        "print(total, *(1024 * int(re.search(name + r':\\s+(\\d+)', status)[1]) for name in ('RssAnon', 'RssFile')))\n"
        "index.labels.flags.writeable and sys.exit('writeable')\n"
    )
    sent = pickle.dumps(big)
    assert len(sent) < 2000
    done = subprocess.run([sys.executable, "-c", code], input=sent, capture_output=True, check=True)
    total, anonymous, of_files = map(int, done.stdout.split())
    assert total == sum(int(column.sum(dtype="u8")) for column in big.columns.values())
    assert of_files > size
    empty = subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps(Index.load(shards)), capture_output=True, check=True
    )
    assert anonymous - int(empty.stdout.split()[1]) < size / 20


def test_an_index_that_is_rebuilt_meanwhile_is_noticed(shards: Path, tmp_path: Path) -> None:
    shutil.copytree(shards, tmp_path, dirs_exist_ok=True)
    sent = pickle.dumps(Index.load(tmp_path))
    replace(Index.load(tmp_path), classes=("a", "b", "c")).save()
    with pytest.raises(UserError, match="has changed while"):
        pickle.loads(sent)


def test_an_index_in_memory_travels_whole(shards: Path) -> None:
    index = build(shards)
    assert same(pickle.loads(pickle.dumps(index)), index)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("offset", 10**6),
        ("offset", -1),
        ("size", -1),
        ("offset", 2**62),
        ("size", 2**62),
        ("shard", 4),
        ("shard", 2**31 - 1),
        ("shard", -1),
        ("ext", 9),
        ("key_end", 0),
        ("label", -1),
    ],
)
def test_an_index_that_points_outside_its_shards_is_refused(
    shards: Path, tmp_path: Path, column: str, value: int
) -> None:
    index = Index.load(shards)
    changed = index.columns[column].copy()
    changed[5] = value
    replace(index, base=str(tmp_path), columns={**index.columns, column: changed}).save()
    if column == "label":
        with pytest.raises(UserError, match="has label -1"):
            Index.load(tmp_path)
        return
    with pytest.raises(UserError, match="points outside its shards"):
        Index.load(tmp_path)


def test_offset_and_size_that_add_up_to_less_than_nothing_are_refused(shards: Path, tmp_path: Path) -> None:
    index = Index.load(shards)
    columns = {name: column.copy() for name, column in index.columns.items()}
    columns["offset"][5] = columns["size"][5] = 2**62
    replace(index, base=str(tmp_path), columns=columns).save()
    with pytest.raises(UserError, match="points outside its shards"):
        Index.load(tmp_path)


@pytest.mark.parametrize("key", [b"a\nb", b"a\x1b[2J", b"\x7f", "\x9b".encode()])
def test_control_characters_in_keys_are_refused(shards: Path, tmp_path: Path, key: bytes) -> None:
    index = Index.load(shards)
    keys = index.columns["keys"].copy()
    keys[3 : 3 + len(key)] = np.frombuffer(key, np.uint8)
    replace(index, base=str(tmp_path), columns={**index.columns, "keys": keys}).save()
    with pytest.raises(UserError, match="control characters in its keys"):
        Index.load(tmp_path)


@pytest.mark.parametrize(
    ("metadata", "columns", "message"),
    [
        ({"bytes": "10000"}, {}, "the index is damaged .not a shard"),
        ({"samples": 7.0}, {}, "the index is damaged .not a shard"),
        ({"url": 3}, {}, "the index is damaged .not a shard"),
        ({"etag": 3}, {}, "the index is damaged .not a shard"),
        ({"more": 3}, {}, "the index is damaged"),
        ({}, {"keys": np.zeros(32, np.int64)}, "no column keys of type"),
        ({}, {"crc32": None}, "no column crc32 of type"),
        ({}, {"label": np.zeros(32, np.int64)}, "the hash in the index is not that of its content"),
    ],
)
def test_an_index_of_other_parts_is_refused(
    shards: Path, tmp_path: Path, metadata: dict, columns: dict, message: str
) -> None:
    meta, found, _ = map_columns(shards / "index.safetensors")
    meta["shards"][0] |= metadata
    changed = {name: column for name, column in {**found, **columns}.items() if column is not None}
    (tmp_path / "index.safetensors").write_bytes(pack_columns(meta, changed))
    with pytest.raises(UserError, match=message) as caught:
        Index.load(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("change", [{"classes": [1, 2, 3]}, {"classes": 3}, {"shards": 3}, {"shards": [3]}])
def test_other_json_is_refused(shards: Path, tmp_path: Path, change: dict) -> None:
    meta, columns, _ = map_columns(shards / "index.safetensors")
    (tmp_path / "index.safetensors").write_bytes(pack_columns({**meta, **change}, columns))
    with pytest.raises(UserError, match="the index is damaged"):
        Index.load(tmp_path)
    (tmp_path / "index.safetensors").write_bytes(pack_columns([meta], columns))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="not an index of this program"):
        Index.load(tmp_path)


@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_flipped_bit_is_refused_or_changes_nothing(shards: Path, tmp_path: Path, place: float, bit: int) -> None:
    data = bytearray((shards / "index.safetensors").read_bytes())
    data[int(place * len(data))] ^= 1 << bit
    (tmp_path / "index.safetensors").write_bytes(data)
    try:
        damaged = Index.load(tmp_path)
    except UserError:
        return
    assert same(damaged, Index.load(shards))


@pytest.mark.parametrize("keep", [0, 100, 0.5, 0.99])
def test_a_cut_index_is_refused(shards: Path, tmp_path: Path, keep: float) -> None:
    shutil.copy(shards / "index.safetensors", tmp_path)
    data = (tmp_path / "index.safetensors").read_bytes()
    (tmp_path / "index.safetensors").write_bytes(data[: int(keep if keep > 1 else keep * len(data))])
    with pytest.raises(UserError, match=r"damaged|empty file"):
        Index.load(tmp_path)
