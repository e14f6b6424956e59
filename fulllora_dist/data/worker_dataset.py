"""The images of a batch, made by worker processes: each reads and decodes some of its slots."""

import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from fulllora_dist.core.errors import UserError
from fulllora_dist.core.rng import numpy_rng
from fulllora_dist.data.batch import Batch
from fulllora_dist.data.index import Index
from fulllora_dist.data.position import Work
from fulllora_dist.data.reader import DamagedSample, Read, ShardReader
from fulllora_dist.data.workers import fork_server, settle_in, signals_held


class Transform(Protocol):
    """Bytes of an image to uint8 [3, size, size]; everything random comes from `rng`. Must be picklable,
    and for `TrainStream.resize` a dataclass."""

    @property
    def size(self) -> int: ...

    def __call__(self, data: bytes, rng: np.random.Generator) -> torch.Tensor: ...


class BadSample(NamedTuple):
    """An unreadable sample, and why (with shard, key and offset)."""

    id: int
    why: str


class Part(NamedTuple):
    """What one process made of its slots of one batch, what it had to replace, and the CPU time that it took (None
    without a process of its own)."""

    batch: Batch
    bad: tuple[BadSample, ...]
    cpu_s: float | None = None


class WorkerDataset(IterableDataset):
    """The parts of this process. A UserError comes back as a value: raised in a worker, torch would wrap it into a page
    of traceback.

    Args:
        works: (worker, workers) -> its works; picklable.
        max_bad: how many samples may be replaced over the whole run.
    """

    def __init__(
        self,
        reader: ShardReader,
        index: Index,
        transform: Transform,
        seed: int,
        works: Callable[..., Iterable[Work]],
        max_bad: int = 0,
    ):
        self._index, self._reader, self._transform, self._seed = index, reader, transform, seed
        self._works, self._max_bad = works, max_bad

    def __iter__(self) -> Iterator[Part | UserError]:
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        works, begin = self._works(number, workers), time.process_time()
        try:
            for work, read in self._reader.ahead(works, workers):
                part = self._part(work, read)
                if worker is not None:
                    begin, part = (now := time.process_time()), part._replace(cpu_s=now - begin)
                yield part
        except UserError as error:
            yield error

    def read(self, work: Work, threads: Executor) -> Part:
        """The part of one work without spares: the bytes one after another, the images decoded by `threads`.

        Raises:
            UserError: a sample is unreadable.
        """
        ids = work.ids.tolist()
        for _, read in self._reader.ahead(iter([work])):
            contents = {sample_id: read(sample_id) for sample_id in ids}
        images = threads.map(lambda sample_id: self._image(work.epoch, sample_id, contents.__getitem__), ids)
        labels, mask = self._index.labels[work.ids], np.ones(len(ids), dtype=bool)
        return Part(_batch(torch.stack(list(images)), labels, work.ids.copy(), mask, work.slot), ())

    def _part(self, work: Work, read: Read) -> Part:
        images = torch.zeros(len(work.ids), 3, self._transform.size, self._transform.size, dtype=torch.uint8)
        ids = work.ids.copy()
        bad: list[BadSample] = []
        for place in np.flatnonzero(ids >= 0).tolist():
            ids[place], image = self._usable(work, place, read, bad)
            images = images.to(image.dtype)  # a transform of one's own may give floats
            images[place] = image
        mask = ids >= 0
        labels = np.where(mask, self._index.labels[ids], 0)
        return Part(_batch(images, labels, ids, mask, work.slot), tuple(bad))

    def _usable(self, work: Work, place: int, read: Read, bad: list[BadSample]) -> tuple[int, torch.Tensor]:
        """The sample in its place, or the next of its spares that is readable. They are the plan's, so the same sample
        replaces it on any number of ranks and workers, and after a restart."""
        sample_id = int(work.ids[place])
        try:
            return sample_id, self._image(work.epoch, sample_id, read)
        except DamagedSample as error:
            if work.spares is None:
                raise
            bad.append(BadSample(sample_id, str(error)))
            damage = error
        # one bad spare beyond what is allowed, so that all ranks can count it and stop together; no search through the
        # whole data where nothing is readable
        for spare in itertools.islice(work.spares.of(work.slot, place), self._max_bad + 1):
            try:
                return spare, self._image(work.epoch, spare, self._reader.read)
            except DamagedSample as error:
                bad.append(BadSample(spare, str(error)))
                damage = error
        raise damage

    def _image(self, epoch: int, sample_id: int, read: Read) -> torch.Tensor:
        data = read(sample_id)
        try:
            return self._transform(data, numpy_rng(self._seed, "augment", epoch, sample_id))
        except UserError as error:
            raise DamagedSample(f"{self._index.sample(sample_id)}: {error}") from error


def _batch(images: torch.Tensor, labels: np.ndarray, ids: np.ndarray, mask: np.ndarray, slot: int) -> Batch:
    return Batch(images, torch.from_numpy(labels), torch.from_numpy(ids), torch.from_numpy(mask), slot)


def _as_is(item: Any) -> Any:
    return item


def _start_worker(environment: dict[str, str], _: int) -> None:
    os.environ.update(environment)  # the fork server's is that of its own start, which credentials may have come after
    settle_in()


PREFETCH = 2
"""Batches that each worker reads ahead."""


def read_ahead(dataset: WorkerDataset, workers: int) -> Iterator[Part]:
    """The parts of all workers, by turns."""
    loader = DataLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_is,
        worker_init_fn=partial(_start_worker, dict(os.environ)),
        multiprocessing_context=fork_server("torch.utils.data", "PIL.Image", __name__) if workers else None,
        prefetch_factor=PREFETCH if workers else None,
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
