import gzip
import io
import tarfile
import zlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fulllora_dist.data.scan import scan_shard
from fulllora_dist.errors import UserError

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


def scan(folder: Path, data: bytes):
    path = folder / "shard-0.tar"
    path.write_bytes(data)
    return scan_shard(path)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_scan_finds_what_tarfile_finds(tmp_path: Path, format: int) -> None:
    long_name = "f" * 60 + "/" + "n" * 60 + ("" if format == tarfile.USTAR_FORMAT else "n" * 150)
    data = tar_bytes([*MEMBERS, (long_name + ".cls", b" 7\n"), (long_name + ".PNG", b"png")], format)
    result = scan(tmp_path, data)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        pictures = [m for m in tar.getmembers() if not m.name.endswith(".cls")]
        expected = [(m.name[:-4], m.offset_data, m.size, zlib.crc32(tar.extractfile(m).read())) for m in pictures]
    columns = result.columns
    keys = [key.decode() for key in columns["key"]]
    assert list(zip(keys, columns["offset"], columns["size"], columns["crc32"], strict=True)) == expected
    assert columns["label"].tolist() == [1, 1, 1, 1, 7]
    assert columns["ext"].tolist() == [b"jpg"] * 4 + [b"png"]
    assert (result.shard.bytes, result.shard.samples) == (len(data), 5)


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


@pytest.mark.parametrize(
    ("data", "message"),
    [
        pytest.param(GOOD[: HEADER.offset], f"no end marker at offset {HEADER.offset}", id="cut at a header"),
        pytest.param(GOOD[: HEADER.offset + 512], "truncated inside member d/k2.cls", id="cut behind a header"),
        pytest.param(
            GOOD[: HEADER.offset + 99], f"truncated in a header at offset {HEADER.offset}", id="cut in a header"
        ),
        pytest.param(GOOD[: HEADER.offset_data + 1100], "truncated inside member d/k2.jpg", id="cut in data"),
        pytest.param(GOOD[: DATA_END + 512], "no end marker", id="half an end marker"),
        pytest.param(
            GOOD[: HEADER.offset + 3] + b"?" + GOOD[HEADER.offset + 4 :],
            f"damaged header at offset {HEADER.offset}",
            id="header checksum",
        ),
        pytest.param(GOOD + GOOD, "data after the end marker", id="two tars in one"),
        pytest.param(gzip.compress(GOOD), "compressed with gzip", id="compressed"),
        pytest.param(b"", "no readable tar header", id="empty"),
        pytest.param(b"<Error>NoSuchKey</Error>" * 99, "no readable tar header", id="no tar"),
        pytest.param(tar_bytes([*MEMBERS, *MEMBERS[:2]]), "key d/k0 occurs twice", id="key twice"),
        pytest.param(tar_bytes([*MEMBERS, MEMBERS[-1]]), r"member d/k3\.jpg occurs twice", id="member twice"),
        pytest.param(_without("d/k2.cls"), r"sample d/k2 at offset \d+ has no \.cls", id="no class"),
        pytest.param(_without("d/k2.jpg"), r"sample d/k2 at offset \d+ has 0 pictures", id="no picture"),
        pytest.param(tar_bytes([*MEMBERS, ("d/k3.png", b"")]), "has 2 pictures", id="two pictures"),
        pytest.param(tar_bytes([("k.cls", b"-1"), ("k.jpg", b"")]), "'-1'; a class index is right", id="bad class"),
        pytest.param(tar_bytes([("noextension", b"")]), "is no plain file named KEY.EXTENSION", id="no extension"),
        pytest.param(_symlink(), "is no plain file", id="link"),
    ],
)
def test_refused_with_the_place(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        scan(tmp_path, data)
    assert "shard-0.tar" in str(caught.value)
    assert "\n" not in str(caught.value)
