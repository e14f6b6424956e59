"""Whole files and objects: read, written, listed, streamed. Training reads shards by `ranges` instead.

Everything is retried for some minutes where the store does not answer. An upload appears whole or not at all: a
local file by rename, an object because a PUT and the completion of a multipart upload are atomic.
"""

import logging
import os
import random
import re
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Self, TypeVar

from braceexpand import braceexpand

from fulllora_dist.core.atomic import atomic_write
from fulllora_dist.core.errors import UserError
from fulllora_dist.core.messages import redacted
from fulllora_dist.storage import urls
from fulllora_dist.storage.urls import ObjectInfo

PATIENCE_SECONDS = 300.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0
_RANGE = 8 << 20
_AHEAD = 3

T = TypeVar("T")
_hurry = threading.Event()
_logger = logging.getLogger(__name__)


def stop_retrying() -> None:
    """This process ends soon, or only estimates: from now on nothing is retried, in other threads too."""
    _hurry.set()


def persistent(call: Callable[[], T], url: str) -> T:
    """`call()`, again and again with growing pauses while the store fails in a way that may pass.

    Raises:
        UserError: what cannot pass, at once; what did not pass within PATIENCE_SECONDS.
    """
    deadline, pause = time.monotonic() + PATIENCE_SECONDS, _FIRST_PAUSE
    failure: Exception | None = None
    while True:
        try:
            if isinstance(failure, urls.NoCredentials):
                urls.filesystem(url).connect(refresh=True)  # a session keeps that it found none
            return call()
        except Exception as error:
            failure = urls.classify_error(error, url)
            if isinstance(failure, UserError):
                raise failure from error
            if _hurry.is_set() or time.monotonic() + pause > deadline:
                tried = PATIENCE_SECONDS - max(0.0, deadline - time.monotonic())
                raise UserError(f"{failure} (tried for {tried:.0f} s)") from error
            if pause == _FIRST_PAUSE:
                _logger.warning("%s; retrying for %.0f s", failure, PATIENCE_SECONDS)
        _hurry.wait(pause * random.uniform(0.5, 1.0))  # all ranks began to wait at once
        pause = min(2 * pause, _LONGEST_PAUSE)


def info(url: str) -> ObjectInfo:
    """Length and etag of a local file or an object. UserError where it is missing."""
    return persistent(lambda: urls.object_info(url), url)


def exists(url: str) -> bool:
    """Whether there is a file or an object."""
    if not urls.is_remote(url):
        return os.path.isfile(urls.local_path(url))

    def once() -> bool:  # not isfile(), for which everything that goes wrong is a file that is not there
        try:
            return bool(urls.filesystem(url).info(url)["type"] == "file")
        except Exception as error:
            if urls.is_missing(error):
                return False
            raise

    return persistent(once, url)


def read(url: str) -> bytes:
    """All bytes of a small file or object."""
    if not urls.is_remote(url):
        try:
            return Path(urls.local_path(url)).read_bytes()
        except OSError as error:
            raise UserError(f"{url}: cannot be read ({error.strerror})") from error

    def once() -> bytes:
        size = urls.object_info(url).bytes
        data: bytes = urls.filesystem(url).cat_file(url)
        if size is not None and len(data) != size:
            raise OSError(f"{redacted(url)}: got {len(data)} of {size} bytes")
        return data

    return persistent(once, url)


def write(url: str, data: bytes) -> None:
    """Write a small file or object, whole or not at all."""
    refuse_read_only(url)
    if urls.is_remote(url):
        persistent(lambda: urls.filesystem(url).pipe_file(url, data), url)
        return
    try:
        with atomic_write(Path(urls.local_path(url))) as file:
            file.write(data)
    except OSError as error:
        raise UserError(f"{url}: cannot be written ({error.strerror})") from error


def upload(path: Path, url: str) -> None:
    """Upload a local file, and see that it arrived in full length."""
    refuse_read_only(url)
    persistent(lambda: urls.filesystem(url).put_file(str(path), url), url)
    uploaded, length = info(url).bytes, path.stat().st_size
    if uploaded != length:
        raise UserError(f"{redacted(url)}: {uploaded} of {length} bytes were uploaded")


def refuse_read_only(url: str) -> None:
    """Raise UserError for a URL that cannot be written to."""
    if urls.scheme_of(url) in ("http", "https"):
        raise UserError(f"{redacted(url)}: http(s) cannot be written to; use a path, s3:// or gs://")


def writable_folder(url: str) -> str:
    """A local path, created where it is missing, or the URL of a folder that can be written to.

    Raises:
        UserError: http, or a path that cannot be created.
    """
    refuse_read_only(url)
    if urls.is_remote(url):
        return url
    path = urls.local_path(url)
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be created ({error.strerror})") from error
    return path


def expand(patterns: Iterable[str]) -> list[str]:
    """Files and objects by name, in the order given: braces ({000..127}, {a,b}) multiply, *, ? and [] and folders list.

    Raises:
        UserError: a pattern that matches nothing; a listing over http, which has none.
    """
    paths: list[str] = []
    for pattern in patterns:
        there = not urls.is_remote(pattern) and os.path.exists(urls.local_path(pattern))
        try:
            names = [pattern] if there else list(braceexpand(pattern))
        except ValueError as error:
            raise UserError(f"{redacted(pattern)}: {error}") from error
        for name in names:
            paths += _listed(name)
    for url, times in Counter(paths).items():
        if times > 1:
            raise UserError(f"{redacted(url)}: named {times} times")
    return paths


def shards_in(folder: str) -> list[str]:
    """The *.tar files of a folder, or the URLs of those in a bucket, by name."""
    if not urls.is_remote(folder):  # whose name may have *, ? and [ in it
        return sorted(str(path) for path in Path(os.path.abspath(urls.local_path(folder))).glob("*.tar"))
    return _matches(f"{folder.rstrip('/')}/*.tar")


def _matches(pattern: str) -> list[str]:
    fs, scheme = urls.filesystem(pattern), urls.scheme_of(pattern)
    paths = sorted(persistent(lambda: fs.glob(pattern), pattern))
    return paths if scheme == "file" else [f"{scheme}://{path}" for path in paths]


def _listed(name: str) -> list[str]:
    scheme = urls.scheme_of(name)
    if scheme in ("http", "https"):
        if "*" in name or name.partition("?")[0].endswith("/"):
            raise UserError(f"{redacted(name)}: http has no listings; name the shards, e.g. with {{000..127}}")
        return [name]
    fs, path = urls.filesystem(name), urls.local_path(name) if scheme == "file" else name
    if re.search(r"[*?\[]", path) and not (scheme == "file" and os.path.exists(path)):
        matches = _matches(path)
    elif (scheme == "file" or not path.endswith(".tar")) and persistent(lambda: fs.isdir(path), name):
        matches, path = shards_in(path), f"{path.rstrip('/')}/*.tar"
    else:
        return [path]
    if not matches:
        raise UserError(f"{redacted(path)}: no shards match")
    return matches


class ObjectStream:
    """An object from its first byte to its last, in ranges of 8 MiB with some in flight, each checked for its length.

    Use as a context manager: leaving it waits for what is in flight.
    """

    def __init__(self, url: str, length: int):
        self._pool = ThreadPoolExecutor(_AHEAD)
        self._chunks = self._in_order(url, length)
        self._current = memoryview(b"")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def read(self, size: int) -> bytes:
        """The next `size` bytes; fewer only at the end."""
        parts: list[memoryview] = []
        while size > 0:
            self._current = self._current or memoryview(next(self._chunks, b""))
            if not self._current:
                break
            parts.append(self._current[:size])
            self._current = self._current[size:]
            size -= len(parts[-1])
        return b"".join(parts)

    def _in_order(self, url: str, length: int) -> Iterator[bytes]:
        ahead: deque[Future[bytes]] = deque()
        for start in range(0, length, _RANGE):
            ahead.append(self._pool.submit(_read_range, url, start, min(start + _RANGE, length)))
            if len(ahead) == _AHEAD:
                yield ahead.popleft().result()
        for future in ahead:
            yield future.result()


def _read_range(url: str, start: int, end: int) -> bytes:
    def once() -> bytes:
        data: bytes = urls.filesystem(url).cat_file(url, start=start, end=end)
        if len(data) > end - start:
            raise UserError(f"{redacted(url)}: the server sent more than the requested range")
        if len(data) < end - start:
            raise OSError(f"{redacted(url)}: got {len(data)} of {end - start} bytes at {start}")
        return data

    return persistent(once, url)
