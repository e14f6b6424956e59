"""Runs of the real train.py on 48 tiny images: six batches an epoch, each a few milliseconds."""

import time
from pathlib import Path

import numpy as np
from mlflow import MlflowClient
from PIL import Image

from fulllora_dist.data.shards.make import make_shards
from tests.smallest import TINY_MODEL

ROOT = Path(__file__).parents[2]
TRAIN = str(ROOT / "fulllora_dist" / "train.py")
EVALUATE = str(ROOT / "fulllora_dist" / "evaluate.py")

CONFIG = (
    TINY_MODEL
    + """\
threat: {{eps: 8/255}}
method: standard
data: {{train: {data}, validation: {data}, augment: flip, num_workers: 0}}
optim: {{lr: 1.0e-3, batch_size: 8, epochs: 4}}
run: {{output_dir: unset, log_every: 5}}
evaluation: {{attacks: [clean], num_samples: 12, gradient_masking_samples: 0}}
tracking: {{enabled: false}}
"""
)


def make_shards_of(folder: Path, classes: int = 3, seed: int = 0) -> Path:
    """Shards of 16 images a class, of coloured noise."""
    rng = np.random.default_rng(seed)
    for label in range(classes):
        (folder / "images" / f"class{label}").mkdir(parents=True)
        for i in range(16):
            pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / f"class{label}" / f"{i}.png")
    make_shards(folder / "images", folder / "shards", workers=1, progress=False)
    return folder / "shards"


def make_config(folder: Path) -> Path:
    """A config file beside its shards; run.output_dir is to be set."""
    path = folder / "config.yaml"
    path.write_text(CONFIG.format(data=make_shards_of(folder)))
    return path


def reached(checkpoints: Path, step: int, seconds: float = 60) -> None:
    """Wait for a checkpoint of this batch or a later one."""
    deadline = time.monotonic() + seconds
    while not any(int(path.name) >= step for path in checkpoints.glob("[0-9]*")):
        assert time.monotonic() < deadline, f"no checkpoint of batch {step} in {checkpoints}"
        time.sleep(0.02)


def runs_in(store: Path) -> list[tuple[str, int, int | None]]:
    """(status, start and end in ms) of all runs in a sqlite store."""
    client = MlflowClient(f"sqlite:///{store}")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return [
        (run.info.status, run.info.start_time, run.info.end_time)
        for run in client.search_runs(experiments, order_by=["attributes.start_time"])
    ]
