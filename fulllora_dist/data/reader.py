"""The bytes of samples out of shards, checked: local ones when they are asked for, remote ones ahead of that."""

import itertools
import os
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
from fsspec.utils import merge_offset_ranges

from fulllora_dist.core.errors import UserError
from fulllora_dist.core.messages import redacted
from fulllora_dist.data.index import Index
from fulllora_dist.data.plan import CHUNK
from fulllora_dist.data.position import Work
from fulllora_dist.storage import store, urls
from fulllora_dist.storage.ranges import ChangedObject, Piece, Range, RangeFetcher, ReadPolicy

_MAX_OPEN = 64  # files of each process; a large data set has more shards than a process may have open files
_MAX_GAP = 128 << 10  # bytes between two samples that are cheaper to read than another request
_MAX_RANGE = 8 << 20
_WHOLE = 1 << 62
_CHECKS_AT_ONCE = 16
_LEAST = 125_000  # bytes that a smaller sample counts as when reading ahead: it costs a request all the same


class DamagedSample(UserError):
    """The bytes or the image of one sample are not what they were; the message names shard, key and offset."""


T = TypeVar("T")
Read = Callable[[int], bytes]
Pieces = Future[list[bytes | None]]


class _Block(NamedTuple):
    """A range, the samples in it in order, and which of them are wanted here."""

    range: Range
    ids: np.ndarray
    wanted: list[bool]


class ShardReader:
    """Reads samples of `index`. Files and connections are opened when first needed, in each process for itself."""

    def __init__(self, index: Index, policy: ReadPolicy | None = None):
        self._index = index
        self._policy = policy or ReadPolicy()
        self._urls = [index.shard_url(number) for number in range(len(index.shards))]
        self._remote = np.array([urls.is_remote(url) for url in self._urls])
        self._files: dict[int, int] = {}
        self._fetcher: RangeFetcher | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardReader, (self._index, self._policy)  # descriptors and connections mean nothing in another process

    def __del__(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)

    def check(self, world: int = 1, rank: int = 0) -> None:
        """Refuse, before anything starts, a shard that is missing or not the one that was indexed (by length and etag).
        Remote ones are divided among the ranks; each rank checks the local ones, which may be copies on its node."""
        for number in np.flatnonzero(~self._remote).tolist():
            self._check_length(number, self._on_disk(number, lambda file: os.fstat(file).st_size))
        mine = np.flatnonzero(self._remote)[rank::world].tolist()
        with ThreadPoolExecutor(_CHECKS_AT_ONCE) as pool:
            for number, info in zip(mine, pool.map(lambda n: store.info(self._urls[n]), mine), strict=True):
                if info.bytes is not None:
                    self._check_length(number, info.bytes)
                etag = self._index.shards[number].etag
                if etag and info.etag and urls.bare_etag(info.etag) != urls.bare_etag(etag):
                    raise ChangedObject.of(self._urls[number], f"etag {info.etag}, was {etag}")

    def _check_length(self, number: int, length: int) -> None:
        expected = self._index.shards[number].bytes
        if length != expected:
            raise UserError(
                f"{redacted(self._urls[number])}: {length} bytes where the index has {expected}; "
                "copy the shard again or rebuild the index"
            )

    def read(self, sample_id: int) -> bytes:
        """The image's bytes, now.

        Raises:
            UserError: the shard cannot be opened or read.
            DamagedSample: length or crc32 differ from the index.
        """
        if not self._remote[self._index.columns["shard"][sample_id]]:
            return self._read_local(sample_id)
        (block,) = self._blocks(np.array([sample_id]))
        place = block.ids.tolist().index(sample_id)
        return self._sound(sample_id, self._fetch(block).result()[place])

    def ahead(self, works: Iterable[Work], workers: int = 1) -> Iterator[tuple[Work, Read]]:
        """Each of `works` with a function that gives the bytes of a sample (once for each of its `ids`); it raises as
        `read` does. Remote samples are on their way from the moment at which `works` says so, or `read_ahead` of the
        policy before, and at least during the work before.

        Args:
            workers: how many processes of the rank do this, each with its part of `read_ahead`.
        """
        coming: deque[tuple[Work, dict[int, tuple[Pieces, int]]]] = deque()
        asked: dict[int, tuple[Pieces, int]] = {}
        waiting, source = 0, iter(works)
        depth, least = (self._policy.read_ahead / workers, 2) if self._remote.any() else (0, 1)

        def take(sample_id: int, held: dict[int, tuple[Pieces, int]]) -> bytes:
            if sample_id not in held:
                return self.read(sample_id)
            pieces, place = held.pop(sample_id)
            contents = pieces.result()
            data, contents[place] = contents[place], None  # what has been used is not kept
            return self._sound(sample_id, data)

        try:
            while True:
                while (waiting < depth or len(coming) < least) and (work := next(source, None)) is not None:
                    for block in self._blocks(work.begin):
                        pieces = self._fetch(block)
                        asked |= {
                            sample: (pieces, place)
                            for place, (sample, wanted) in enumerate(zip(block.ids.tolist(), block.wanted, strict=True))
                            if wanted
                        }
                    coming.append((work, {i: asked.pop(i) for i in work.ids.tolist() if i in asked}))
                    waiting += self._weight(work)
                if not coming:
                    return
                work, held = coming.popleft()
                waiting -= self._weight(work)
                yield work, partial(take, held=held)
        finally:
            for unused, _ in itertools.chain(asked.values(), *(held.values() for _, held in coming)):
                unused.cancel()

    def _weight(self, work: Work) -> int:
        """Bytes that a work counts for when reading ahead."""
        return int(np.maximum(self._index.columns["size"][work.ids[work.ids >= 0]], _LEAST).sum())

    def _read_local(self, sample_id: int) -> bytes:
        sample = self._index.sample(sample_id)
        data = self._on_disk(sample.shard, lambda file: os.pread(file, sample.size, sample.offset))
        if len(data) != sample.size:
            raise DamagedSample(f"{sample}: got {len(data)} of {sample.size} bytes; the shard is truncated")
        return self._sound(sample_id, data if zlib.crc32(data) == sample.crc32 else None)

    def _sound(self, sample_id: int, data: bytes | None) -> bytes:
        if data is None:
            raise DamagedSample(f"{self._index.sample(sample_id)}: crc32 differs from the index; the shard is damaged")
        return data

    def _on_disk(self, number: int, use: Callable[[int], T]) -> T:
        """`use` of a local shard's descriptor. A mounted disk may fail at any call (EIO, ESTALE)."""
        path = urls.local_path(self._urls[number])
        try:
            if number not in self._files:
                if len(self._files) >= _MAX_OPEN:
                    os.close(self._files.pop(next(iter(self._files))))
                self._files[number] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            return use(self._files[number])
        except OSError as error:
            raise UserError(f"{path}: cannot read the shard ({error.strerror}); check the disk and the path") from error

    def _fetch(self, block: _Block) -> Pieces:
        if self._fetcher is None:
            self._fetcher = RangeFetcher(self._policy)
        offsets, sizes, sums = (self._index.columns[name][block.ids].tolist() for name in ("offset", "size", "crc32"))
        rows = zip(offsets, sizes, sums, block.wanted, strict=True)
        pieces = [Piece(offset - block.range.start, size, crc32, wanted) for offset, size, crc32, wanted in rows]
        return self._fetcher.submit(block.range, pieces)

    def _blocks(self, ids: np.ndarray) -> list[_Block]:
        """The ranges that hold the remote ones of `ids`, in the order in which they are first needed.

        Without a cache they leave out what is not wanted; with one they are whole chunks, the same in each epoch.
        """
        columns = self._index.columns
        ids = ids[ids >= 0]
        ids = ids[self._remote[columns["shard"][ids]]]
        rows = ids
        if self._policy.cache:
            rows = (np.unique(ids // CHUNK)[:, None] * CHUNK + np.arange(CHUNK)).ravel()
            rows = rows[rows < len(self._index)]
            rows = rows[self._remote[columns["shard"][rows]]]
        chunks = rows // CHUNK if self._policy.cache else np.zeros_like(rows)
        order = np.lexsort((columns["offset"][rows], chunks, columns["shard"][rows]))
        rows, chunks = rows[order], chunks[order]
        shards, starts = columns["shard"][rows], columns["offset"][rows]
        ends = (starts + columns["size"][rows]).tolist()
        merged = merge_offset_ranges(
            list(zip(shards.tolist(), chunks.tolist(), strict=True)),
            starts.tolist(),
            ends,
            max_gap=_WHOLE if self._policy.cache else _MAX_GAP,
            max_block=_WHOLE if self._policy.cache else _MAX_RANGE,
            sort=False,
        )
        turn = {sample: place for place, sample in enumerate(ids.tolist())}
        blocks: list[tuple[int, _Block]] = []
        row = 0
        for (number, chunk), start, end in zip(*merged, strict=True):
            first = row
            while row < len(rows) and (shards[row], chunks[row]) == (number, chunk) and ends[row] <= end:
                row += 1
            turns = [turn.get(i) for i in rows[first:row].tolist()]
            due = min((t for t in turns if t is not None), default=None)
            if due is not None:
                span = Range(self._urls[number], self._index.shards[number].etag, start, end)
                blocks.append((due, _Block(span, rows[first:row], [t is not None for t in turns])))
        return [block for _, block in sorted(blocks, key=lambda pair: pair[0])]
