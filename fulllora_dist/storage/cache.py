"""A local folder that keeps what was read from a store, up to a size, for all processes of a machine.

A file is whole or not there (temporary name, rename). Nobody relies on more: the reader checks the crc32 of every
sample on a hit too, and drops a file that does not match. So nothing needs fsync, and a process may be killed anywhere.
"""

import fcntl
import hashlib
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fulllora_dist.core.atomic import STALE_SECONDS
from fulllora_dist.core.errors import UserError

_KEEP = 0.9  # share of the cap that stays filled after making room, so that it is not made for every file


class RangeCache:
    """Bytes by name. The least recently used go first when `cap` bytes are reached.

    Raises:
        UserError: the folder cannot be created.
    """

    def __init__(self, folder: str | Path, cap: int):
        self._folder, self._cap = Path(folder), cap
        self._files = self._folder / "ranges"
        self._mine = threading.Lock()
        try:
            self._files.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise UserError(f"data.cache_dir: {folder} cannot be used ({error.strerror})") from error

    def get(self, name: str) -> bytes | None:
        """What was kept, unchecked; None where nothing was."""
        path = self._path(name)
        try:
            data = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        return data

    def put(self, name: str, data: bytes) -> None:
        """Keep `data`, unless it is larger than the whole cache. A disk that is full or read-only costs the cache, not
        the run."""
        if len(data) > self._cap:
            return
        path = self._path(name)
        temporary = ""
        try:
            path.parent.mkdir(exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as file:
                temporary = file.name
                file.write(data)
            with self._locked():
                if path.exists():
                    os.unlink(temporary)
                    return
                size = self._size()
                if size + len(data) > self._cap:
                    size = self._make_room(len(data))
                os.replace(temporary, path)
                self._set_size(size + len(data))
        except OSError:
            with suppress(OSError):
                os.unlink(temporary)

    def drop(self, name: str) -> None:
        """Delete a damaged file."""
        with self._locked(), suppress(OSError):
            path = self._path(name)
            length = path.stat().st_size
            path.unlink()
            self._set_size(self._size() - length)

    def _path(self, name: str) -> Path:
        digest = hashlib.sha256(name.encode()).hexdigest()
        return self._files / digest[:2] / digest

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self._mine:  # flock keeps processes apart, not the threads that share a descriptor
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(self._lock, fcntl.LOCK_UN)

    def _size(self) -> int:
        """The counted size; measured where the count is missing. A count that a killed process left a little wrong is
        corrected when room is made."""
        text = os.pread(self._lock, 32, 0)
        return int(text) if text.strip().isdigit() else sum(entry[1] for entry in self._entries())

    def _set_size(self, size: int) -> None:
        os.pwrite(self._lock, b"%20d" % max(0, size), 0)

    def _entries(self) -> Iterator[tuple[float, int, str]]:
        """(last use, bytes, path) of each file; leftovers of killed processes are removed."""
        for folder in list(os.scandir(self._files)):
            for entry in list(os.scandir(folder)):
                with suppress(FileNotFoundError):
                    metadata = entry.stat()
                    if entry.name.startswith("."):
                        if time.time() - metadata.st_mtime > STALE_SECONDS:
                            os.unlink(entry)
                        continue
                    yield metadata.st_mtime, metadata.st_size, entry.path

    def _make_room(self, needed: int) -> int:
        """Remove the oldest; the bytes that remain."""
        entries = sorted(self._entries())
        size = sum(length for _, length, _ in entries)
        for _, length, path in entries:
            if size + needed <= self._cap * _KEEP:
                break
            with suppress(FileNotFoundError):
                os.unlink(path)
            size -= length
        return size
