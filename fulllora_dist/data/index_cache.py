"""Remote indexes, fetched once for all processes of a machine."""

import fcntl
import hashlib
import os
from pathlib import Path

from fulllora_dist.core.atomic import atomic_write
from fulllora_dist.core.errors import UserError
from fulllora_dist.data.index_file import DamagedIndex, is_whole
from fulllora_dist.storage import store, urls

_TRIES = 3  # of a download whose checksum is wrong; then the index itself is damaged


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/fulllora_dist, or ~/.cache/fulllora_dist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "fulllora_dist")


def fetched(url: str, again: bool = False) -> Path:
    """The local copy of the index at `url`; its name holds url, size and etag, so that a new index is a new file.

    The first process of a machine fetches it, the others wait for it; one that is killed meanwhile leaves no lock.

    Args:
        again: even where there is a copy, as it is damaged.

    Raises:
        UserError: the index cannot be read, is damaged (`DamagedIndex`), or cannot be kept.
    """
    remote = store.info(url)
    name = hashlib.sha256(f"{url}\0{remote.bytes}\0{remote.etag}".encode()).hexdigest()
    folder = cache_folder() / "indexes"
    path = folder / f"{name}.safetensors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if again or remote.etag is None or not path.exists():
                data = _downloaded(url)
                with atomic_write(path) as file:
                    file.write(data)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot write the index there ({error.strerror or error}); set XDG_CACHE_HOME"
        ) from error
    return path


def _downloaded(url: str) -> bytes:
    for _ in range(_TRIES):
        if is_whole(data := store.read(url)):
            return data
    raise DamagedIndex(
        f"{urls.redacted(url)}: the index is damaged or of another format; rebuild it with tools/index_shards.py"
    )
