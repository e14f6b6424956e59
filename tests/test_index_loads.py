"""What a start of train.py reads of its data's indexes."""

import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from fulllora_dist.data.shards.make import make_shards
from fulllora_dist.distributed.comm import free_port

TRAIN = Path(__file__).parents[1] / "fulllora_dist" / "train.py"
COUNT = """
from fulllora_dist.data import index

map_columns = index.map_columns

def counted(path, checksum=None):
    if checksum is None:  # else another process has read the file
        with open({log!r}, "a") as file:
            print(path, file=file)
    return map_columns(path, checksum)

index.map_columns = counted
"""
CONFIG = """
model:
  backbone: vit_tiny_patch16_224
  pretrained: false
  num_classes: 2
  image_size: 16
  model_kwargs: {{patch_size: 4, embed_dim: 32, depth: 1, num_heads: 2}}
adapter: {{rank: 2}}
threat: {{eps: 8/255}}
method: {{name: standard}}
data: {{train: {folder}/train, validation: {folder}/validation, held_out: {folder}/held_out, num_workers: 1}}
optim: {{lr: 1.0e-3, batch_size: 8, epochs: 1}}
guard: {{steps: 1}}
run: {{output_dir: {folder}/run}}
evaluation: {{attacks: [clean]}}
tracking: {{uri: "http://127.0.0.1:{port}", flush_timeout_s: 0}}
plugins: [{folder}/count.py]
"""


def test_a_run_reads_each_index_once(tmp_path: Path) -> None:
    """Checks, tracking, training, guard and evaluation share what was read; a worker maps what its parent has read."""
    rng = np.random.default_rng(0)
    splits = ("train", "validation", "held_out")
    for split in splits:
        for i in range(24):
            path = tmp_path / "images" / split / f"class{i % 2}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
        make_shards(tmp_path / "images" / split, tmp_path / split, progress=False)
    log = tmp_path / "reads.txt"
    (tmp_path / "count.py").write_text(COUNT.format(log=str(log)))
    (tmp_path / "config.yaml").write_text(CONFIG.format(folder=tmp_path, port=free_port()))
    done = subprocess.run([sys.executable, TRAIN, "--config", tmp_path / "config.yaml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "evaluation.json").exists()
    assert sorted(log.read_text().split()) == sorted(str(tmp_path / split / "index.safetensors") for split in splits)
