"""Folders of a few small files, such as adapters, on any path or URL that fsspec knows."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from fulllora_dist.core.atomic import atomic_write
from fulllora_dist.core.errors import UserError
from fulllora_dist.core.messages import one_line, redacted
from fulllora_dist.storage.urls import classify_error, refuse_credentials

_OBJECT_STORES = {"s3", "gs", "abfs", "oss", "oci"}


def read_files(folder: str | os.PathLike[str], names: Sequence[str], whose: str, remedy: str) -> list[bytes]:
    """Read files of a folder.

    Args:
        whose: what the folder is given to, for messages.
        remedy: what to give instead where a file is missing.

    Raises:
        UserError: no path or URL, one with user:password@; a file that is missing or cannot be read.
    """
    fs, path = _opened(folder, whose)
    shown = redacted(folder)
    contents = []
    for name in names:
        try:
            contents.append(fs.cat_file(f"{path}/{name}"))
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{whose}: {shown} has no {name}; {remedy}") from None
        except Exception as error:  # each store has its own exceptions
            raise UserError(f"{whose}: {classify_error(error, f'{shown}/{name}')}") from None
    return contents


def write_files(folder: str | os.PathLike[str], files: Mapping[str, bytes], whose: str) -> None:
    """Write small files in this order into a folder, which is made where there is none. Each is whole or as it was.

    Raises:
        UserError: no path or URL, one with user:password@; they cannot be written.
    """
    fs, path = _opened(folder, whose)
    try:
        if _has_folders(fs):
            fs.makedirs(path, exist_ok=True)
        for name, content in files.items():
            if isinstance(fs, LocalFileSystem):  # an object is written at once anyway
                with atomic_write(Path(path, name)) as file:
                    file.write(content)
            else:
                fs.pipe_file(f"{path}/{name}", content)
    except Exception as error:  # each store has its own exceptions
        reason = getattr(error, "strerror", None) or one_line(error)
        raise UserError(f"{whose}: {redacted(folder)}: cannot be written ({reason})") from error


def _has_folders(fs: Any) -> bool:
    """Not an object store, whose client would take a bucket that is not there, or that it may not look at, for a folder
    to make."""
    return _OBJECT_STORES.isdisjoint([fs.protocol] if isinstance(fs.protocol, str) else fs.protocol)


def _opened(folder: str | os.PathLike[str], whose: str) -> tuple[Any, str]:
    """The filesystem of any path or URL that fsspec knows, hf:// among them, and the path there.

    Args:
        whose: what the folder is given to, for messages.

    Raises:
        UserError: it is no path or URL, or holds user:password@.
    """
    if not isinstance(folder, str | os.PathLike) or not os.fspath(folder):
        raise UserError(f"{whose}: must be a folder or URL, got {folder!r}")
    refuse_credentials(os.fspath(folder))
    try:
        return fsspec.core.url_to_fs(os.fspath(folder))
    except (ValueError, ImportError) as error:
        raise UserError(f"{whose}: {redacted(folder)}: {one_line(error)}") from None
