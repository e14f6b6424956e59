"""The training stream as webdataset has its samples: one dict each, for pipelines of webdataset's own stages."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from fulllora_dist.core.errors import UserError
from fulllora_dist.data.loader import PlannedStream
from fulllora_dist.storage.ranges import ReadPolicy


class ShardStream(PlannedStream, IterableDataset):
    """The first stage of a `webdataset.DataPipeline`: samples without end, in the order of `TrainStream`'s plan.

    Each sample is {"__key__", "__url__", "__id__": int, "__epoch__": int, EXT: bytes, "cls": bytes}, EXT being jpg,
    jpeg, png or webp. Length and crc32 are checked; a damaged sample raises, as nothing here can replace it.

    In DataLoader workers each one yields its share of every batch, so the workers must divide the rank's batch, and
    what they yield must be put together into batches in the main process. Then batch b is that of the plan, and
    `commit(step)` in the main process counts as `TrainStream.commit` does. The position is bound to no number of ranks
    or workers.

    Args:
        address: folder or URL of shards with their index, or path or URL of an index.
        batch_size: of the global batch; a multiple of `world`.
        seed: orders the epochs.
        world, rank: this process among those that share the batch.
        policy: how remote shards are read.
    """

    def __init__(
        self,
        address: str | Path,
        *,
        batch_size: int,
        seed: int,
        world: int = 1,
        rank: int = 0,
        policy: ReadPolicy | None = None,
    ):
        super().__init__(address, batch_size, seed, world, rank, policy)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        works = self._position.works(self._world, self._rank)
        if works.count % workers:
            raise UserError(f"num_workers must divide the rank's batch of {works.count}, got {workers}")
        for work, read in self._reader.ahead(works(number, workers), workers):
            for sample_id in work.ids.tolist():
                sample = self.index.sample(sample_id)
                yield {
                    "__key__": sample.key,
                    "__url__": sample.url,
                    "__id__": sample_id,
                    "__epoch__": work.epoch,
                    sample.ext: read(sample_id),
                    "cls": str(sample.label).encode(),
                }
