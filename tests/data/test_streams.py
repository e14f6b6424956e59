import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from fulllora_dist.core.errors import UserError
from fulllora_dist.data.batch import Batch
from fulllora_dist.data.index import Index
from fulllora_dist.data.loader import EvalStream, TrainStream
from fulllora_dist.data.reader import DamagedSample
from fulllora_dist.data.shards.indexing import index_shards
from fulllora_dist.data.subset import Subset
from fulllora_dist.data.transforms import EvalTransform, TrainTransform

SIDE = 24
AS_IT_IS = TrainTransform(SIDE, "none")
AUGMENTED = TrainTransform(16, "crop")
FIELDS = ("images", "labels", "ids", "mask")


def train(folder: Path, **settings) -> TrainStream:
    return TrainStream(folder, **{"batch_size": 6, "seed": 1, "transform": AS_IT_IS, **settings})


def contents(batches: list[Batch]) -> Counter:
    """(label, crc32 of the pixels) of the unmasked samples."""
    return Counter(
        (int(label), zlib.crc32(image.permute(1, 2, 0).contiguous().numpy().tobytes()))
        for batch in batches
        for image, label, real in zip(batch.images, batch.labels, batch.mask, strict=True)
        if real
    )


def global_batches(streams: list[Iterator[Batch]], count: int) -> list[Batch]:
    """What the ranks hold, side by side in slot order."""
    result = []
    for parts in islice(zip(*streams, strict=True), count):
        assert [part.slot for part in parts] == [i * len(parts[0]) for i in range(len(parts))]
        result.append(Batch(*(torch.cat([getattr(part, name) for part in parts]) for name in FIELDS)))
    return result


def assert_same(one: list[Batch], other: list[Batch]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.slot == b.slot
        for name in FIELDS:
            assert getattr(a, name).dtype == getattr(b, name).dtype
            assert torch.equal(getattr(a, name), getattr(b, name))


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 0), (3, 0), (1, 2), (2, 1)])
def test_an_epoch_is_the_multiset_of_the_shards_less_the_tail(shards, tar_contents, world: int, workers: int) -> None:
    expected = tar_contents(shards)
    streams = [train(shards, world=world, rank=rank, workers=workers) for rank in range(world)]
    steps = streams[0].steps_per_epoch
    assert (steps, streams[0].dropped, sum(expected.values())) == (5, 2, 32)
    iterators = [iter(stream) for stream in streams]
    tails = []
    for _ in range(2):
        seen = contents(global_batches(iterators, steps))
        assert not seen - expected
        tails.append(expected - seen)
    assert [sum(tail.values()) for tail in tails] == [2, 2]
    assert tails[0] != tails[1]


@pytest.mark.parametrize(("world", "workers"), [(2, 0), (3, 1)])
def test_ranks_and_workers_change_neither_order_nor_augmentation(shards, world: int, workers: int) -> None:
    alone = global_batches([iter(train(shards, transform=AUGMENTED))], 12)
    ranks = [iter(train(shards, transform=AUGMENTED, world=world, rank=rank, workers=workers)) for rank in range(world)]
    assert_same(global_batches(ranks, 12), alone)
    by_id: dict[int, list[torch.Tensor]] = {}
    for batch in alone:
        for image, sample in zip(batch.images, batch.ids.tolist(), strict=True):
            by_id.setdefault(sample, []).append(image)
    twice = [images for images in by_id.values() if len(images) > 1]
    assert len(twice) > 20
    assert not any(torch.equal(images[0], images[1]) for images in twice)  # another epoch, another crop


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_stream_continues_bit_for_bit(shards, workers: int) -> None:
    uninterrupted = list(islice(train(shards, transform=AUGMENTED), 16))
    first = train(shards, transform=AUGMENTED, workers=workers)
    consumed = list(islice(first, 8))  # in the second epoch
    first.commit(7)  # the eighth was handed out, its update never finished; more was read ahead
    saved = json.dumps(first.state_dict())

    resumed = train(shards, transform=AUGMENTED, workers=workers)
    resumed.load_state_dict(json.loads(saved))
    assert resumed.state_dict() == first.state_dict()
    assert_same(consumed[:7] + list(islice(resumed, 9)), uninterrupted)
    on_two = [train(shards, transform=AUGMENTED, world=2, rank=rank) for rank in range(2)]
    for stream in on_two:
        stream.load_state_dict(json.loads(saved))
    assert_same(global_batches([iter(stream) for stream in on_two], 9), uninterrupted[7:])


def test_a_state_of_something_else_is_refused(shards, tmp_path) -> None:
    state = train(shards).state_dict()
    with pytest.raises(UserError, match="seed"):
        train(shards, seed=2).load_state_dict(state)
    shutil.copytree(shards, tmp_path, dirs_exist_ok=True)
    (tmp_path / "train-000004.tar").unlink()
    index_shards([str(tmp_path)], progress=False)
    with pytest.raises(UserError, match="index_hash"):
        train(tmp_path).load_state_dict(state)
    with pytest.raises(UserError, match="plan"):
        train(shards).load_state_dict({**state, "plan": 0})


@pytest.mark.parametrize("workers", [0, 2])
def test_a_flipped_bit_is_found_and_named(shards, tmp_path, workers: int) -> None:
    shutil.copytree(shards, tmp_path, dirs_exist_ok=True)
    sample = Index.load(tmp_path).sample(17)
    with open(sample.url, "r+b") as file:
        file.seek(sample.offset + sample.size - 1)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(DamagedSample) as caught:
        list(EvalStream(tmp_path, batch_size=8, transform=EvalTransform(8), workers=workers))
    message = f"{sample.url}: sample {sample.key} at offset {sample.offset}: crc32 differs"
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_missing_and_truncated_shards_are_refused_at_the_start(shards, tmp_path) -> None:
    shutil.copytree(shards, tmp_path, dirs_exist_ok=True)
    stream = train(tmp_path)
    os.truncate(tmp_path / "train-000002.tar", 2000)
    with pytest.raises(UserError, match=r"train-000002\.tar: 2000 bytes where the index has"):
        train(tmp_path)
    with pytest.raises(DamagedSample, match=r"train-000002\.tar: sample .* the shard is truncated"):
        list(islice(stream, 5))
    (tmp_path / "train-000003.tar").unlink()
    (tmp_path / "train-000002.tar").unlink()
    with pytest.raises(UserError, match=r"train-000002\.tar: cannot read the shard \(No such file"):
        EvalStream(tmp_path, batch_size=4, transform=EvalTransform(8))


def test_a_disk_that_fails_is_no_traceback(shards, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = train(shards)

    def fail(*_) -> bytes:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(UserError, match=r"train-00000\d\.tar: cannot read the shard \(Stale file handle\); check"):
        next(iter(stream))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 7, "world": 2}, "batch size must be >= 1 and a multiple of world=2, got 7"),
        ({"batch_size": 33}, "batch size 33 exceeds the 32 samples"),
        ({"world": 2, "rank": 2}, "rank must be >= 0 and < world=2, got 2"),
        ({"workers": -1}, "num_workers must be >= 0, got -1"),
    ],
)
def test_bad_settings_are_refused(shards, settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        train(shards, **settings)


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("n", [None, 10])
def test_evaluation_sees_every_sample_once_in_the_same_company(shards, tar_contents, world: int, n: int | None) -> None:
    transform = EvalTransform(SIDE, crop_pct=1.0)
    settings = {"batch_size": 5, "transform": transform, "subset": Subset(n), "world": world}
    streams = [EvalStream(shards, **settings, rank=rank, workers=int(world == 2)) for rank in range(world)]
    per_rank = [list(stream) for stream in streams]
    assert {len(batches) for batches in per_rank} == {len(streams[0])}
    batches = sorted((batch for part in per_rank for batch in part), key=lambda batch: batch.slot)
    assert all(len(batch) == 5 for batch in batches)
    padding = [batch for batch in batches if not batch.mask.any()]
    assert batches[len(batches) - len(padding) :] == padding
    assert all((batch.ids[~batch.mask] == -1).all() for batch in batches)

    held = [batch.ids[batch.mask].tolist() for batch in batches]
    ids = streams[0].ids.tolist()
    assert [part for part in held if part] == [ids[i : i + 5] for i in range(0, len(ids), 5)]
    found, expected = contents(batches), tar_contents(shards)
    if n is None:
        assert found == expected
    else:
        assert not found - expected
        assert Counter(label for label, _ in found.elements()) == {0: 4, 1: 3, 2: 3}


class Slow(TrainTransform):
    """20 ms of CPU time an image."""

    def __call__(self, data: bytes, rng: np.random.Generator) -> torch.Tensor:
        begin = time.process_time()
        image = super().__call__(data, rng)
        while time.process_time() < begin + 0.02:
            pass
        return image


def test_the_cpu_time_of_an_image(shards) -> None:
    stream = train(shards, transform=Slow(SIDE, "none"), workers=2)
    batches = iter(stream)
    list(islice(batches, 2))  # the first parts have the start of a worker in them
    assert stream.take_decode_seconds() is not None
    list(islice(batches, 3))
    assert 0.02 <= stream.take_decode_seconds() < 0.03
    assert stream.take_decode_seconds() is None
    here = train(shards)
    list(islice(here, 2))
    assert here.take_decode_seconds() is None, "the time of training would be in it"


def test_the_global_generators_are_left_alone(shards) -> None:
    before, numpys = torch.get_rng_state(), np.random.get_state()[1].copy()
    list(islice(train(shards, transform=AUGMENTED, workers=1), 3))
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpys).all()


JOB = """
import signal, sys
from itertools import islice
from fulllora_dist.data.transforms import TrainTransform
from fulllora_dist.data.loader import TrainStream

caught = set()
if __name__ == "__main__":
    for kind in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
        signal.signal(kind, lambda number, frame: caught.add(number))
    stream = TrainStream(sys.argv[1], batch_size=4, seed=0, transform=TrainTransform(8), workers=2)
    print("up", flush=True)
    batches = iter(stream)
    next(batches)
    print("running", flush=True)
    while len(caught) < 4:
        next(batches)
    print(len(list(islice(batches, 40))), flush=True)
"""


@pytest.fixture
def job(shards, tmp_path) -> Iterator[subprocess.Popen]:
    """A process group of its own that streams with two workers until it has had four signals, and then 40 batches."""
    script = tmp_path / "main.py"
    script.write_text(JOB)
    command = [sys.executable, str(script), str(shards)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        out_of_patience = threading.Timer(90, os.killpg, (process.pid, signal.SIGKILL))
        out_of_patience.start()
        yield process
        out_of_patience.cancel()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def wait_for(job: subprocess.Popen, line: str) -> None:
    assert any(said.strip() == line for said in job.stdout)


@pytest.mark.parametrize("moment", ["up", "running"])
def test_a_signal_to_the_whole_job_reaches_the_main_process_only(job, moment: str) -> None:
    wait_for(job, moment)
    time.sleep(0.2)  # "up": in the midst of starting the workers
    for kind in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
        os.killpg(job.pid, kind)
    assert job.stdout.read().split()[-1] == "40"
    assert job.wait(30) == 0


def test_workers_end_with_a_killed_main_process(job) -> None:
    wait_for(job, "running")
    job.kill()
    killed = time.monotonic()
    job.stdout.read()  # ends when the last process that holds the pipe has ended
    assert time.monotonic() - killed < 30


def test_real_images(real_data, tmp_path) -> None:
    """Imagenette's validation tar to shards to batches: the images of every class arrive, each once."""
    import tarfile

    from fulllora_dist.data.shards.make import make_shards

    make_shards(
        real_data / "imagenette224-val1000.tar", tmp_path, split_name="val", samples_per_shard=300, progress=False
    )
    with tarfile.open(real_data / "imagenette224-val1000.tar") as tar:
        members = [member for member in tar.getmembers() if member.isfile()]
        expected = Counter((m.name.split("/")[1], zlib.crc32(tar.extractfile(m).read())) for m in members)
    transform = EvalTransform(64, crop_pct=1.0)
    streams = [EvalStream(tmp_path, batch_size=64, transform=transform, world=2, rank=r, workers=r) for r in (0, 1)]
    index = streams[0].index
    found: Counter = Counter()
    for batch in (batch for stream in streams for batch in stream):
        for sample, label in zip(batch.ids[batch.mask].tolist(), batch.labels[batch.mask].tolist(), strict=True):
            found[index.classes[label], index.sample(sample).crc32] += 1
        assert (batch.images[batch.mask].float().std((1, 2, 3)) > 1).all()
    assert found == expected
