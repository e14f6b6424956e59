"""The strict pass over one WebDataset shard: what an index knows of it."""

import hashlib
import itertools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fulllora_dist.core.errors import UserError
from fulllora_dist.data.shards.fields import IMAGE_EXTENSIONS, Field, FieldNames, last_extension
from fulllora_dist.data.shards.members import SampleGrouping
from fulllora_dist.data.shards.tar import Readable, walk_tar

COLUMNS = {
    "label": "<i8",
    "offset": "<i8",
    "size": "<i8",
    "key_end": "<i8",
    "crc32": "<u4",
    "ext": "|u1",
    "keys": "|u1",
}
ANY_FIELDS = FieldNames()


@dataclass(frozen=True)
class Shard:
    """A shard as it was when it was indexed.

    Attributes:
        url: its name in the folder of the index, or an absolute path or URL.
        bytes: its length.
        etag: what the object store called this content; None where there is none (local files).
        sha256: hex, of all its bytes.
        samples: how many it holds.
    """

    url: str
    bytes: int
    etag: str | None
    sha256: str
    samples: int


class ShardScan(NamedTuple):
    """What the strict pass found in one shard.

    Attributes:
        columns: maps each name of `COLUMNS` to an array of its samples.
        skipped: members that belong to no sample.
    """

    shard: Shard
    columns: dict[str, np.ndarray]
    skipped: int = 0

    def keys(self) -> list[str]:
        """The samples' keys, in order."""
        ends, blob = self.columns["key_end"].tolist(), self.columns["keys"].tobytes()
        return [blob[a:b].decode("utf-8", "surrogateescape") for a, b in itertools.pairwise([0, *ends])]


class _Digest:
    """Hashes and counts what is read through it."""

    def __init__(self, stream: Readable):
        self._stream = stream
        self.sha256 = hashlib.sha256()
        self.length = 0

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self.sha256.update(data)
        self.length += len(data)
        return data


def scan_file(path: Path, name: str | None = None, wanted: FieldNames = ANY_FIELDS) -> ShardScan:
    """`scan_stream` of a local shard; `name` is what it will be called, where that differs from `path`."""
    try:
        with open(path, "rb") as file:
            length = os.fstat(file.fileno()).st_size
            return scan_stream(file, name or path.name, length=length, wanted=wanted)
    except OSError as error:
        raise UserError(f"{path}: cannot read the shard ({error.strerror or error})") from error


def scan_stream(
    stream: Readable, url: str, *, length: int | None = None, etag: str | None = None, wanted: FieldNames = ANY_FIELDS
) -> ShardScan:
    """Read one shard strictly, once, in constant memory (but for the rows).

    Args:
        stream: its bytes from the first to the last.
        url, etag: what `Shard` will say; `url` is also the name in messages.
        length: in bytes, where known.
        wanted: which members are image and label.

    Raises:
        UserError: what `walk_tar` refuses; a key that occurs twice, or whose members are not neighbours; a sample
            without an image or without a label, or whose label is not a class; a member that is a link or a device, or
            with a name that leaves its folder. The message names the shard and the offset.
    """
    digest = _Digest(stream)
    rows: dict[str, list[Any]] = {column: [] for column in COLUMNS}
    keys = bytearray()
    seen: dict[str, int] = {}
    incomplete: dict[str, str] = {}  # the rest may come later: that is another mistake, with another remedy
    grouping = SampleGrouping(url, wanted)
    for key, fields in grouping.samples(walk_tar(digest, url, length)):
        offset = min(field.offset for field in fields.values())
        sample = f"{url}: sample {key} at offset {offset}"
        lacks = wanted.lacking(grouping.extensions(key, fields))
        if (first := seen.setdefault(key, offset)) != offset:
            if lacks is None and key not in incomplete:
                raise UserError(f"{url}: key {key} occurs twice, at offsets {first} and {offset}")
            raise UserError(
                f"{url}: the members of sample {key} are not adjacent (offsets {first} and {offset}), readers take "
                "them for two samples; unpack the shard and sort it: tar --sort=name -cf SHARD -C FOLDER ."
            )
        if lacks is not None:
            incomplete[key] = f"{sample} {lacks}" if not incomplete else ""
            continue
        keys += key.encode("utf-8", "surrogateescape")
        row = {**_image(fields, wanted), "label": wanted.label_of(fields, sample), "key_end": len(keys)}
        for column, value in row.items():
            rows[column].append(value)
    if length is not None and digest.length != length:
        raise UserError(f"{url}: read {digest.length} of {length} bytes; it changed meanwhile")
    if incomplete:
        raise UserError(next(iter(incomplete.values())))
    columns = {column: np.array(values, dtype=COLUMNS[column]) for column, values in rows.items()}
    columns["keys"] = np.frombuffer(bytes(keys), dtype=np.uint8)
    shard = Shard(url, digest.length, etag, digest.sha256.hexdigest(), len(seen))
    return ShardScan(shard, columns, grouping.skipped(seen))


def _image(fields: dict[str, Field], wanted: FieldNames) -> dict[str, int]:
    (extension,) = wanted.images(fields)
    image = fields[extension]
    number = IMAGE_EXTENSIONS.index(last_extension(extension))
    return {"offset": image.offset, "size": image.size, "crc32": image.crc32, "ext": number}
