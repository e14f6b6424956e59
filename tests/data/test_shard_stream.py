"""webdataset's own stages on our samples."""

import io
import json
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from byte_shards import Checksum, in_tars, write_shards
from PIL import Image
from torch.utils.data import DataLoader

from fulllora_dist.core.errors import UserError
from fulllora_dist.data.loader import TrainStream
from fulllora_dist.data.shard_stream import ShardStream
from tests.services.fault_server import FaultServer

BATCH = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"), (40, 9, 23))


def stream(folder: Path | str, **more) -> ShardStream:
    return ShardStream(folder, **{"batch_size": BATCH, "seed": 3, **more})


def length(data: bytes) -> int:
    return len(data)


def test_the_samples_are_those_that_webdataset_reads(folder: Path) -> None:
    theirs = {}
    for path in sorted(folder.glob("*.tar")):
        for sample in wds.DataPipeline(wds.SimpleShardList(str(path)), wds.tarfile_to_samples()):
            theirs[sample["__key__"]] = sample
    ours = list(islice(stream(folder), 72))
    assert {sample["__key__"] for sample in ours} == theirs.keys()
    for sample in ours:
        other = theirs[sample["__key__"]]
        assert {k: v for k, v in sample.items() if not k.startswith("__")} == {
            k: v for k, v in other.items() if not k.startswith("__")
        }
        assert sample["__url__"] == other["__url__"]


def test_a_pipeline_of_its_stages(folder: Path) -> None:
    pipeline = wds.DataPipeline(
        stream(folder),
        wds.map_dict(jpg=length, cls=int),
        wds.to_tuple("__key__", "jpg", "cls"),
        wds.batched(BATCH),
    )
    batches = list(islice(pipeline, 6))
    assert all(len(keys) == BATCH and labels.shape == (BATCH,) for keys, _, labels in batches)
    assert sorted(key for keys, _, _ in batches for key in keys) == sorted(key for key, _ in in_tars(folder))


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 3), (1, 2)])
def test_batches_and_state_are_those_of_the_plan(folder: Path, world: int, workers: int) -> None:
    """Through a DataLoader over http: the batches of `TrainStream`, and a restart in the midst of an epoch."""
    plain = TrainStream(folder, batch_size=BATCH, seed=3, transform=Checksum())
    expected = [sorted(batch.ids.tolist()) for batch in islice(plain, 10)]
    with FaultServer(folder) as server:
        found: list[list[int]] = [[] for _ in range(10)]
        for rank in range(world):
            share = BATCH // world
            for begin, end in ((0, 4), (4, 10)):
                source = stream(server.url, world=world, rank=rank)
                source.commit(begin)
                saved = json.dumps(source.state_dict())
                source = stream(server.url, world=world, rank=rank)
                source.load_state_dict(json.loads(saved))
                part = share // max(1, workers)
                pipeline = wds.DataPipeline(source, wds.to_tuple("__id__", "jpg"), wds.batched(part))
                loader = wds.WebLoader(pipeline, batch_size=None, num_workers=workers).unbatched().batched(share)
                for step, (ids, _) in zip(range(begin, end), loader, strict=False):
                    found[step] += [int(i) for i in ids]
    assert [sorted(ids) for ids in found] == expected


def test_workers_must_divide_the_batch(folder: Path) -> None:
    with pytest.raises(UserError, match="num_workers must divide the rank's batch of 12, got 5"):
        next(iter(DataLoader(stream(folder), batch_size=None, num_workers=5)))
    with pytest.raises(UserError, match="batch size must be >= 1 and a multiple of world=5, got 12"):
        stream(folder, world=5)
    with pytest.raises(UserError, match="rank must be >= 0 and < world=2, got 2"):
        stream(folder, world=2, rank=2)
    with pytest.raises(UserError, match="batch size must be >= 1 and a multiple"):
        stream(folder, batch_size=0)


def _decode(sample: dict) -> dict:
    """What the docs show: augmentation keyed by sample and epoch."""
    rng = np.random.default_rng([sample["__epoch__"], sample["__id__"]])
    image = Image.open(io.BytesIO(sample["png"]), formats=["PNG"])
    sample["image"] = np.asarray(image)[:, :: rng.choice([-1, 1])]
    return sample


def test_images_through_map(shards: Path) -> None:
    images = wds.DataPipeline(ShardStream(shards, batch_size=4, seed=0), wds.select(lambda s: "png" in s))
    shapes = Counter(_decode(sample)["image"].shape[:2] for sample in islice(images, 8))
    assert shapes == {(24, 24): 8}
