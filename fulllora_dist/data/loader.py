"""Streams of batches: plan, reader and decode behind worker processes.

What is read ahead is never counted. The trainer says with `commit` how many global batches of the run are done; an
iteration starts there, and a checkpoint holds nothing else that changes.
"""

import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fulllora_dist.core.errors import SharedUserError, UserError
from fulllora_dist.core.messages import redacted
from fulllora_dist.data import plan
from fulllora_dist.data.batch import Batch
from fulllora_dist.data.index import Index
from fulllora_dist.data.position import StreamPosition, Work, check_batch_size, check_rank
from fulllora_dist.data.reader import ShardReader
from fulllora_dist.data.subset import Subset
from fulllora_dist.data.worker_dataset import BadSample, Part, Transform, WorkerDataset, read_ahead
from fulllora_dist.storage.ranges import ReadPolicy

_logger = logging.getLogger(__name__)


def _open(address: str | Path, world: int, rank: int, policy: ReadPolicy | None) -> tuple[Index, ShardReader]:
    """The index, and a reader of its shards, which are there and as they were indexed."""
    check_rank(world, rank)
    index = Index.load(address)
    reader = ShardReader(index, policy)
    reader.check(world, rank)
    return index, reader


def _check_workers(workers: int) -> None:
    if workers < 0:
        raise UserError(f"num_workers must be >= 0, got {workers}")


def _joined(parts: list[Part], pin_memory: bool) -> Batch:
    """Neighbouring parts as one batch, in page-locked memory where asked for."""
    batch = Batch.cat([part.batch for part in parts])
    return batch.pin_memory() if pin_memory else batch


class PlannedStream:
    """The training data of a rank in the order of its plan, from a position that is committed and resumed.

    Attributes:
        index: of the data.
        steps_per_epoch: global batches of a whole epoch.
        dropped: samples of the tail that each epoch leaves out, other ones each time.
    """

    def __init__(
        self, address: str | Path, batch_size: int, seed: int, world: int, rank: int, policy: ReadPolicy | None
    ):
        check_batch_size(batch_size, world)
        self.index, self._reader = _open(address, world, rank, policy)
        self._position = StreamPosition(self.index, seed, batch_size)
        self._world, self._rank = world, rank
        self.steps_per_epoch = plan.steps_per_epoch(len(self.index), batch_size)
        self.dropped = plan.dropped(len(self.index), batch_size)

    def commit(self, step: int) -> None:
        """`step` global batches have been consumed since the beginning of the run; the next iteration begins there."""
        self._position.commit(step)

    def state_dict(self) -> dict[str, Any]:
        """The committed position and what it is a position in: see `StreamPosition.state_dict`."""
        return self._position.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from `state`: exactly, on any number of ranks and workers; at another batch size with what remains of
        the epoch, less the tail that fills no batch, which is logged.

        Raises:
            UserError: it belongs to other data or another seed.
        """
        self._position.load_state_dict(state)
        if self._position.done and self._rank == 0:
            _logger.warning("batch size changed: %d images of the epoch fill no batch", self._position.dropped)


class TrainStream(PlannedStream):
    """Training batches without end, epoch after epoch; equally many on all ranks.

    An unreadable image (damaged bytes, or no image at all) is replaced by another one, of its window if one of them is
    readable, which is logged. A shard that is missing, may not be read or has changed ends the run.

    Args:
        address: folder or URL of shards with their index, or path or URL of an index.
        batch_size: of the global batch; a multiple of `world`. Each rank gets batch_size / world samples.
        transform: see `Transform`; `transforms.TrainTransform` is meant.
        seed: orders the epochs and draws the augmentation.
        world, rank: this process among those that share the batch.
        workers: processes that read and decode; 0 does it in this one. Each holds some slots of the batch.
        pin_memory: page-locked tensors, for asynchronous copies to a GPU.
        max_bad_samples: how many different samples may be replaced over the whole run and all ranks.
        policy: how remote shards are read.
    """

    def __init__(
        self,
        address: str | Path,
        *,
        batch_size: int,
        transform: Transform,
        seed: int,
        world: int = 1,
        rank: int = 0,
        workers: int = 0,
        pin_memory: bool = False,
        max_bad_samples: int = 0,
        policy: ReadPolicy | None = None,
    ):
        _check_workers(workers)
        super().__init__(address, batch_size, seed, world, rank, policy)
        self._seed, self._transform = seed, transform
        self._workers, self._pin_memory = min(workers, batch_size // world), pin_memory
        self._max_bad = max_bad_samples
        self._bad: set[int] = set()  # over all ranks, as far as they have been counted
        self._uncounted: list[BadSample] = []
        self._work = [0.0, 0]  # CPU seconds of the workers, and the images that they made in them

    def resize(self, size: int) -> None:
        """Iterations that begin from now on give images of `size` pixels a side."""
        self._transform = replace(self._transform, size=size)  # type: ignore[type-var]

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the committed position on; `slot` is this rank's first slot in the global batch.

        Raises:
            UserError: a shard cannot be read; or this rank alone has met more than `max_bad_samples` bad ones.
        """
        works = self._position.works(self._world, self._rank)
        dataset = WorkerDataset(self._reader, self.index, self._transform, self._seed, works, self._max_bad)
        read = read_ahead(dataset, self._workers)
        while parts := list(itertools.islice(read, max(1, self._workers))):
            # with more ranks than this one, `count_bad` comes first: after the batch, on all of them at once
            if self._world > 1:
                self._check_bad(self._uncounted, UserError)
            self._note_bad(parts)
            for part in parts:
                if part.cpu_s is not None:
                    self._work[0] += part.cpu_s
                    self._work[1] += len(part.batch)
            if self._world == 1:
                self._check_bad(self._uncounted, UserError)
            yield _joined(parts, self._pin_memory)

    def take_decode_seconds(self) -> float | None:
        """CPU seconds in which a worker makes an image, on average over this rank's batches since the last call; None
        without any, or without workers."""
        (seconds, images), self._work = self._work, [0.0, 0]
        return seconds / images if images else None

    def _note_bad(self, parts: list[Part]) -> None:
        for sample in (sample for part in parts for sample in part.bad):
            if sample.id not in self._bad and sample not in self._uncounted:
                _logger.warning("unreadable image replaced by another: %s", sample.why)
                self._uncounted.append(sample)

    def _check_bad(self, new: list[BadSample], kind: type[UserError]) -> None:
        count = len(self._bad | {sample.id for sample in new})
        if new and count > self._max_bad:
            raise kind(f"{count} unreadable images exceed data.max_bad_samples={self._max_bad}; {new[-1].why}")

    @property
    def uncounted_bad(self) -> int:
        """Bad samples that this rank has met since the last `count_bad`."""
        return len(self._uncounted)

    def count_bad(self, all_gather_list: Callable[[list[BadSample]], list[BadSample]]) -> None:
        """Count the bad samples that the ranks have met since the last call. A collective, for when any has some.

        Args:
            all_gather_list: what the ranks have, together; `Comm.all_gather_list` is meant.

        Raises:
            SharedUserError: on every rank, where they are more than `max_bad_samples`.
        """
        samples = all_gather_list(self._uncounted)
        self._check_bad(samples, SharedUserError)
        self._bad |= {sample.id for sample in samples}
        self._uncounted = []

    def state_dict(self) -> dict[str, Any]:
        """As `PlannedStream`'s, and the bad samples so far."""
        return {**super().state_dict(), "bad_samples": sorted(self._bad)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As `PlannedStream`'s, and the bad samples so far."""
        super().load_state_dict(state)
        self._bad = set(state.get("bad_samples", ()))


def _eval_works(batches: list[tuple[int, np.ndarray]], worker: int = 0, workers: int = 1) -> Iterator[Work]:
    """Every sample's reading begins with its batch; workers take whole batches by turns."""
    for slot, ids in batches[worker::workers]:
        yield Work(0, slot, ids, ids)


class EvalStream:
    """Every sample once over all ranks. Nothing replaces an unreadable image: it ends the evaluation.

    An iteration yields equally many batches on each rank: batch i goes to rank i mod world, and padding has mask False,
    id -1 and black pixels. `read` gives any of `batches` to whoever asks, without padding. The samples that share a
    batch are the same at any number of ranks.

    Args:
        address, transform, world, rank, workers, pin_memory, policy: as for `TrainStream`; `read` has threads
            instead of the worker processes.
        batch_size: of each batch on each rank.
        subset: which samples; all if None.

    Attributes:
        index: of the data.
        ids: int64 [n], all samples over all ranks, ascending.
        batches: int64 arrays of ids, the batches of all ranks in order.
        digest: hash of the samples, their cut into batches, and the transform.
        settings: {name: value} of the transform, and the batch size, JSON-able.
    """

    def __init__(
        self,
        address: str | Path,
        *,
        batch_size: int,
        transform: Transform,
        subset: Subset | None = None,
        world: int = 1,
        rank: int = 0,
        workers: int = 0,
        pin_memory: bool = False,
        policy: ReadPolicy | None = None,
    ):
        _check_workers(workers)
        check_batch_size(batch_size, world=1)
        self.index, self._reader = _open(address, world, rank, policy)
        self.ids = (subset or Subset()).of(self.index, redacted(str(address)))
        self.batches = [self.ids[i : i + batch_size] for i in range(0, len(self.ids), batch_size)]
        identity = f"{self.index.hash} {batch_size} {transform!r} ".encode() + self.ids.tobytes()
        self.digest = hashlib.sha256(identity).hexdigest()
        known: dict[str, Any] = asdict(transform) if is_dataclass(transform) and not isinstance(transform, type) else {}
        self.settings = json.loads(json.dumps({**known, "batch_size": batch_size}, default=str))
        self._own = plan.eval_batches(self.ids, batch_size, world, rank)
        self._dataset = WorkerDataset(self._reader, self.index, transform, 0, partial(_eval_works, self._own))
        self._workers, self._pin_memory = workers, pin_memory

    def __len__(self) -> int:
        """Batches of an iteration on this rank, the same on every rank."""
        return len(self._own)

    def __iter__(self) -> Iterator[Batch]:
        count = 0
        for part in read_ahead(self._dataset, self._workers):
            yield _joined([part], self._pin_memory)
            count += 1
        assert count == len(self), f"{count} of {len(self)} batches came"

    def read(self, ids: np.ndarray) -> Batch:
        """The images of `ids` (int64 [B]), with neither padding nor processes. One call at a time.

        Raises:
            UserError: one of them cannot be read.
        """
        with ThreadPoolExecutor(max(1, self._workers), "decode") as threads:
            part = self._dataset.read(Work(0, 0, ids, ids), threads)
        return _joined([part], self._pin_memory)
