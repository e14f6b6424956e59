"""train.py on shards in mock S3: killed, resumed on as many ranks, killed, resumed on one."""

import io
import json
import os
import tarfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fulllora_dist.data.index import Index
from fulllora_dist.data.loader import TrainStream
from fulllora_dist.data.shards.indexing import index_shards
from fulllora_dist.data.transforms import TrainTransform
from tests.ranks import RankServer
from tests.scripts import Launched
from tests.services.mock_s3 import MockS3, mock_s3

TRAIN = Path(__file__).parent / "traced_train.py"
SHARDS, PER_SHARD, BATCH = 100, 24, 8
STEPS = 200  # of the 300 of an epoch: what is read ahead stays in it
LIMIT = 240

CONFIG = """
model:
  backbone: vit_tiny_patch16_224
  pretrained: false
  num_classes: 3
  image_size: 8
  model_kwargs: {{patch_size: 4, embed_dim: 32, depth: 1, num_heads: 2}}
adapter: {{rank: 2}}
threat: {{eps: 8/255}}
method: standard
data: {{train: "{data}", validation: "{data}", augment: crop, num_workers: 1}}
optim: {{batch_size: 8, epochs: 0.666666}}
run: {{output_dir: run, checkpoint_every: 40, log_every: 100}}
evaluation: {{attacks: [clean], num_samples: 12}}
tracking: {{enabled: false}}
"""


@pytest.fixture(scope="module")
def s3() -> Iterator[MockS3]:
    with mock_s3() as s3:
        yield s3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2,400 coloured noise images."""
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    for number in range(SHARDS):
        with tarfile.open(folder / f"train-{number:04d}.tar", "w") as tar:
            for i in range(PER_SHARD):
                buffer = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(buffer, "PNG")
                for extension, data in (("png", buffer.getvalue()), ("cls", str((number + i) % 3).encode())):
                    member = tarfile.TarInfo(f"{number:04d}{i:04d}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    index_shards([str(folder)], progress=False)
    return folder


class Job:
    """A folder for one run and all its restarts."""

    def __init__(self, server: RankServer, folder: Path, s3: MockS3, data: str):
        self._server, self.folder, self.trace = server, folder, folder / "trace"
        (folder / "config.yaml").write_text(CONFIG.format(data=data))
        here = {"TRACE": str(self.trace), "XDG_CACHE_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
        self._environment = os.environ | s3.environment | here

    def start(self, ranks: int) -> Launched:
        config = self.folder / "config.yaml"
        return self._server.launch(TRAIN, "--config", config, ranks=ranks, cwd=self.folder, env=self._environment)

    def traced(self) -> list[tuple[int, int, list[int], list[int]]]:
        return [json.loads(line) for line in self.trace.read_text().splitlines()] if self.trace.exists() else []

    def kill_after(self, step: int, run: Launched) -> str:
        """SIGKILL to every process of the run at once; what it said."""
        deadline = time.monotonic() + LIMIT
        while not any(line[0] >= step for line in self.traced()):
            assert run.poll() is None, run.stderr()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        run.kill()
        return run.stderr()


@pytest.mark.long
def test_a_killed_run_on_s3_resumes_where_it_was(
    rank_server: RankServer, s3: MockS3, folder: Path, tmp_path: Path
) -> None:
    job = Job(rank_server, tmp_path, s3, s3.upload(folder, "train"))
    job.kill_after(90, job.start(ranks=2))
    assert "resuming at batch 80 of 200" in job.kill_after(150, job.start(ranks=2))
    second = len(s3.log)
    last = job.start(ranks=1).wait()
    assert last.returncode == 0, last.stderr
    assert "resuming at batch 120 of 200" in last.stderr
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["n"] == 12

    # the same samples with the same pixels in the same slots as in a stream that nobody interrupted
    transform = TrainTransform(size=8, augment="crop", crop_scale=(0.25, 1.0), crop_pct=0.9, interpolation="bicubic")
    expected = [batch.ids.tolist() for batch in islice(_stream(folder, transform), STEPS)]
    trained: dict[int, dict[int, list]] = {}
    for step, slot, ids, checksums in job.traced():
        for i, sample in enumerate(zip(ids, checksums, strict=True)):
            assert trained.setdefault(step, {}).setdefault(slot + i, sample) == sample, "another one the second time"
    assert {step: [trained[step][slot][0] for slot in range(BATCH)] for step in trained} == dict(enumerate(expected))

    # of what was trained on before the last start, nothing was read again
    index = Index.load(folder)
    used = {i for ids in expected[:120] for i in ids}
    whole = {n for n in range(SHARDS) if used >= set(np.flatnonzero(index.columns["shard"] == n).tolist())}
    assert len(whole) >= 3
    asked = [get for get in s3.log[second:] if not get.name.endswith("safetensors")]
    training = asked[: _first_of_evaluation(asked)]
    assert len(training) > 20
    assert {get.status for get in training} == {206}
    for get in training:
        number = int(get.name[-8:-4])
        assert number not in whole
        rows = np.flatnonzero(index.columns["shard"] == number)
        inside = rows[(index.columns["offset"][rows] >= get.start) & (index.columns["offset"][rows] < get.end)]
        assert not used >= set(inside.tolist())


def _stream(folder: Path, transform: TrainTransform) -> TrainStream:
    return TrainStream(folder, batch_size=BATCH, seed=0, transform=transform)


def _first_of_evaluation(asked: list) -> int:
    """The evaluation of 12 images begins with the one of id 0, in the first shard."""
    return max(i for i, get in enumerate(asked) if get.name.endswith("train-0000.tar"))
