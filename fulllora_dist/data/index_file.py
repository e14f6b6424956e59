"""A file of columns that many processes map and none copies.

The layout is that of safetensors (8 bytes little-endian length of the header, a JSON header, the arrays), so anything
that reads safetensors reads it. Two things are ours: the arrays are mapped and not copied, and the last array,
`sha256`, is the digest of every byte before it, so that a cut or flipped bit anywhere is refused.
"""

import hashlib
import json
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fulllora_dist.core.errors import UserError

_DTYPES = {"I64": "<i8", "I32": "<i4", "U32": "<u4", "U8": "|u1"}
_NAMES = {np.dtype(numpys): name for name, numpys in _DTYPES.items()}
_CHECKSUM = "sha256"
_CHECKSUM_BYTES = 32


class DamagedIndex(UserError):
    """The file cannot be mapped, or its bytes are not those that its checksum belongs to."""


def pack_columns(meta: Mapping[str, Any], columns: Mapping[str, np.ndarray]) -> bytes:
    """The bytes of the file. The same content always gives the same bytes.

    Args:
        meta: what JSON holds.
        columns: one-dimensional arrays of int64, int32, uint32 or uint8.
    """
    arrays = {name: np.ascontiguousarray(column) for name, column in columns.items()}
    order = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))  # widest first: all are aligned
    header: dict[str, Any] = {"__metadata__": {"index": json.dumps(meta, sort_keys=True)}}
    end = 0
    for name in order:
        start, end = end, end + arrays[name].nbytes
        header[name] = {
            "dtype": _NAMES[arrays[name].dtype],
            "shape": list(arrays[name].shape),
            "data_offsets": [start, end],
        }
    header[_CHECKSUM] = {"dtype": "U8", "shape": [_CHECKSUM_BYTES], "data_offsets": [end, end + _CHECKSUM_BYTES]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = b"".join([struct.pack("<Q", len(text)), text, *(arrays[name].tobytes() for name in order)])
    return data + hashlib.sha256(data).digest()


def is_whole(data: bytes | mmap.mmap) -> bool:
    """Whether its checksum is that of the bytes before it."""
    body = memoryview(data)[: max(0, len(data) - _CHECKSUM_BYTES)]
    return hashlib.sha256(body).digest() == data[len(body) :]


def map_columns(path: Path, checksum: bytes | None = None) -> tuple[dict[str, Any], dict[str, np.ndarray], bytes]:
    """(meta, read-only arrays over the mapped file, checksum).

    Args:
        checksum: where another process has already read and checked the file; it is only compared then.

    Raises:
        UserError: the file is damaged (`DamagedIndex`), or is not the one that `checksum` belongs to.
    """
    try:
        with open(path, "rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: an empty file
        raise DamagedIndex(f"{path}: the index cannot be opened ({error})") from error
    file_checksum = data[-_CHECKSUM_BYTES:]
    if checksum is None:
        if not is_whole(data):
            raise DamagedIndex(f"{path}: the index is damaged or of another format; rebuild it with fulllora index")
    elif file_checksum != checksum:
        raise UserError(f"{path}: the index has changed while the run was reading it")
    try:
        return *_parse(data), file_checksum
    except Exception as error:  # a header of another program, or of an attacker, may hold any JSON
        raise UserError(f"{path}: not an index of this program; make one with fulllora index") from error


def _parse(data: mmap.mmap) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    meta = json.loads(header.pop("__metadata__")["index"])
    if not isinstance(meta, dict):
        raise TypeError("the metadata is not an object")
    del header[_CHECKSUM]
    columns = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        dtype = np.dtype(_DTYPES[entry["dtype"]])
        columns[name] = np.frombuffer(data, dtype, (end - start) // dtype.itemsize, 8 + length + start)
    return meta, columns
