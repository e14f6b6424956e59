"""The steps of the demo, see demo.py."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_digits

from fulllora_dist.attacks.threat import threat_model
from fulllora_dist.commands.adapter_actions import as_json, describe
from fulllora_dist.config.load import load_config
from fulllora_dist.config.schema import Config
from fulllora_dist.core.errors import UserError
from fulllora_dist.core.units import number_in
from fulllora_dist.data.loader import EvalStream
from fulllora_dist.data.subset import Subset
from fulllora_dist.data.transforms import EvalTransform
from fulllora_dist.distributed.comm import local_launcher
from fulllora_dist.evaluation.attacks import EvalAttack
from fulllora_dist.evaluation.function import evaluate
from fulllora_dist.models.adapted_model import AdaptedModel
from fulllora_dist.models.adapter_file import load, read_adapter
from fulllora_dist.plots.figures import GREY, Attacked, draw_curves, draw_examples
from fulllora_dist.registry.champion import promote
from fulllora_dist.registry.promotion import Rules
from fulllora_dist.registry.registry import SHA256, Registry, Version

ROOT = Path(__file__).resolve().parents[1]
RANKS = 2
SIDE = 16  # pixels; the digits are 8 x 8
HELD_OUT = 40  # of each class
ATTACK = "pgd20"
IMAGES = (3, 4, 8, 9)  # classes of which the first held-out digit is shown
CURVE = (4 / 255, 8 / 255, 16 / 255, 24 / 255)  # beside 0 and the training eps, which the evaluation has
MARKER = "made_by_demo"

Scores = dict[str, dict[str, Any]]  # {model: {attack: as in evaluation.json}}


def clear(output: Path) -> None:
    """An empty folder; only what a demo wrote is removed."""
    if output.exists():
        if not (output / MARKER).is_file() and any(output.iterdir()):
            raise UserError(f"--output: {output} holds something else than a demo; choose another folder")
        shutil.rmtree(output)
    output.mkdir(parents=True)
    (output / MARKER).touch()


def write_images(folder: Path) -> None:
    """train/ and val/ with a folder of PNGs for each digit; the same split every time."""
    digits = load_digits()
    names = [f"{digit}" for digit in digits.target_names]
    for split in ("train", "val"):
        for name in names:
            (folder / split / name).mkdir(parents=True)
    order = np.random.default_rng(0).permutation(len(digits.target))
    held_out = {i for label in digits.target_names for i in order[digits.target[order] == label][:HELD_OUT]}
    for i, (grey, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        small = Image.fromarray((grey * 255 / 16).round().astype(np.uint8))
        image = small.resize((SIDE, SIDE), Image.Resampling.BICUBIC).convert("RGB")
        image.save(folder / ("val" if i in held_out else "train") / names[label] / f"{i:04d}.png")


def call(what: str, *command: str) -> None:
    """Run one step; its stdout goes to stderr, where progress belongs."""
    print(f"\n== {what}\n$ {' '.join(command)}", file=sys.stderr, flush=True)
    threads = str(max(1, (os.cpu_count() or RANKS) // RANKS))
    environment = {"OMP_NUM_THREADS": threads, **os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    code = subprocess.run(command, cwd=ROOT, env=environment, stdout=sys.stderr.fileno()).returncode
    if code:
        raise UserError(f"the demo's step {what!r} ended with exit code {code}; see its messages above")


def train(what: str, config: Path, overrides: list[str]) -> None:
    """train.py on two ranks."""
    call(what, *local_launcher(RANKS), "fulllora_dist/train.py", "--config", str(config.relative_to(ROOT)), *overrides)


def attack(
    name: str, model: AdaptedModel, config: Config, x: torch.Tensor, y: torch.Tensor, ids: torch.Tensor
) -> Attacked:
    """The very examples that the evaluation counted."""
    threat = threat_model(config.threat.norm, config.threat.eps)
    made = EvalAttack.parse(ATTACK)(model, x, y, threat=threat, seed=config.run.seed, ids=ids)
    with torch.no_grad():
        return Attacked(name, made, before=model(x).argmax(dim=1), after=model(made).argmax(dim=1))


def draw(config: Config, models: dict[str, AdaptedModel], scores: Scores, title: str) -> Figure:
    """Examples of each model under attack on the left, its robust accuracy against eps on the right."""
    assert config.data.validation is not None
    eps = config.threat.eps
    transform = EvalTransform(size=SIDE, crop_pct=1.0)
    (first,) = EvalStream(
        config.data.validation, batch_size=10, transform=transform, subset=Subset(10)
    )  # one of each class
    chosen = [int((first.labels == label).nonzero()) for label in IMAGES]
    x, y, ids = first.pixels()[chosen], first.labels[chosen], first.ids[chosen]
    stream = EvalStream(config.data.validation, batch_size=50, transform=transform)
    curves = {}
    for name, model in models.items():
        points = {e: evaluate(model, stream, attacks=(ATTACK,), eps=e, seed=config.run.seed)["attacks"] for e in CURVE}
        known = {0.0: scores[name]["clean"], eps: scores[name][ATTACK]}
        curves[name] = known | {e: point[ATTACK] for e, point in points.items()}
    attacked = [attack(name, model, config, x, y, ids) for name, model in models.items()]
    size = number_in("linf", eps)
    subtitle = f"{len(stream.ids)} held-out digits, PGD-20, every pixel changed by up to {size} of its range"
    figure = Figure(figsize=(15, 1.2 + 1.9 * len(x)), dpi=110)
    figure.suptitle(title, fontsize=17, y=0.985)
    figure.text(0.5, 0.935, subtitle, fontsize=11, color=GREY, ha="center", va="top")
    left, right = figure.subfigures(1, 2, width_ratios=(1.55, 1), squeeze=False)[0]
    draw_examples(left, x, y, stream.index.classes, attacked, eps)
    left.subplots_adjust(left=0.05, right=0.99, top=0.82, bottom=0.06)
    axes = right.subplots()
    draw_curves(axes, curves, "PGD-20")
    axes.axvline(255 * eps, color=GREY, linewidth=1, linestyle=(0, (2, 2)))
    style = {"textcoords": "offset points", "xytext": (4, 0), "fontsize": 9, "va": "center"}
    axes.annotate(f"trained at {size}", (255 * eps, 103), color=GREY, **style)
    right.subplots_adjust(left=0.13, right=0.97, top=0.82, bottom=0.1)
    return figure


def summary(rows: Scores, eps: float) -> str:
    """Accuracies with their 95 % intervals."""

    def cell(score: dict[str, float]) -> str:
        return f"{100 * score['accuracy']:5.1f} ({100 * score['low']:.1f} to {100 * score['high']:.1f})"

    width = max(len(name) for name in rows)
    lines = [f"{'':<{width}}  {'clean %':<21}  PGD-20 % at {number_in('linf', eps)}"]
    for name, scores in rows.items():
        lines.append(f"{name:<{width}}  {cell(scores['clean']):<21}  {cell(scores[ATTACK])}")
    return "\n".join(lines)


def published(registry: Registry, adapter: Path) -> Version:
    """The version that the training run has published its adapter as."""
    description, _ = read_adapter(str(adapter))
    for name in registry.names():
        for version in registry.versions(name):
            if version.tags.get(SHA256) == description.sha256:
                return version
    raise UserError(f"{adapter} is not in the registry; see the messages of its training above")


def run(output: Path) -> None:
    """Make the demo in a folder, which is emptied if a demo wrote it.

    Raises:
        UserError: it holds something else, or a step failed.
    """
    started = time.monotonic()
    clear(output)

    write_images(output / "pictures")
    for split in ("train", "val"):
        source, shards = str(output / "pictures" / split), str(output / "shards" / split)
        tool = [sys.executable, "tools/make_shards.py", source, shards, "--samples-per-shard", "250", "--workers", "1"]
        call(f"shards of {split}", *tool)

    data = [f"data.train={output}/shards/train", f"data.validation={output}/shards/val"]
    before, after = output / "backbone", output / "fulllora"
    train(
        "a backbone, trained on clean digits", ROOT / "configs/demo_backbone.yaml", [*data, f"run.output_dir={before}"]
    )
    overrides = [*data, f"run.output_dir={after}", f"model.checkpoint_path={before}/adapter/adapter.safetensors"]
    train("FullLoRA with N-FGSM", ROOT / "configs/demo.yaml", overrides)

    config = load_config(str(ROOT / "configs/demo.yaml"), overrides)
    results = {run: json.loads((run / "evaluation.json").read_text()) for run in (before, after)}
    models = {"backbone": load(str(before / "adapter")), "FullLoRA": load(str(after / "adapter"))}
    share = models["FullLoRA"].report.share
    scores = {name: results[run]["attacks"] for name, run in zip(models, (before, after), strict=True)}
    robust = [scores[name][ATTACK]["accuracy"] for name in models]
    print("\n== the image", file=sys.stderr, flush=True)
    torch.set_num_threads(1)  # at this size more threads gain little, and lose much where the machine is busy
    done = f"{robust[0]:.0%} before, {robust[1]:.0%} after FullLoRA"
    title = f"Right under attack: {done}, which trains {share:.1%} as many weights as the backbone has"
    figure = output / "demo.png"
    draw(config, models, scores, title).savefig(figure)
    print(summary(scores, config.threat.eps))
    print(f"image: {figure}")
    registry = Registry(config.tracking_uri())
    promotion = promote(registry, published(registry, after / "adapter").address, Rules())
    print(describe(promotion))
    outcome = {
        "clean_before": scores["backbone"]["clean"]["accuracy"],
        "robust_before": robust[0],
        "clean_after": scores["FullLoRA"]["clean"]["accuracy"],
        "robust_after": robust[1],
        "trainable_share": share,
        "n": results[after]["n"],
        "adapter": str(after / "adapter"),
        "figure": str(figure),
        "mlflow_uri": config.tracking_uri(),
        "registered": promotion.version.address,
        "gate": as_json(promotion),
        "seconds": round(time.monotonic() - started, 1),
    }
    print(json.dumps(outcome), flush=True)
