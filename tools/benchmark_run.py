"""Training by train.py against a plain PyTorch loop: what the program costs around the step.

    OMP_NUM_THREADS=1 python tools/benchmark.py run --output run.json

    run      the trainer that train.py starts: shards, plan, DeepSpeed, keyed noise, counting, logs to metrics.jsonl
    plain    torchvision's ImageFolder behind a DataLoader, hand-written PGD, clipping, torch's AdamW

Both train the same FullLoRA model on the same JPEGs with a flip, decode in the training process, and save no
checkpoint; MLflow and the guard are off. Rounds of some batches are interleaved; the figure is the median over rounds
of the ratio of CPU times of the process, which other work on the machine hardly changes.
"""

import contextlib
import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmark_step import Row, hand_written, processor
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from fulllora_dist.commands.parser import Parser
from fulllora_dist.config.schema import Config
from fulllora_dist.core.atomic import write_text
from fulllora_dist.core.errors import UserError
from fulllora_dist.data.batch import Batch
from fulllora_dist.data.shards.make import make_shards
from fulllora_dist.distributed.comm import start_comm
from fulllora_dist.distributed.signals import GracefulStop
from fulllora_dist.training.build import build_model, build_stream
from fulllora_dist.training.context import RunContext
from fulllora_dist.training.phases import build_phases
from fulllora_dist.training.trainer import Trainer

CLASSES = 10


def image_folder(folder: Path, count: int, size: int) -> Path:
    """JPEGs of noise around coarse colours."""
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((size, size))
        pixels = np.asarray(coarse) + rng.integers(-12, 13, (size, size, 3))
        path = folder / "images" / f"class{i % CLASSES}" / f"{i:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=92)
    return folder / "images"


def settings(row: Row, folder: Path, stage: int) -> Config:
    return Config.model_validate(
        {
            "model": {
                "backbone": row.backbone, "pretrained": False, "num_classes": CLASSES, "image_size": row.image_size
            },
            "threat": {"eps": "4/255"},
            "method": {"name": "pgd", "steps": row.steps},
            "data": {"train": str(folder / "shards"), "augment": "flip", "num_workers": 0},
            "optim": {"batch_size": row.batch, "epochs": 1000},
            "distributed": {"zero_stage": stage},
            "run": {"output_dir": str(folder / "out"), "checkpoint_every": 10**9, "log_every": 10},
            "tracking": {"enabled": False},
        }
    )  # fmt: skip


def trainer_of(config: Config) -> Iterator[None]:
    """A batch at each `next`."""
    run = RunContext(config, start_comm(), GracefulStop())
    model = build_model(config)
    stream = build_stream(config, model.info, run.comm)
    trainer = Trainer(run, model, stream, build_phases(config, stream.steps_per_epoch))
    batches = trainer.batches()
    with contextlib.redirect_stderr(io.StringIO()):  # the config and the progress bar
        run.open()
        trainer.advance(next(batches))
    for batch in batches:
        trainer.advance(batch)
        yield


def plain_loop(config: Config, row: Row, images: Path) -> Iterator[None]:
    """A batch at each `next`."""
    flipped = transforms.Compose([transforms.RandomHorizontalFlip(), transforms.PILToTensor()])
    loader = DataLoader(ImageFolder(str(images), flipped), batch_size=row.batch, shuffle=True, drop_last=True)
    model = build_model(config).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters)
    ids, mask = torch.arange(row.batch), torch.ones(row.batch, dtype=torch.bool)
    while True:
        for pixels, labels in loader:
            hand_written(model, parameters, optimizer, row, Batch(pixels, labels, ids, mask))
            yield


def cpu_seconds(work: Iterator[None], batches: int) -> float:
    begin = time.process_time()
    for _ in range(batches):
        next(work)
    return (time.process_time() - begin) / batches


def main(argv: list[str]) -> None:
    """Measure, print and write the file."""
    parser = Parser(prog="benchmark.py run", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSON file to write")
    parser.add_argument("--row", default="vit_tiny_patch16_224:96:50:1", metavar="BACKBONE:SIZE:BATCH:STEPS")
    parser.add_argument("--zero-stage", type=int, default=1, choices=(0, 1, 2, 3))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, default=3, help="of each round and arm (default: 3)")
    args = parser.parse_args(argv)
    if args.rounds < 1 or args.batches < 1:
        raise UserError(f"--rounds and --batches must be >= 1, got {args.rounds} and {args.batches}")
    row = Row.parse(args.row)
    os.environ["DS_ACCELERATOR"] = "cpu"  # CPU time is compared
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        images = image_folder(folder, 4 * row.batch, row.image_size)
        make_shards(images, folder / "shards", workers=1, progress=False)
        config = settings(row, folder, args.zero_stage)
        arms: dict[str, Iterator[None]] = {"run": trainer_of(config), "plain": plain_loop(config, row, images)}
        taken: dict[str, list[float]] = {name: [] for name in arms}
        for i in range(args.rounds + 1):
            print(f"round {i} of {args.rounds}", file=sys.stderr, flush=True)
            for name, work in arms.items():
                cpu = cpu_seconds(work, args.batches)
                if i:  # the first round warms up
                    taken[name].append(cpu)
        for work in arms.values():
            work.close()  # type: ignore[attr-defined]
    ratios = [ours / theirs for ours, theirs in zip(taken["run"], taken["plain"], strict=True)]
    cpu_s = {name: statistics.median(values) for name, values in taken.items()}
    result: dict[str, Any] = {
        "cpu": processor(), "torch": torch.__version__, "threads": torch.get_num_threads(), **vars(row),
        "zero_stage": args.zero_stage, "rounds": args.rounds, "batches": args.batches, "cpu_s": cpu_s,
        "ratio": statistics.median(ratios), "ratio_spread": [min(ratios), max(ratios)],
    }  # fmt: skip
    write_text(args.output, json.dumps(result, indent=1))
    low, high = result["ratio_spread"]
    figures = ", ".join(f"{name} {value:.3f} s" for name, value in cpu_s.items())
    print(f"{args.row}, ZeRO-{args.zero_stage}, CPU time a batch: {figures}")
    print(f"run / plain: {result['ratio']:.3f} [{low:.3f}, {high:.3f}]")
