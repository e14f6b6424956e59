"""Streams of batches: plan, reader and decode behind worker processes.

What is read ahead is never counted. The trainer says with `commit` how many global batches of the run are done; an
iteration starts there, and a saved state holds nothing else that changes.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from fulllora_dist.data import plan
from fulllora_dist.data.batch import Batch
from fulllora_dist.data.index import Index
from fulllora_dist.data.reader import DamagedSample, ShardReader
from fulllora_dist.data.workers import fork_server, settle_in, signals_held
from fulllora_dist.errors import UserError
from fulllora_dist.rng import numpy_rng


class Transform(Protocol):
    """Bytes of a picture to uint8 [3, size, size]; everything random comes from `rng`. Must be picklable,
    and for `TrainStream.resize` a dataclass."""

    @property
    def size(self) -> int: ...

    def __call__(self, data: bytes, rng: np.random.Generator) -> torch.Tensor: ...


class _Work(NamedTuple):
    """One batch of one rank. `ids`: int64 [b], -1 pads."""

    epoch: int
    slot: int
    ids: np.ndarray


class _Batches(Dataset):
    """Work in, the fields of a Batch out. An error that the user can mend comes back as a value: raised in a worker,
    torch would wrap it into a page of traceback."""

    def __init__(self, index: Index, transform: Transform, seed: int):
        self._index = index
        self._reader = ShardReader(index.folder)
        self._transform = transform
        self._seed = seed

    def __getitem__(self, work: _Work) -> tuple[Any, ...] | UserError:
        images = torch.zeros(len(work.ids), 3, self._transform.size, self._transform.size, dtype=torch.uint8)
        real = work.ids >= 0
        try:
            for i in np.flatnonzero(real):
                images[i] = self._picture(work.epoch, int(work.ids[i]))
        except UserError as error:
            return error
        labels = np.where(real, self._index.labels[work.ids], 0)
        return images, torch.from_numpy(labels), torch.from_numpy(work.ids), torch.from_numpy(real), work.slot

    def _picture(self, epoch: int, sample_id: int) -> torch.Tensor:
        sample = self._index.sample(sample_id)
        data = self._reader.read(sample)
        try:
            return self._transform(data, numpy_rng(self._seed, "augment", epoch, sample_id))
        except UserError as error:
            raise DamagedSample(f"{sample}: {error}") from error


class _Plan(Sampler[_Work]):
    """Makes a generator function into the sampler that DataLoader asks for."""

    def __init__(self, works: Callable[[], Iterable[_Work]]):
        self._works = works

    def __iter__(self) -> Iterator[_Work]:
        return iter(self._works())


def _as_is(item: Any) -> Any:
    return item


def _start_worker(_: int) -> None:
    settle_in()


def _read_ahead(
    batches: _Batches, works: Callable[[], Iterable[_Work]], workers: int, prefetch: int, pin_memory: bool
) -> Iterator[Batch]:
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=_Plan(works),
        num_workers=workers,
        collate_fn=_as_is,
        worker_init_fn=_start_worker,
        multiprocessing_context=fork_server("torch.utils.data", "PIL.Image", __name__) if workers else None,
        prefetch_factor=prefetch if workers else None,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # else each iteration draws a seed from the global generator
    )
    with signals_held():
        items = iter(loader)
    try:
        for item in items:
            if isinstance(item, UserError):
                raise item
            images, labels, ids, mask, slot = item
            yield Batch(images, labels, ids, mask, slot)
    finally:
        del items  # ends the workers now; held by a traceback until the garbage collector comes, that takes 5 s each


def _check_ranks(world: int, rank: int, workers: int) -> None:
    if not 0 <= rank < world:
        raise UserError(f"rank {rank} of world {world}: 0 <= rank < world is right")
    if workers < 0:
        raise UserError(f"workers {workers}: 0 (in the main process) or more is right")


class TrainStream:
    """Training batches without end, epoch after epoch; equally many on all ranks.

    Args:
        folder: holds the shards and their index.npz.
        batch_size: of the global batch; a multiple of `world`. Each rank gets batch_size / world samples.
        transform: see `Transform`; `decode.TrainTransform` is meant.
        seed: orders the epochs and draws the augmentation.
        world, rank: this process among those that share the batch.
        workers: processes that read and decode; 0 does it in this one.
        prefetch: batches read ahead by each worker.
        pin_memory: page-locked tensors, for asynchronous copies to a GPU.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        batch_size: int,
        transform: Transform,
        seed: int,
        world: int = 1,
        rank: int = 0,
        workers: int = 0,
        prefetch: int = 2,
        pin_memory: bool = False,
    ):
        _check_ranks(world, rank, workers)
        if batch_size < 1 or batch_size % world:
            raise UserError(f"batch size {batch_size}: a positive multiple of the {world} ranks is right")
        self.index = Index.load(folder)
        if batch_size > len(self.index):
            raise UserError(f"batch size {batch_size}: {folder} has only {len(self.index)} samples")
        ShardReader(self.index.folder).check(self.index.shards)
        self.steps_per_epoch = plan.steps_per_epoch(len(self.index), batch_size)
        self.dropped = plan.dropped(len(self.index), batch_size)
        self._batch_size, self._world, self._rank, self._seed = batch_size, world, rank, seed
        self._read_ahead = (workers, prefetch, pin_memory)
        self._transform = transform
        self._batches = _Batches(self.index, transform, seed)
        self._step = 0

    def resize(self, size: int) -> None:
        """Iterations that begin from now on give pictures of `size` pixels a side."""
        self._batches = _Batches(self.index, replace(self._transform, size=size), self._seed)  # type: ignore[type-var]

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the committed position on; `slot` is this rank's first slot in the global batch."""
        start = self._step
        return _read_ahead(self._batches, lambda: self._works(start), *self._read_ahead)

    def _works(self, step: int) -> Iterator[_Work]:
        slot = plan.first_slot(self._batch_size, self._world, self._rank)
        epoch, batch = divmod(step, self.steps_per_epoch)
        while True:
            order = plan.epoch_order(len(self.index), self._seed, epoch)
            for b in range(batch, self.steps_per_epoch):
                yield _Work(epoch, slot, plan.batch_slots(order, b, self._batch_size, self._world, self._rank))
            epoch, batch = epoch + 1, 0

    def commit(self, step: int) -> None:
        """`step` global batches have been consumed since the beginning of the run."""
        self._step = step

    def _identity(self) -> dict[str, Any]:
        return {
            "plan": plan.PLAN_VERSION,
            "index_hash": self.index.hash,
            "seed": self._seed,
            "batch_size": self._batch_size,
        }

    def state_dict(self) -> dict[str, Any]:
        """The committed position and what it is a position in. JSON fits; it is bound to no number of ranks."""
        return {"step": self._step, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`. Raises UserError where it belongs to other data, another seed or batch size."""
        for name, mine in self._identity().items():
            if state.get(name) != mine:
                raise UserError(
                    f"the saved stream has {name} {state.get(name)!r}, this one {mine!r}: "
                    "resume with the data, seed and batch size that the run began with"
                )
        self.commit(int(state["step"]))


class EvalStream:
    """Every sample once over all ranks, equally many batches on each; padding has mask False, id -1 and black pixels.

    The samples that share a batch are the same at any number of ranks: batch i goes to rank i mod world. `slot` is the
    place of a batch's first sample in `ids`.

    Args:
        folder, transform, world, rank, workers, prefetch, pin_memory: as for `TrainStream`.
        batch_size: of each batch on each rank.
        n: evaluate only so many samples, balanced over the classes; all if None.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        batch_size: int,
        transform: Transform,
        n: int | None = None,
        world: int = 1,
        rank: int = 0,
        workers: int = 0,
        prefetch: int = 2,
        pin_memory: bool = False,
    ):
        _check_ranks(world, rank, workers)
        if batch_size < 1:
            raise UserError(f"batch size {batch_size}: a positive number is right")
        self.index = Index.load(folder)
        n = len(self.index) if n is None else n
        if not 1 <= n <= len(self.index):
            raise UserError(f"n {n}: {folder} has {len(self.index)} samples to evaluate on")
        ShardReader(self.index.folder).check(self.index.shards)
        # int64 [n]: all sample ids over all ranks, ascending
        self.ids = np.sort(plan.stratified_order(self.index.labels)[:n])
        self._works = [_Work(0, slot, ids) for slot, ids in plan.eval_batches(self.ids, batch_size, world, rank)]
        self._read_ahead = (workers, prefetch, pin_memory)
        self._batches = _Batches(self.index, transform, seed=0)

    def __len__(self) -> int:
        """Batches on this rank, the same on every rank."""
        return len(self._works)

    def __iter__(self) -> Iterator[Batch]:
        return _read_ahead(self._batches, lambda: self._works, *self._read_ahead)
