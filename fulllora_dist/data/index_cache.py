"""Remote indexes, fetched once for all processes of a machine."""

import fcntl
import hashlib
import os
from pathlib import Path

from fulllora_dist.data import store
from fulllora_dist.data.index_file import published
from fulllora_dist.errors import UserError


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/fulllora_dist, or ~/.cache/fulllora_dist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "fulllora_dist")


def fetched(url: str) -> Path:
    """The local copy of the index at `url`; its name holds url, size and etag, so that a new index is a new file.

    The first process of a machine fetches it, the others wait for it; one that is killed meanwhile leaves no lock.
    """
    found = store.info(url)
    name = hashlib.sha256(f"{url}\0{found.bytes}\0{found.etag}".encode()).hexdigest()
    folder = cache_folder() / "indexes"
    path = folder / f"{name}.safetensors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if found.etag is None or not path.exists():
                with published(path) as file:
                    file.write(store.read(url))
    except OSError as error:
        raise UserError(
            f"{folder}: cannot keep the index there ({error.strerror or error}); set XDG_CACHE_HOME"
        ) from error
    return path
