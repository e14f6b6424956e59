"""The members of an uncompressed tar, in one pass over a stream, refusing what `tarfile` forgives.

A tar reader that stops at the first odd header loses samples without a word (a shard cut at a header yields what came
before it). Here everything is refused that is not a complete tar: compression, truncation anywhere, damaged headers,
a missing end marker, data after it, sizes that point backwards or beyond the end.
"""

import tarfile
from collections.abc import Iterator
from typing import Protocol

from fulllora_dist.core.errors import UserError

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_END_MARKER = 2 * tarfile.BLOCKSIZE
_MAX_HEADER = 1 << 20  # bytes of one long name or pax header; tarfile holds them in memory whole
_CHUNK = 1 << 20


class Readable(Protocol):
    """A stream of bytes; `read` gives fewer than asked only at its end. Where it has a `seek`, data that nobody asks
    for is skipped and not read."""

    def read(self, size: int, /) -> bytes: ...


class _Forward:
    """What `tarfile` needs of a file, over a stream that only goes forward."""

    def __init__(self, stream: Readable, name: str):
        self._stream = stream
        self._name = name
        self._position = 0
        self.last = b""  # what was read last: a header that tarfile would rather not have seen

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> int:
        if position < self._position:
            raise UserError(
                f"{self._name}: damaged header: a member ends at {position}, before offset {self._position}"
            )
        if position > self._position and hasattr(self._stream, "seek"):
            self._position = self._stream.seek(position)
        while self._position < position and self.read(min(_CHUNK, position - self._position)):
            pass
        return self._position

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MAX_HEADER:
            raise UserError(
                f"{self._name}: header of {size} bytes at offset {self._position} exceeds the limit of {_MAX_HEADER}"
            )
        self.last = self._stream.read(size)
        self._position += len(self.last)
        return self.last


class Member:
    """One member, whose data can be read until the next one is asked for. Offsets and sizes in bytes."""

    def __init__(self, info: tarfile.TarInfo, forward: _Forward):
        self.name, self.offset, self.offset_data, self.size = info.name, info.offset, info.offset_data, info.size
        self.is_folder = info.isdir()
        self.is_file = info.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not info.issparse()
        self._forward = forward

    def chunks(self) -> Iterator[bytes]:
        """Its data, at most 1 MiB at a time; ends early where the tar does."""
        end = self.offset_data + self.size
        while (remaining := end - self._forward.tell()) > 0:
            if not (data := self._forward.read(min(_CHUNK, remaining))):
                return
            yield data


def walk_tar(stream: Readable, name: str, length: int | None = None) -> Iterator[Member]:
    """The members in order. The stream has been read to its end afterwards.

    Args:
        name: of the tar, for messages.
        length: of the tar in bytes where that is known: a member beyond it is refused before it is read.

    Raises:
        UserError: the tar is not complete, plain and consistent; `name` and the offset are in the message.
    """
    forward = _Forward(stream, name)
    offset = 0
    try:
        with tarfile.open(fileobj=forward, mode="r:") as tar:  # type: ignore[call-overload]
            while (info := tar.next()) is not None:
                tar.members = []  # it keeps all it has seen: gigabytes on a large tar
                member = f"{name}: member {info.name!r} at offset {info.offset}"
                padded = -(-info.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                if info.size < 0:
                    raise UserError(f"{member} has a size of {info.size} bytes")
                if info.isreg() and not info.issparse() and tar.offset != info.offset_data + padded:
                    raise UserError(f"{member} has two different sizes in its headers")
                if info.isreg() and length is not None and info.offset_data + info.size > length:
                    raise UserError(f"{member} is truncated: its data ends beyond the {length} bytes of the shard")
                yield Member(info, forward)
                offset = tar.offset
    except (UserError, OSError):
        raise
    except Exception as error:  # on hostile headers tarfile raises nearly anything, RecursionError included
        for magic, kind in _COMPRESSED.items():
            if offset == 0 and forward.last.startswith(magic):
                raise UserError(
                    f"{name}: compressed with {kind}; samples are addressed in a plain tar: decompress it"
                ) from error
        raise UserError(f"{name}: truncated or damaged at offset {offset} ({error})") from error
    _check_end(forward, tar.offset, name)


def _check_end(forward: _Forward, offset: int, name: str) -> None:
    """What stands at `offset`, where tarfile saw no further member, must be the end marker and nothing but padding."""
    end = forward.last
    if forward.tell() == offset:
        raise UserError(f"{name}: no end marker at offset {offset}: the shard was cut between two members")
    if any(end):
        what = "truncated in a header" if len(end) < tarfile.BLOCKSIZE else "damaged header"
        raise UserError(f"{name}: {what} at offset {offset}")
    if len(end) + len(forward.read(_END_MARKER - len(end))) < _END_MARKER:
        raise UserError(f"{name}: the end marker at offset {offset} is cut")
    if any(forward.last):
        raise UserError(f"{name}: data after half an end marker at offset {offset}")
    while chunk := forward.read(_CHUNK):
        if any(chunk):
            raise UserError(f"{name}: data after the end marker at offset {offset}; readers would lose it")
