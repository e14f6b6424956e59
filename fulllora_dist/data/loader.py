"""Streams of batches: plan, reader and decode behind worker processes.

What is read ahead is never counted. The trainer says with `commit` how many global batches of the run are done; an
iteration starts there, and a saved state holds nothing else that changes.
"""

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from fulllora_dist.data import plan
from fulllora_dist.data.batch import Batch
from fulllora_dist.data.index import Index
from fulllora_dist.data.progress import Progress, Work
from fulllora_dist.data.ranges import ReadPolicy
from fulllora_dist.data.reader import DamagedSample, Read, ShardReader
from fulllora_dist.data.urls import redacted
from fulllora_dist.data.workers import fork_server, settle_in, signals_held
from fulllora_dist.errors import SharedUserError, UserError
from fulllora_dist.rng import numpy_rng

_logger = logging.getLogger(__name__)


class Transform(Protocol):
    """Bytes of a picture to uint8 [3, size, size]; everything random comes from `rng`. Must be picklable,
    and for `TrainStream.resize` a dataclass."""

    @property
    def size(self) -> int: ...

    def __call__(self, data: bytes, rng: np.random.Generator) -> torch.Tensor: ...


class BadSample(NamedTuple):
    """A sample that could not be used, and why (with shard, key and offset)."""

    id: int
    why: str


class _Part(NamedTuple):
    """What one process made of its slots of one batch, and what it had to replace."""

    batch: Batch
    bad: tuple[BadSample, ...]


class _Parts(IterableDataset):
    """The parts of this process. An error that the user can mend comes back as a value: raised in a worker, torch would
    wrap it into a page of traceback.

    Args:
        works: (worker, workers) -> its works; picklable.
    """

    def __init__(
        self, reader: ShardReader, index: Index, transform: Transform, seed: int, works: Callable[..., Iterable[Work]]
    ):
        self._index, self._reader, self._transform, self._seed = index, reader, transform, seed
        self._works = works

    def __iter__(self) -> Iterator[_Part | UserError]:
        worker = get_worker_info()
        works = self._works() if worker is None else self._works(worker.id, worker.num_workers)
        try:
            for work, read in self._reader.ahead(works):
                yield self._part(work, read)
        except UserError as error:
            yield error

    def _part(self, work: Work, read: Read) -> _Part:
        images = torch.zeros(len(work.ids), 3, self._transform.size, self._transform.size, dtype=torch.uint8)
        ids = work.ids.copy()
        bad: list[BadSample] = []
        for place in np.flatnonzero(ids >= 0).tolist():
            ids[place], images[place] = self._usable(work, place, read, bad)
        mask = ids >= 0
        labels = np.where(mask, self._index.labels[ids], 0)
        fields = [torch.from_numpy(array) for array in (labels, ids, mask)]
        return _Part(Batch(images, fields[0], fields[1], fields[2], work.slot), tuple(bad))

    def _usable(self, work: Work, place: int, read: Read, bad: list[BadSample]) -> tuple[int, torch.Tensor]:
        """The sample in its place, or the next of its window that can be used. The window is the plan's, so the same
        sample stands in on any number of ranks and workers, and after a restart."""
        sample_id = int(work.ids[place])
        try:
            return sample_id, self._picture(work.epoch, sample_id, read)
        except DamagedSample as error:
            if work.spares is None:
                raise
            bad.append(BadSample(sample_id, str(error)))
            last = error
        for spare in work.spares.of(work.slot, place).tolist():
            try:
                return spare, self._picture(work.epoch, spare, self._reader.read)
            except DamagedSample as error:
                bad.append(BadSample(spare, str(error)))
                last = error
        raise last

    def _picture(self, epoch: int, sample_id: int, read: Read) -> torch.Tensor:
        data = read(sample_id)
        try:
            return self._transform(data, numpy_rng(self._seed, "augment", epoch, sample_id))
        except UserError as error:
            raise DamagedSample(f"{self._index.sample(sample_id)}: {error}") from error


def _as_is(item: Any) -> Any:
    return item


def _start_worker(_: int) -> None:
    settle_in()


def _read_ahead(parts: _Parts, workers: int, prefetch: int) -> Iterator[_Part]:
    """The parts of all workers, by turns."""
    loader = DataLoader(
        parts,
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_is,
        worker_init_fn=_start_worker,
        multiprocessing_context=fork_server("torch.utils.data", "PIL.Image", __name__) if workers else None,
        prefetch_factor=prefetch if workers else None,
        generator=torch.Generator(),  # else each iteration draws a seed from the global generator
    )
    with signals_held():
        items = iter(loader)
    try:
        for item in items:
            if isinstance(item, UserError):
                raise item
            yield item
    finally:
        del items  # ends the workers now; held by a traceback until the garbage collector comes, that takes 5 s each


def _joined(parts: list[_Part], pin_memory: bool) -> Batch:
    """Neighbouring parts as one batch, in page-locked memory where asked for."""
    batch = Batch.cat([part.batch for part in parts])
    return batch.pin_memory() if pin_memory else batch


def _check_ranks(world: int, rank: int, workers: int) -> None:
    if not 0 <= rank < world:
        raise UserError(f"rank {rank} of world {world}: 0 <= rank < world is right")
    if workers < 0:
        raise UserError(f"workers {workers}: 0 (in the main process) or more is right")


class TrainStream:
    """Training batches without end, epoch after epoch; equally many on all ranks.

    A picture that cannot be used (damaged bytes, no readable image) is replaced by another one of its window, which is
    logged. A shard that is missing, may not be read or has changed ends the run.

    Args:
        where: folder or URL of shards with their index, or path or URL of an index.
        batch_size: of the global batch; a multiple of `world`. Each rank gets batch_size / world samples.
        transform: see `Transform`; `decode.TrainTransform` is meant.
        seed: orders the epochs and draws the augmentation.
        world, rank: this process among those that share the batch.
        workers: processes that read and decode; 0 does it in this one. Each holds some slots of the batch.
        prefetch: batches read ahead by each worker.
        pin_memory: page-locked tensors, for asynchronous copies to a GPU.
        max_bad_samples: how many different samples may be replaced over the whole run and all ranks.
        policy: how remote shards are read.

    Attributes:
        index: of the data.
        steps_per_epoch: global batches of a whole epoch.
        dropped: samples of the tail that each epoch leaves out, other ones each time.
    """

    def __init__(
        self,
        where: str | Path,
        *,
        batch_size: int,
        transform: Transform,
        seed: int,
        world: int = 1,
        rank: int = 0,
        workers: int = 0,
        prefetch: int = 2,
        pin_memory: bool = False,
        max_bad_samples: int = 0,
        policy: ReadPolicy | None = None,
    ):
        _check_ranks(world, rank, workers)
        if batch_size < 1 or batch_size % world:
            raise UserError(f"batch size {batch_size}: a positive multiple of the {world} ranks is right")
        self.index = Index.load(where)
        self._progress = Progress(self.index, seed, batch_size)
        self._reader = ShardReader(self.index, policy)
        self._reader.check(world, rank)
        self.steps_per_epoch = plan.steps_per_epoch(len(self.index), batch_size)
        self.dropped = plan.dropped(len(self.index), batch_size)
        self._world, self._rank, self._seed, self._transform = world, rank, seed, transform
        self._workers, self._prefetch, self._pin_memory = min(workers, batch_size // world), prefetch, pin_memory
        self._max_bad = max_bad_samples
        self._bad: set[int] = set()  # over all ranks, as far as they have been counted
        self._uncounted: list[BadSample] = []

    def resize(self, size: int) -> None:
        """Iterations that begin from now on give pictures of `size` pixels a side."""
        self._transform = replace(self._transform, size=size)  # type: ignore[type-var]

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the committed position on; `slot` is this rank's first slot in the global batch.

        Raises:
            UserError: a shard cannot be read; or this rank alone has met more than `max_bad_samples` bad ones.
        """
        works = self._progress.works(self._world, self._rank)
        parts = _Parts(self._reader, self.index, self._transform, self._seed, works)
        read = _read_ahead(parts, self._workers, self._prefetch)
        while together := list(itertools.islice(read, max(1, self._workers))):
            # with more ranks than this one, `count_bad` comes first: after the batch, on all of them at once
            if self._world == 1:
                self._meet(together)
                self._check_bad(self._uncounted, UserError)
            else:
                self._check_bad(self._uncounted, UserError)
                self._meet(together)
            yield _joined(together, self._pin_memory)

    def _meet(self, parts: list[_Part]) -> None:
        for sample in (sample for part in parts for sample in part.bad):
            if sample.id not in self._bad and sample not in self._uncounted:
                _logger.warning("another picture stands in for a bad one: %s", sample.why)
                self._uncounted.append(sample)

    def _check_bad(self, more: Iterable[BadSample], kind: type[UserError]) -> None:
        bad = {sample.id: sample.why for sample in more}
        if bad and len(self._bad | bad.keys()) > self._max_bad:
            why = next(reversed(bad.values()))
            count = len(self._bad | bad.keys())
            raise kind(f"data.max_bad_samples: {count} pictures cannot be used, {self._max_bad} may be; {why}")

    def count_bad(self, union: Callable[[list[BadSample]], list[BadSample]]) -> None:
        """Count the bad samples that the ranks have met since the last call. Every rank calls it after each batch.

        Args:
            union: what the ranks have, together; `Ranks.union` is meant.

        Raises:
            SharedUserError: on every rank, where they are more than `max_bad_samples`.
        """
        met = union(self._uncounted)
        self._check_bad(met, SharedUserError)
        self._bad |= {sample.id for sample in met}
        self._uncounted = []

    def commit(self, step: int) -> None:
        """`step` global batches have been consumed since the beginning of the run."""
        self._progress.commit(step)

    def state_dict(self) -> dict[str, Any]:
        """The committed position, what it is a position in (see `Progress.state_dict`), and the bad samples so far."""
        return {**self._progress.state_dict(), "bad_samples": sorted(self._bad)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`: exactly, on any number of ranks and workers; at another batch size with what is left of
        the epoch, less the tail that fills no batch, which is logged.

        Raises:
            UserError: it belongs to other data or another seed.
        """
        self._progress.load_state_dict(state)
        self._bad = set(state.get("bad_samples", ()))
        if self._progress.done and self._rank == 0:
            _logger.warning(
                "the batch size has changed: %d pictures of the epoch fill no batch", self._progress.dropped
            )


@dataclass(frozen=True)
class _EvalWorks:
    """Every sample's reading begins with its batch; workers take whole batches by turns."""

    batches: list[tuple[int, np.ndarray]]

    def __call__(self, worker: int = 0, workers: int = 1) -> Iterator[Work]:
        for slot, ids in self.batches[worker::workers]:
            yield Work(0, slot, ids, ids)


class EvalStream:
    """Every sample once over all ranks, equally many batches on each; padding has mask False, id -1 and black pixels.

    The samples that share a batch are the same at any number of ranks: batch i goes to rank i mod world. `slot` is the
    place of a batch's first sample in `ids`. Nothing stands in for a bad picture: it ends the evaluation.

    Args:
        where, transform, world, rank, workers, prefetch, pin_memory, policy: as for `TrainStream`.
        batch_size: of each batch on each rank.
        n: evaluate only so many samples, balanced over the classes; all if None.
    """

    def __init__(
        self,
        where: str | Path,
        *,
        batch_size: int,
        transform: Transform,
        n: int | None = None,
        world: int = 1,
        rank: int = 0,
        workers: int = 0,
        prefetch: int = 2,
        pin_memory: bool = False,
        policy: ReadPolicy | None = None,
    ):
        _check_ranks(world, rank, workers)
        if batch_size < 1:
            raise UserError(f"batch size {batch_size}: a positive number is right")
        self.index = Index.load(where)
        n = len(self.index) if n is None else n
        if not 1 <= n <= len(self.index):
            raise UserError(f"n {n}: {redacted(where)} has {len(self.index)} samples to evaluate on")
        reader = ShardReader(self.index, policy)
        reader.check(world, rank)
        # int64 [n]: all sample ids over all ranks, ascending
        self.ids = np.sort(plan.stratified_order(self.index.labels)[:n])
        self._batches = plan.eval_batches(self.ids, batch_size, world, rank)
        self._parts = _Parts(reader, self.index, transform, 0, _EvalWorks(self._batches))
        self._workers, self._prefetch, self._pin_memory = workers, prefetch, pin_memory

    def __len__(self) -> int:
        """Batches on this rank, the same on every rank."""
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        seen = 0
        for part in _read_ahead(self._parts, self._workers, self._prefetch):
            yield _joined([part], self._pin_memory)
            seen += 1
        assert seen == len(self), f"{seen} of {len(self)} batches came"
