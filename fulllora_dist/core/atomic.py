"""Files that appear whole or not at all."""

import glob
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

STALE_SECONDS = 600.0
"""Without a write, after which a temporary file belongs to a process that was killed."""


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A file to write that appears as `path` only once it is whole and on disk (temporary name, fsync, rename).

    Several may write it at once: the last that ends stays. What killed processes left is removed.
    """
    for stale in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with suppress(FileNotFoundError):
            if time.time() - stale.stat().st_mtime > STALE_SECONDS:
                stale.unlink()
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
