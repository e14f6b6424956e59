"""Remote indexes, fetched once for all processes of a machine."""

from pathlib import Path

from fulllora_dist.core.errors import UserError
from fulllora_dist.core.messages import redacted
from fulllora_dist.data.index_file import DamagedIndex, is_whole
from fulllora_dist.storage import store
from fulllora_dist.storage.machine_copy import cache_folder, machine_copy

_TRIES = 3  # of a download whose checksum is wrong; then the index itself is damaged


def fetched(url: str, again: bool = False) -> Path:
    """The local copy of the index at `url`.

    Args:
        again: even where there is a copy, as it is damaged.

    Raises:
        UserError: the index cannot be read, is damaged (`DamagedIndex`), or cannot be kept.
    """
    try:
        return machine_copy(url, "indexes", ".safetensors", _downloaded, again)
    except OSError as error:
        raise UserError(
            f"{cache_folder() / 'indexes'}: cannot write the index there ({error.strerror or error}); "
            "set XDG_CACHE_HOME"
        ) from error


def _downloaded(url: str) -> bytes:
    for _ in range(_TRIES):
        if is_whole(data := store.read(url)):
            return data
    raise DamagedIndex(f"{redacted(url)}: the index is damaged or of another format; rebuild it with fulllora index")
