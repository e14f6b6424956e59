"""The strict pass over one WebDataset shard.

A tar reader that stops at the first odd header loses samples without a word (a shard cut at a header yields what came
before it), so the pass here refuses everything that is not a complete, uncompressed tar of complete samples.
"""

import hashlib
import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fulllora_dist.errors import UserError

COLUMNS = {"key": "S", "label": "<i4", "offset": "<i8", "size": "<i8", "crc32": "<u4", "ext": "S4"}

_IMAGE_EXTENSIONS = ("jpg", "jpeg", "png")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_END_MARKER = 2 * tarfile.BLOCKSIZE
# webdataset's rule: the key ends at the first dot of the file name, folders belong to the key.
_MEMBER_NAME = re.compile(r"^((?:.*/)?[^./]+)\.([^/]+)$")


@dataclass(frozen=True)
class Shard:
    """A shard as it was when it was indexed."""

    name: str
    bytes: int
    sha256: str
    samples: int


class ShardScan(NamedTuple):
    """What the strict pass found in one shard: `columns` maps each name of `COLUMNS` to an array of its samples."""

    shard: Shard
    columns: dict[str, np.ndarray]


def walk_tar(stream: BufferedReader, name: str) -> Iterator[tarfile.TarInfo]:
    """The members of an uncompressed tar in order, refusing what `tarfile` forgives.

    Raises:
        UserError: compression, truncation (in a header or in data), a damaged header, a missing end marker, or data
            after it; `name` and the offset are in the message.
    """
    length = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    head = stream.read(6)
    for magic, kind in _COMPRESSED.items():
        if head.startswith(magic):
            raise UserError(f"{name}: compressed with {kind}; decompress it, samples are addressed in a plain tar")
    stream.seek(0)
    offset = 0
    try:
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # it keeps all it has seen: gigabytes on a large tar
                if member.offset_data + member.size > length:
                    where = f"member {member.name} (data at offset {member.offset_data})"
                    raise UserError(f"{name}: truncated inside {where}")
                yield member
                offset = tar.offset
    except tarfile.TarError as error:
        raise UserError(f"{name}: no readable tar header at offset {offset} ({error})") from error
    stream.seek(tar.offset)
    end = stream.read(_END_MARKER)
    if any(end):
        what = "truncated in a header" if len(end) < tarfile.BLOCKSIZE else "damaged header"
        raise UserError(f"{name}: {what} at offset {tar.offset}")
    if len(end) < _END_MARKER:
        raise UserError(f"{name}: no end marker at offset {tar.offset}; the shard was cut between two members")
    while chunk := stream.read(1 << 20):
        if any(chunk):
            raise UserError(f"{name}: data after the end marker at offset {tar.offset}; readers would lose it")


def scan_shard(path: Path, name: str | None = None) -> ShardScan:
    """Read one shard strictly. `name` is what it will be called, where that differs from `path`.

    Raises:
        UserError: what `walk_tar` refuses; a key that occurs twice; a sample without a picture or without a class; a
            member that is no plain file or has no extension. The message names the shard and the member.
    """
    name = name or path.name
    rows: dict[str, list[Any]] = {column: [] for column in COLUMNS}
    seen: set[str] = set()
    with _open_shard(path) as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        for key, fields in _samples(stream, name):
            if key in seen:
                raise UserError(f"{name}: key {key} occurs twice (second at offset {_first_offset(fields)})")
            seen.add(key)
            row = _row(key, fields, name)
            for column, values in rows.items():
                values.append(row[column])
        length = stream.seek(0, os.SEEK_END)
    columns = {column: np.array(values, dtype=COLUMNS[column]) for column, values in rows.items()}
    return ShardScan(Shard(name, length, sha256, len(seen)), columns)


def _open_shard(path: Path) -> BufferedReader:
    try:
        return open(path, "rb")
    except OSError as error:
        raise UserError(f"{path}: cannot open the shard ({error.strerror})") from error


_Fields = dict[str, tuple[int, bytes]]  # extension -> (offset of the data, the data)


def _first_offset(fields: _Fields) -> int:
    return min(offset for offset, _ in fields.values())


def _samples(stream: BufferedReader, name: str) -> Iterator[tuple[str, _Fields]]:
    """Neighbouring members that share a key are one sample, as webdataset has it."""
    current, fields = "", _Fields()
    for member in walk_tar(stream, name):
        if member.isdir():
            continue
        match = _MEMBER_NAME.match(member.name)
        if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse() or match is None:
            where = f"{name}: member {member.name} at offset {member.offset}"
            raise UserError(f"{where} is no plain file named KEY.EXTENSION")
        key, extension = match[1], match[2].lower()
        if key != current:
            if fields:
                yield current, fields
            current, fields = key, {}
        if extension in fields:
            raise UserError(f"{name}: member {member.name} occurs twice (second at offset {member.offset})")
        stream.seek(member.offset_data)
        fields[extension] = (member.offset_data, stream.read(member.size))
    if fields:
        yield current, fields


def _row(key: str, fields: _Fields, name: str) -> dict[str, Any]:
    where = f"{name}: sample {key} at offset {_first_offset(fields)}"
    pictures = [extension for extension in fields if extension in _IMAGE_EXTENSIONS]
    if len(pictures) != 1:
        raise UserError(f"{where} has {len(pictures)} pictures; exactly one .jpg, .jpeg or .png is right")
    if "cls" not in fields:
        raise UserError(f"{where} has no .cls member")
    text = fields["cls"][1].decode("ascii", "replace").strip()
    if not re.fullmatch(r"\d{1,9}", text):
        raise UserError(f"{where}: its .cls holds {text[:40]!r}; a class index is right")
    offset, data = fields[pictures[0]]
    return {
        "key": key.encode("utf-8", "surrogateescape"),
        "label": int(text),
        "offset": offset,
        "size": len(data),
        "crc32": zlib.crc32(data),
        "ext": pictures[0].encode(),
    }
