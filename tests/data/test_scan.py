import bz2
import gzip
import hashlib
import io
import lzma
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fulllora_dist.core.errors import UserError
from fulllora_dist.data.shards.scan import ANY_FIELDS, IMAGE_EXTENSIONS, FieldNames, ShardScan, scan_file, scan_stream

SAMPLES = [(f"d/k{i}", bytes([i]) * (300 + 212 * i)) for i in range(4)]  # one fills its blocks exactly
MEMBERS = [(key + extension, data) for key, jpg in SAMPLES for extension, data in ((".cls", b"1"), (".jpg", jpg))]


def tar_bytes(members: list[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            info.mtime = 0.5  # what a PAX archive gives a header of its own
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


GOOD = tar_bytes(MEMBERS)
with tarfile.open(fileobj=io.BytesIO(GOOD)) as _tar:
    HEADER = _tar.getmembers()[4]  # the first of sample 2
    DATA_END = -(-(_tar.getmembers()[-1].offset_data + len(SAMPLES[-1][1])) // 512) * 512


class OnlyForward:
    """A stream that knows nothing but `read`, as a body that comes over a network, and counts what it gives."""

    def __init__(self, data: bytes):
        self._data = io.BytesIO(data)
        self.largest = 0

    def read(self, size: int) -> bytes:
        self.largest = max(self.largest, size)
        return self._data.read(size)


def scan(folder: Path, data: bytes, wanted: FieldNames = ANY_FIELDS) -> ShardScan:
    """From disk and as a stream of unknown length: the same, refusals included."""
    path = _written(folder, data)
    try:
        result = scan_file(path, wanted=wanted)
    except UserError:
        with pytest.raises(UserError, match=r"shard-0\.tar"):
            scan_stream(OnlyForward(data), "shard-0.tar", wanted=wanted)
        raise
    streamed = scan_stream(OnlyForward(data), "shard-0.tar", wanted=wanted)
    assert streamed.shard == result.shard
    assert all(np.array_equal(streamed.columns[name], result.columns[name]) for name in result.columns)
    return result


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_scan_finds_what_tarfile_finds(tmp_path: Path, format: int) -> None:
    long_name = "f" * 60 + "/" + "n" * 60 + ("" if format == tarfile.USTAR_FORMAT else "n" * 150)
    data = tar_bytes([*MEMBERS, (long_name + ".cls", b" 7\n"), (long_name + ".PNG", b"png")], format)
    result = scan(tmp_path, data)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        images = [m for m in tar.getmembers() if not m.name.endswith(".cls")]
        expected = [(m.name[:-4], m.offset_data, m.size, zlib.crc32(tar.extractfile(m).read())) for m in images]
    columns = result.columns
    assert list(zip(result.keys(), columns["offset"], columns["size"], columns["crc32"], strict=True)) == expected
    assert columns["label"].tolist() == [1, 1, 1, 1, 7]
    assert [IMAGE_EXTENSIONS[ext] for ext in columns["ext"]] == ["jpg"] * 4 + ["png"]
    shard = result.shard
    assert (shard.url, shard.bytes, shard.samples) == ("shard-0.tar", len(data), 5)
    assert shard.sha256 == hashlib.sha256(data).hexdigest()


@given(cut=st.integers(0, DATA_END + 1023))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_shard_cut_anywhere_is_refused(tmp_path: Path, cut: int) -> None:
    with pytest.raises(UserError, match=r"shard-0\.tar"):
        scan(tmp_path, GOOD[:cut])


def test_the_end_marker_is_all_that_must_follow(tmp_path: Path) -> None:
    assert scan(tmp_path, GOOD[: DATA_END + 1024]).shard.samples == 4


def _without(name: str) -> bytes:
    return tar_bytes([member for member in MEMBERS if member[0] != name])


def _symlink() -> bytes:
    link = tarfile.TarInfo("d/k9.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "k0.jpg"
    return link.tobuf() + GOOD


JSON = [
    (f"{i}.{extension}", data)
    for i, label in enumerate(['{"label": 3, "fine": "12"}', '{"label": 0, "fine": " 7 "}'])
    for extension, data in (("json", label.encode()), ("webp", b"webp"))
]


def test_labels_from_json(tmp_path: Path) -> None:
    result = scan(tmp_path, tar_bytes(JSON))
    assert result.columns["label"].tolist() == [3, 0]
    assert [IMAGE_EXTENSIONS[ext] for ext in result.columns["ext"]] == ["webp"] * 2
    assert scan(tmp_path, tar_bytes(JSON), FieldNames("fine")).columns["label"].tolist() == [12, 7]
    both = [("k.json", b'{"label": "a dog"}'), ("k.cls", b"4"), ("k.jpg", b"j")]
    assert scan(tmp_path, tar_bytes(both)).columns["label"].tolist() == [4]


def test_foreign_members_and_folders_are_no_samples_of_their_own(tmp_path: Path) -> None:
    folder = tarfile.TarInfo("d")
    folder.type = tarfile.DIRTYPE
    extra = tar_bytes(
        [("d/k.cls", b"0"), ("d/k.jpg", b"j"), ("d/k.txt", b"a caption"), ("d/k.seg.png", b"a mask"), ("LICENSE", b"x")]
    )
    result = scan(tmp_path, folder.tobuf() + extra)
    assert (result.keys(), result.columns["size"].tolist(), result.skipped) == (["d/k"], [1], 1)


def test_a_scan_takes_constant_memory() -> None:
    stream = OnlyForward(tar_bytes([("big.jpg", bytes(32 << 20)), ("big.cls", b"0")]))
    assert scan_stream(stream, "big.tar").columns["size"].tolist() == [32 << 20]
    assert stream.largest <= 1 << 20


def test_a_stream_that_ends_early_or_late_is_refused() -> None:
    for length in (len(GOOD) - 512, len(GOOD) + 512):
        with pytest.raises(UserError, match=f"read {len(GOOD)} of {length} bytes"):
            scan_stream(OnlyForward(GOOD), "s.tar", length=length)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        pytest.param(GOOD[: HEADER.offset], f"no end marker at offset {HEADER.offset}", id="cut at a header"),
        pytest.param(
            GOOD[: HEADER.offset + 512], r"member 'd/k2\.cls' at offset \d+ is truncated", id="cut behind a header"
        ),
        pytest.param(
            GOOD[: HEADER.offset + 99], f"truncated in a header at offset {HEADER.offset}", id="cut in a header"
        ),
        pytest.param(
            GOOD[: HEADER.offset_data + 1100], r"member 'd/k2\.jpg' at offset \d+ is truncated", id="cut in data"
        ),
        pytest.param(GOOD[: DATA_END + 512], f"the end marker at offset {DATA_END} is cut", id="half an end marker"),
        pytest.param(
            GOOD[: DATA_END + 512] + GOOD, f"data after half an end marker at offset {DATA_END}", id="tars joined early"
        ),
        pytest.param(GOOD[: DATA_END - 1], "truncated or damaged at offset", id="cut in padding"),
        pytest.param(
            GOOD[: HEADER.offset + 3] + b"?" + GOOD[HEADER.offset + 4 :],
            f"damaged header at offset {HEADER.offset}",
            id="header checksum",
        ),
        pytest.param(GOOD + GOOD, "data after the end marker", id="two tars in one"),
        pytest.param(gzip.compress(GOOD), "compressed with gzip", id="gz"),
        pytest.param(bz2.compress(GOOD), "compressed with bzip2", id="bz2"),
        pytest.param(lzma.compress(GOOD), "compressed with xz", id="xz"),
        pytest.param(b"\x28\xb5\x2f\xfd" + GOOD, "compressed with zstd", id="zst"),
        pytest.param(b"", r"truncated or damaged at offset 0 \(empty file", id="empty"),
        pytest.param(b"<Error>NoSuchKey</Error>" * 99, "truncated or damaged at offset 0", id="no tar"),
        pytest.param(
            tar_bytes([*MEMBERS, *MEMBERS[:2]]), r"key d/k0 occurs twice, at offsets \d+ and \d+", id="key twice"
        ),
        pytest.param(
            tar_bytes([*MEMBERS, MEMBERS[-1]]), r"member 'd/k3\.jpg' at offset \d+ occurs twice", id="member twice"
        ),
        pytest.param(_without("d/k2.cls"), r"sample d/k2 at offset \d+ has no label", id="no class"),
        pytest.param(_without("d/k2.jpg"), r"sample d/k2 at offset \d+ must have one image .*, has 0", id="no image"),
        pytest.param(tar_bytes([*MEMBERS, ("d/k3.png", b"p")]), r"must have one image .*, has 2", id="two images"),
        pytest.param(
            tar_bytes([("k.cls", b"-1"), ("k.jpg", b"j")]), "'-1', which is not a class index", id="bad class"
        ),
        pytest.param(
            tar_bytes([("k.cls", "\u0661".encode()), ("k.jpg", b"j")]), "which is not a class index", id="odd digit"
        ),
        pytest.param(
            tar_bytes([("k.cls", b"cat"), ("k.jpg", b"j")]), "'cat', which is not a class index", id="class name"
        ),
        pytest.param(tar_bytes([("k.cls", bytes(2 << 20))]), "a label may have at most", id="large class"),
        pytest.param(tar_bytes([("k.json", b"{"), ("k.jpg", b"j")]), r"its \.json cannot be read", id="bad json"),
        pytest.param(tar_bytes([("k.json", b"[" * 99999), ("k.jpg", b"j")]), "json cannot be read", id="deep json"),
        pytest.param(tar_bytes([("k.json", b"[1]"), ("k.jpg", b"j")]), "no field 'label'", id="no field"),
        pytest.param(tar_bytes([("k.json", b'{"label": true}'), ("k.jpg", b"j")]), "not a class index", id="a bool"),
        pytest.param(tar_bytes([("k.json", b'{"label": 1.5}'), ("k.jpg", b"j")]), "not a class index", id="a float"),
        pytest.param(_symlink(), "is not a plain file", id="link"),
    ],
)
def test_refused_with_the_place(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        scan_file(_written(tmp_path, data))
    assert "shard-0.tar" in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"shard-0\.tar"):
        scan(tmp_path, data)


def _written(folder: Path, data: bytes) -> Path:
    path = folder / "shard-0.tar"
    path.write_bytes(data)
    return path


def test_a_label_without_a_class_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sample d/k0 at offset \d+ has label 1; there are 1 classes"):
        scan(tmp_path, GOOD, FieldNames(classes=1))
    assert scan(tmp_path, GOOD, FieldNames(classes=2)).shard.samples == 4
