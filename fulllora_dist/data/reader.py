"""The bytes of one sample out of a local shard, checked."""

import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fulllora_dist.data.index import Sample, Shard
from fulllora_dist.errors import UserError

_MAX_OPEN = 64  # of each process; a large data set has more shards than a process may have open files


class DamagedSample(UserError):
    """The bytes or the picture of one sample are not what they were; the message names shard, key and offset."""


class ShardReader:
    """Reads samples of the shards in `folder`. Files are opened when first needed, in each process for itself."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._files: dict[str, int] = {}

    def check(self, shards: Iterable[Shard]) -> None:
        """Refuse, before anything starts, a shard that is missing or has not the length it was indexed with."""
        for shard in shards:
            length = os.fstat(self._open(shard.name)).st_size
            if length != shard.bytes:
                raise UserError(
                    f"{self._folder / shard.name}: {length} bytes where the index has {shard.bytes}; "
                    "copy the shard again or make the index anew"
                )

    def read(self, sample: Sample) -> bytes:
        """The picture's bytes.

        Raises:
            UserError: the shard cannot be opened.
            DamagedSample: length or crc32 differ from the index.
        """
        data = os.pread(self._open(sample.shard), sample.size, sample.offset)
        if len(data) != sample.size:
            raise DamagedSample(f"{sample}: got {len(data)} of {sample.size} bytes; the shard is truncated")
        if zlib.crc32(data) != sample.crc32:
            raise DamagedSample(f"{sample}: crc32 differs from the index; the shard is damaged")
        return data

    def _open(self, shard: str) -> int:
        if shard not in self._files:
            if len(self._files) >= _MAX_OPEN:
                os.close(self._files.pop(next(iter(self._files))))
            try:
                self._files[shard] = os.open(self._folder / shard, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise UserError(f"{self._folder / shard}: cannot open the shard ({error.strerror})") from error
        return self._files[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {"_folder": self._folder, "_files": {}}  # descriptors mean nothing in another process

    def __del__(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
