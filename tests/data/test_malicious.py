"""What a shard, an image or an index that somebody else made may try. Each is refused in one line; nothing is run,
followed, written or held in memory."""

import io
import pickle
import struct
import tarfile
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fulllora_dist.core.errors import UserError
from fulllora_dist.data.index import Index
from fulllora_dist.data.index_file import pack_columns
from fulllora_dist.data.shards.scan import scan_file, scan_stream
from fulllora_dist.data.transforms import EvalTransform, TrainTransform

END = bytes(1024)
ARMED = Path("/tmp/fulllora_dist_was_here")


class Trap:
    def __reduce__(self):
        return ARMED.touch, ()


def member(name: str, data: bytes = b"0", kind: bytes = tarfile.REGTYPE, **fields) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)


def resized(header: bytes, size: bytes) -> bytes:
    """The header (first block) with other bytes in its size field and a checksum that fits."""
    block = bytearray(header[:512])
    block[124:136] = size.ljust(12, b"\0")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + header[512:]


def base256(number: int) -> bytes:
    return (b"\x80" if number >= 0 else b"\xff") + (number & ((1 << 88) - 1)).to_bytes(11, "big")


def pax(kind: bytes, **records: str) -> bytes:
    body = b""
    for key, value in records.items():
        line = f" {key.replace('_', '.')}={value}\n".encode()
        length = next(n for n in range(1000) if n == len(line) + len(str(n)))
        body += str(length).encode() + line
    return member("pax", body, kind)


SAMPLE = member("k.cls") + member("k.jpg", b"j" * 700)
SPARSE_PAX = pax(tarfile.XHDTYPE, GNU_sparse_major="1", GNU_sparse_minor="0", GNU_sparse_realsize="9999999999")

SHARDS = {
    "parent": (member("../../etc/cron.d/k.jpg"), "a name must stay inside the shard"),
    "parent inside": (member("a/../k.jpg"), "a name must stay inside the shard"),
    "absolute": (member("/etc/passwd.jpg"), "a name must stay inside the shard"),
    "newline": (member("k\nerror: all is well.jpg"), "a name must stay inside the shard"),
    "escape sequence": (member("k\x1b[2J.jpg"), "a name must stay inside the shard"),
    "symbolic link": (member("k.jpg", b"", tarfile.SYMTYPE, linkname="/etc/passwd"), "not a plain file"),
    "hard link": (member("k.jpg", b"", tarfile.LNKTYPE, linkname="/etc/passwd"), "not a plain file"),
    "character device": (member("k.jpg", b"", tarfile.CHRTYPE, devmajor=1, devminor=5), "not a plain file"),
    "block device": (member("k.jpg", b"", tarfile.BLKTYPE, devmajor=8), "not a plain file"),
    "pipe": (member("k.jpg", b"", tarfile.FIFOTYPE), "not a plain file"),
    "unknown type": (member("k.jpg", b"", b"Z"), "not a plain file"),
    "gnu sparse": (member("k.jpg", b"", tarfile.GNUTYPE_SPARSE), "not a plain file"),
    "pax sparse": (SPARSE_PAX + member("k.jpg", b"1\n0\n1\n".ljust(512, b"\0") + b"x"), "not a plain file|truncated"),
    "8 GB octal": (resized(member("k.jpg"), b"77777777777"), "is truncated"),
    "2**60 bytes": (resized(member("k.jpg"), base256(1 << 60)), "is truncated"),
    "negative size": (resized(member("k.jpg"), base256(-512)), "size of -512 bytes"),
    "very negative size": (SAMPLE + resized(member("l.jpg"), base256(-4096)), "size of -4096 bytes"),
    "size is no number": (resized(member("k.jpg"), b"dog"), "damaged"),
    "pax size beyond the end": (pax(tarfile.XHDTYPE, size="99999999999") + member("k.jpg"), "is truncated"),
    "pax size negative": (pax(tarfile.XHDTYPE, size="-512") + member("k.jpg"), "size of -512"),
    "pax size hides a member": (pax(tarfile.XGLTYPE, size="1536") + member("k.jpg") + SAMPLE, "two different sizes"),
    "pax name": (pax(tarfile.XHDTYPE, path="../k.jpg") + member("k.jpg"), "a name must stay inside the shard"),
    "pax header of 1 GB": (resized(member("pax", b"", tarfile.XHDTYPE), b"10000000000"), "header of"),
    "long name of 1 GB": (resized(member("l", b"", tarfile.GNUTYPE_LONGNAME), b"10000000000"), "header of"),
    "pax header of negative size": (resized(member("pax", b"", tarfile.XHDTYPE), base256(-512)), "header of"),
    "5,000 headers in a row": (pax(tarfile.XHDTYPE, comment="x") * 5000 + SAMPLE, "damaged"),
}  # fmt: skip


@pytest.mark.parametrize("name", SHARDS)
def test_a_hostile_shard_is_refused_in_one_line_and_little_memory(tmp_path: Path, name: str) -> None:
    data, message = SHARDS[name]
    path = tmp_path / "shard.tar"
    path.write_bytes(data + END)
    tracemalloc.start()
    with pytest.raises(UserError, match=message) as caught:
        scan_file(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(caught.value).isprintable()
    assert "shard.tar" in str(caught.value)
    assert peak < 8 << 20
    assert [file.name for file in tmp_path.iterdir()] == ["shard.tar"]
    with pytest.raises(UserError):  # of unknown length, from a network
        scan_stream(io.BytesIO(data + END), "shard.tar")


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    armed = pickle.dumps(Trap())
    pickle.loads(armed)
    assert ARMED.exists(), "the trap does not work"
    ARMED.unlink()
    extras = b"".join(member(f"k.{extension}", armed) for extension in ("pkl", "pyd", "pth", "npy", "ten", "mp"))
    path = tmp_path / "shard.tar"
    path.write_bytes(SAMPLE + extras + END)
    assert scan_file(path).shard.samples == 1
    for extension in ("cls", "json"):
        path.write_bytes(member("k.jpg") + member(f"k.{extension}", armed) + END)
        with pytest.raises(UserError):
            scan_file(path)
    for transform in (EvalTransform(8), TrainTransform(8)):
        with pytest.raises(UserError, match="not a readable"):
            transform(armed, np.random.default_rng(0))
    assert not ARMED.exists()


def png_of(width: int, height: int) -> bytes:
    """A PNG of any size in a few bytes: its header, and one row's worth of nothing."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(1 << 20), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def jpeg_of(width: int, height: int) -> bytes:
    """A small JPEG whose header claims another size."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "JPEG")
    data = buffer.getvalue()
    start = data.index(b"\xff\xc0") + 5
    return data[:start] + struct.pack(">HH", height, width) + data[start + 4 :]


@pytest.mark.parametrize("transform", [EvalTransform(8), TrainTransform(8, backend="pil"), TrainTransform(8)])
@pytest.mark.parametrize(
    "data", [png_of(60_000, 60_000), jpeg_of(65_000, 65_000), png_of(14_000, 14_000)], ids=["png", "jpeg", "small bomb"]
)
def test_a_decompression_bomb_is_refused_before_it_is_decoded(transform, data: bytes) -> None:
    tracemalloc.start()
    with pytest.raises(UserError, match="pixels"):
        transform(data, np.random.default_rng(0))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../../etc/passwd", "outside its folder"),
        ("pipe:rm -rf ~", "must be a path or a URL of"),
        ("simplecache::s3://b/k.tar", "must be a path or a URL of"),
        ("ftp://host/k.tar", "must be a path or a URL of"),
    ],
)
def test_an_index_cannot_name_what_is_no_shard(shards: Path, tmp_path: Path, name: str, message: str) -> None:
    index = Index.load(shards)
    meta = {
        "version": 2,
        "hash": index.hash,
        "classes": index.classes,
        "shards": [{**vars(shard), "url": name} for shard in index.shards],
    }
    (tmp_path / "index.safetensors").write_bytes(pack_columns(meta, index.columns))
    with pytest.raises(UserError, match=message):
        Index.load(tmp_path)


def test_an_index_from_a_bucket_cannot_name_files_of_this_machine(shards: Path, tmp_path: Path) -> None:
    index = Index.load(shards)
    absolute = [{**vars(shard), "url": str(shards / shard.url)} for shard in index.shards]
    for url in ("/etc/passwd", "file:///etc/passwd"):
        absolute[0]["url"] = url
        meta = {"version": 2, "hash": index.hash, "classes": index.classes, "shards": absolute}
        path = tmp_path / "fetched.safetensors"
        path.write_bytes(pack_columns(meta, index.columns))
        assert Index._map(path, str(tmp_path)).shard_url(0)
        with pytest.raises(UserError, match="outside its folder"):
            Index._map(path, "s3://bucket/train")
