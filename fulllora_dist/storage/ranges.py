"""Byte ranges of objects, several in flight, checked, and retried while the store fails.

No client does this alone: fsspec's http retries nothing, and every client takes a short or altered body for the truth.
"""

import asyncio
import itertools
import logging
import random
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, NamedTuple, Self
from weakref import WeakValueDictionary

import fsspec.asyn

from fulllora_dist.core.errors import UserError
from fulllora_dist.core.messages import redacted
from fulllora_dist.storage import urls
from fulllora_dist.storage.cache import RangeCache

_FIRST_WAIT, _LONGEST_WAIT = 0.2, 20.0  # seconds between tries, doubled each time
_REREADS = 3  # of bytes whose crc32 differs; then the object itself is damaged
_LOUD_AFTER = 10.0  # seconds without success until a warning
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReadPolicy:
    """How remote shards are read.

    Attributes:
        connections: ranges in flight of each process.
        read_ahead: bytes that a rank asks for before it needs them, beyond the windows of samples in use; divided
            equally among its workers, so that their number changes neither this nor what a restart reads again.
        request_timeout_s: until an unanswered request is given up and made again.
        retry_timeout_s: until a range that does not succeed ends the run.
        cache: local folder that keeps what was read; None keeps nothing.
        cache_gb: its largest size, 10**9 bytes.
    """

    connections: int = 4
    read_ahead: int = 64_000_000
    request_timeout_s: float = 60.0
    retry_timeout_s: float = 600.0
    cache: str | None = None
    cache_gb: float = 100.0


class Range(NamedTuple):
    """Bytes [start, end) of the object at `url`, whose content must still be `etag` (None: unknown)."""

    url: str
    etag: str | None
    start: int
    end: int

    def identity(self) -> str:
        """What a cache knows it by."""
        return "\0".join(map(str, self))

    def __str__(self) -> str:
        return f"{redacted(self.url)}, bytes {self.start} to {self.end}"


class Piece(NamedTuple):
    """Bytes inside a range, `start` counted from its beginning, with the checksum that they must have.

    One that is not wanted is checked along, as a cache keeps the range for those who want it.
    """

    start: int
    size: int
    crc32: int
    wanted: bool = True


class ChangedObject(UserError):
    """The object is no longer the one that was indexed."""

    @classmethod
    def of(cls, url: str, how: str) -> Self:  # not __init__: workers send it, and unpickling calls that with the line
        return cls(
            f"{redacted(url)}: has changed since it was indexed ({how}); restore it, or index the shards again "
            "and start a new run"
        )


class RangeFetcher:
    """Fetches ranges in the background, in the order in which they were asked for."""

    def __init__(self, policy: ReadPolicy):
        self._policy = policy
        self._cache = RangeCache(policy.cache, int(policy.cache_gb * 10**9)) if policy.cache else None
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._places = asyncio.Semaphore(policy.connections)
        self._sessions, self._renewal = 0, asyncio.Lock()
        self._etags: dict[str, str] = {}  # of stores whose etags are not in the index: as first seen
        self._random = random.Random()  # jitter of the waits, nothing that a run depends on

    def submit(self, wanted: Range, pieces: Sequence[Piece]) -> Future[list[bytes | None]]:
        """The pieces of a range; None for one that is not wanted, or whose checksum is still wrong after several reads
        of an unchanged object.

        The future raises UserError where the object is missing, may not be read or has changed, or where the store has
        not delivered within `retry_timeout_s`.
        """
        filesystem = urls.filesystem(wanted.url)
        return asyncio.run_coroutine_threadsafe(self._wanted(filesystem, wanted, pieces), fsspec.asyn.get_loop())

    async def _wanted(self, filesystem: Any, wanted: Range, pieces: Sequence[Piece]) -> list[bytes | None]:
        contents = await self._pieces(filesystem, wanted, pieces)
        return [data if piece.wanted else None for data, piece in zip(contents, pieces, strict=True)]

    async def _pieces(self, filesystem: Any, wanted: Range, pieces: Sequence[Piece]) -> list[bytes | None]:
        if self._cache is None:
            return (await self._read(filesystem, wanted, pieces))[1]
        name = wanted.identity()
        async with self._turns.setdefault(name, asyncio.Lock()):  # who wants the same range meanwhile finds it kept
            kept = await asyncio.to_thread(self._cache.get, name)
            if kept is not None:
                contents = _cut(kept, pieces)
                if len(kept) == wanted.end - wanted.start and None not in contents:
                    return contents
                _logger.warning("%s: the cached copy is damaged; reading it again", wanted)
                await asyncio.to_thread(self._cache.drop, name)
            data, contents = await self._read(filesystem, wanted, pieces)
            if None not in contents:
                await asyncio.to_thread(self._cache.put, name, data)
            return contents

    async def _read(self, filesystem: Any, wanted: Range, pieces: Sequence[Piece]) -> tuple[bytes, list[bytes | None]]:
        for reread in itertools.count():
            data = await self._fetch(filesystem, wanted)
            contents = _cut(data, pieces)
            if None not in contents or reread == _REREADS:
                return data, contents
            _logger.warning("%s: the bytes received differ from the index; reading them again", wanted)
            await asyncio.sleep(_FIRST_WAIT * 2**reread)
        raise AssertionError

    async def _fetch(self, filesystem: Any, wanted: Range) -> bytes:
        begun, wait, warned = 0.0, _FIRST_WAIT, False
        failure: Exception | None = None
        session = 0
        while True:
            try:
                async with self._places:
                    begun = begun or time.monotonic()  # waiting for a place is not a failure of the store
                    if isinstance(failure, urls.NoCredentials):
                        await self._renew(filesystem, session)
                    session = self._sessions
                    return await asyncio.wait_for(self._once(filesystem, wanted), self._policy.request_timeout_s)
            except Exception as error:
                failure = urls.classify_error(error, wanted.url)
                if isinstance(failure, UserError):
                    raise failure from error
                passed, limit = time.monotonic() - begun, self._policy.retry_timeout_s
                if passed + wait > limit:
                    raise UserError(
                        f"{failure}; gave up after {passed:.0f} s (data.retry_timeout_s={limit:g}): check the store "
                        "and the network"
                    ) from error
                if passed > _LOUD_AFTER and not warned:
                    _logger.warning("%s; retrying for %g s", failure, limit)
                    warned = True
            await asyncio.sleep(wait * self._random.uniform(0.5, 1.0))
            wait = min(2 * wait, _LONGEST_WAIT)

    async def _once(self, filesystem: Any, wanted: Range) -> bytes:
        etag = wanted.etag or self._etags.get(wanted.url)
        try:
            data, new_etag = await _get(filesystem, wanted, etag)
        except Exception as error:
            if (status := urls.http_status(error)) in (412, 416):
                raise ChangedObject.of(wanted.url, f"the store answers {status}") from error
            raise
        if etag and new_etag and urls.bare_etag(new_etag) != urls.bare_etag(etag):
            raise ChangedObject.of(wanted.url, f"etag {urls.bare_etag(new_etag)}, was {urls.bare_etag(etag)}")
        if len(data) != wanted.end - wanted.start:
            raise OSError(f"{wanted}: received {len(data)} bytes")
        if new_etag:
            self._etags[wanted.url] = new_etag
        return data

    async def _renew(self, filesystem: Any, session: int) -> None:
        """A new session in place of number `session`, once for all who failed with it: it keeps that it found no
        credentials."""
        async with self._renewal:
            if self._sessions == session:
                await filesystem.set_session(refresh=True)
                self._sessions += 1


def _cut(data: bytes, pieces: Sequence[Piece]) -> list[bytes | None]:
    cut = [data[piece.start : piece.start + piece.size] for piece in pieces]
    return [part if zlib.crc32(part) == piece.crc32 else None for part, piece in zip(cut, pieces, strict=True)]


async def _get(filesystem: Any, wanted: Range, etag: str | None) -> tuple[bytes, str | None]:
    """(body, etag that came with it). The store compares etags where it can: a weak one never matches If-Match."""
    span = f"bytes={wanted.start}-{wanted.end - 1}"
    match = f'"{urls.bare_etag(etag)}"' if etag and not etag.startswith("W/") else None
    scheme = urls.scheme_of(wanted.url)
    if scheme == "s3":
        bucket, key, version = filesystem.split_path(wanted.url)
        more = {"IfMatch": match} if match else {}
        if version:
            more["VersionId"] = version
        answer = await filesystem._call_s3("get_object", Bucket=bucket, Key=key, Range=span, **more)
        async with answer["Body"] as body:
            return await body.read(), answer.get("ETag")
    if scheme in ("http", "https"):
        options = dict(filesystem.kwargs)
        # a server that compresses would send other lengths than those of the range
        headers = {**options.pop("headers", {}), "Range": span, "Accept-Encoding": "identity"}
        if match:
            headers["If-Match"] = match
        session = await filesystem.set_session()
        async with session.get(filesystem.encode_url(wanted.url), headers=headers, **options) as answer:
            answer.raise_for_status()
            if answer.status != 206:
                raise UserError(f"{redacted(wanted.url)}: no support for byte ranges; use a server that has it")
            return await answer.read(), answer.headers.get("ETag")
    data = await filesystem._cat_file(wanted.url, start=wanted.start, end=wanted.end)
    return data, (await filesystem._info(wanted.url)).get("etag")
