"""Copies of remote files on this machine's disk, fetched once for all its processes."""

import errno
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fulllora_dist.core.atomic import atomic_write
from fulllora_dist.storage import store

_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # of a file system that has none


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/fulllora_dist, or ~/.cache/fulllora_dist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "fulllora_dist")


def machine_copy(
    url: str, kind: str, suffix: str, download: Callable[[str], bytes] = store.read, again: bool = False
) -> Path:
    """The local copy of the file at `url`; its name holds url, size and etag, so that a new file has a new copy.

    The first process of a machine fetches it, the others wait for it; one that is killed meanwhile leaves no lock.

    Args:
        kind: folder in `cache_folder` that holds it.
        download: reads the file, and sees that it is whole.
        again: even where there is a copy, as it is damaged.

    Raises:
        UserError: the file cannot be read.
        OSError: the copy cannot be written.
    """
    remote = store.info(url)
    name = hashlib.sha256(f"{url}\0{remote.bytes}\0{remote.etag}".encode()).hexdigest()
    folder = cache_folder() / kind
    path = folder / f"{name}{suffix}"
    folder.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(folder / f"{name}.lock"):
        if again or remote.etag is None or not path.exists():
            data = download(url)
            with atomic_write(path) as file:
                file.write(data)
    return path


@contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, in the machine's temporary folder if the file system of `path` has no locks."""
    with open(path, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            name = hashlib.sha256(str(path).encode()).hexdigest()
            with open(Path(tempfile.gettempdir(), f"fulllora_dist-{os.getuid()}-{name}.lock"), "w") as own:
                fcntl.flock(own, fcntl.LOCK_EX)
                yield
            return
        yield
