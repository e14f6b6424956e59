"""The strict pass over one WebDataset shard: what an index knows of it."""

import hashlib
import itertools
import json
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fulllora_dist.core.errors import UserError
from fulllora_dist.data.shards.tar import Member, Readable, walk_tar

COLUMNS = {
    "label": "<i8",
    "offset": "<i8",
    "size": "<i8",
    "key_end": "<i8",
    "crc32": "<u4",
    "ext": "|u1",
    "keys": "|u1",
}
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")

_MAX_LABEL_BYTES = 1 << 20  # a JSON label is held in memory whole
# webdataset's rule: the key ends at the first dot of the file name, folders belong to the key.
_MEMBER_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")  # keys are logged


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
    """What the strict pass found in one shard: `columns` maps each name of `COLUMNS` to an array of its samples."""

    shard: Shard
    columns: dict[str, np.ndarray]

    def keys(self) -> list[str]:
        """The samples' keys, in order."""
        ends, blob = self.columns["key_end"].tolist(), self.columns["keys"].tobytes()
        return [blob[a:b].decode("utf-8", "surrogateescape") for a, b in itertools.pairwise([0, *ends])]


@dataclass(frozen=True)
class Labels:
    """Which labels a scan takes: the field of a .json that holds them, and the number of classes where it is known."""

    field: str = "label"
    classes: int | None = None


ANY_LABELS = Labels()


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


def scan_file(path: Path, name: str | None = None, labels: Labels = ANY_LABELS) -> ShardScan:
    """`scan_stream` of a local shard; `name` is what it will be called, where that differs from `path`."""
    try:
        with open(path, "rb") as file:
            length = os.fstat(file.fileno()).st_size
            return scan_stream(file, name or path.name, length=length, labels=labels)
    except OSError as error:
        raise UserError(f"{path}: cannot read the shard ({error.strerror or error})") from error


def scan_stream(
    stream: Readable, url: str, *, length: int | None = None, etag: str | None = None, labels: Labels = ANY_LABELS
) -> ShardScan:
    """Read one shard strictly, once, in constant memory (but for the rows).

    Args:
        stream: its bytes from the first to the last.
        url, etag: what `Shard` will say; `url` is also the name in messages.
        length: in bytes, where known.
        labels: a .cls is the label where there is one, else a field of the .json.

    Raises:
        UserError: what `walk_tar` refuses; a key that occurs twice; a sample without an image or without a label, or
            whose label is not a class index; a member that is not a plain file, has no extension, or a name that leaves
            its folder. The message names the shard and the offset.
    """
    digest = _Digest(stream)
    rows: dict[str, list[Any]] = {column: [] for column in COLUMNS}
    keys = bytearray()
    seen: dict[str, int] = {}
    for key, fields in _samples(walk_tar(digest, url, length), url):
        offset = min(field.offset for field in fields.values())
        if (first := seen.setdefault(key, offset)) != offset:
            raise UserError(f"{url}: key {key} occurs twice, at offsets {first} and {offset}")
        sample = f"{url}: sample {key} at offset {offset}"
        keys += key.encode("utf-8", "surrogateescape")
        row = {**_image(fields, sample).row(), "label": _label(fields, sample, labels), "key_end": len(keys)}
        for column, value in row.items():
            rows[column].append(value)
    if length is not None and digest.length != length:
        raise UserError(f"{url}: read {digest.length} of {length} bytes; it changed meanwhile")
    columns = {column: np.array(values, dtype=COLUMNS[column]) for column, values in rows.items()}
    columns["keys"] = np.frombuffer(bytes(keys), dtype=np.uint8)
    return ShardScan(Shard(url, digest.length, etag, digest.sha256.hexdigest(), len(seen)), columns)


@dataclass(frozen=True)
class _Field:
    """One member of a sample. `offset` is that of its data; `text` is the data where it may hold a label."""

    extension: str
    offset: int
    size: int
    crc32: int = 0
    text: bytes = b""

    def row(self) -> dict[str, int]:
        extension = IMAGE_EXTENSIONS.index(self.extension)
        return {"offset": self.offset, "size": self.size, "crc32": self.crc32, "ext": extension}


def _samples(members: Iterator[Member], name: str) -> Iterator[tuple[str, dict[str, _Field]]]:
    """Neighbouring members that share a key are one sample, as webdataset has it."""
    current, fields = "", dict[str, _Field]()
    for member in members:
        if member.is_folder:
            continue
        described = f"{name}: member {member.name!r} at offset {member.offset}"
        match = _MEMBER_NAME.fullmatch(member.name)
        if not member.is_file or match is None:
            raise UserError(f"{described} is not a plain file named KEY.EXTENSION")
        if member.name.startswith("/") or ".." in member.name.split("/") or _CONTROL.search(member.name):
            raise UserError(f"{described}: a name must stay inside the shard and have no control characters")
        key, extension = match[1], match[2].lower()
        if key != current:
            if fields:
                yield current, fields
            current, fields = key, {}
        if extension in fields:
            raise UserError(f"{described} occurs twice in its sample")
        fields[extension] = _read_field(member, extension, described)
    if fields:
        yield current, fields


def _read_field(member: Member, extension: str, described: str) -> _Field:
    field = _Field(extension, member.offset_data, member.size)
    if extension in IMAGE_EXTENSIONS:
        crc32 = 0
        for chunk in member.chunks():
            crc32 = zlib.crc32(chunk, crc32)
        return replace(field, crc32=crc32)
    if extension in ("cls", "json"):
        if member.size > _MAX_LABEL_BYTES:
            raise UserError(f"{described} has {member.size} bytes; a label may have at most {_MAX_LABEL_BYTES}")
        return replace(field, text=b"".join(member.chunks()))
    return field


def _image(fields: dict[str, _Field], sample: str) -> _Field:
    images = [field for extension, field in fields.items() if extension in IMAGE_EXTENSIONS]
    if len(images) != 1:
        raise UserError(f"{sample} must have one image ({', '.join(IMAGE_EXTENSIONS)}), has {len(images)}")
    return images[0]


def _label(fields: dict[str, _Field], sample: str, labels: Labels) -> int:
    if "cls" in fields:
        text = fields["cls"].text.decode("ascii", "replace").strip()
    elif "json" in fields:
        text = _json_label(fields["json"].text, sample, labels.field)
    else:
        raise UserError(f"{sample} has no label: neither .cls nor .json")
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise UserError(f"{sample} has the label {text[:40]!r}, which is not a class index")
    if labels.classes is not None and int(text) >= labels.classes:
        raise UserError(f"{sample} has label {text}; there are {labels.classes} classes")
    return int(text)


def _json_label(data: bytes, sample: str, field: str) -> str:
    try:
        holder = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{sample}: its .json cannot be read ({error})") from error
    value = holder.get(field) if isinstance(holder, dict) else None
    if value is None:
        raise UserError(f"{sample}: its .json has no field {field!r}; --label-field names the one that holds the label")
    return value.strip() if isinstance(value, str) else json.dumps(value)
