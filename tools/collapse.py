"""Make docs/collapse.md: training provoked to collapse, and what `guard.on_collapse` makes of it.

    python tools/collapse.py [--data ../shared/data] [--arms NAME,...] [--table-only]

An arm that is done is kept, one that was cut short goes on where it was, and page and picture are written after each.
"""

import argparse
import itertools
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from fulllora_dist.distributed.ranks import free_port
from fulllora_dist.errors import UserError, run_entry
from fulllora_dist.evaluation import size_in

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "configs/imagenette_vit_tiny.yaml"
RUNS, SHARDS = Path("runs/collapse"), Path("data/collapse")
RESULTS, PAGE, PICTURE = Path("docs/collapse.json"), Path("docs/collapse.md"), Path("docs/collapse.png")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TIMM_FUSED_ATTN": "0"}
EPS = 12  # in 1/255

COMMON = (
    "model.precision=fp32",
    f"threat.eps={EPS}/255",
    "optim.epochs=20",
    f"data.train={SHARDS / 'train'}",
    f"data.held_out={SHARDS / 'held_out'}",
    f"data.validation={SHARDS / 'val'}",
    "guard.n=400",
    "evaluation.attacks=[clean, fgsm, pgd10]",
    "evaluation.n=500",
    "evaluation.check=0",
    "run.save_every=50",
)
FULL = ("finetune=full", "adapter.head=auto", "optim.lr=5e-4")
FGSM = ("method.name=n_fgsm", "method.noise=0")  # no random start
# name -> (what it is, colour, overrides)
ARMS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "full": ("full finetuning, FGSM", "#D55E00", (*FULL, *FGSM)),
    "full_rollback": (
        "the same, guard.on_collapse=rollback",
        "#009E73",
        (*FULL, *FGSM, "guard.on_collapse=rollback", "guard.safer_method={name: pgd, steps: 2}", "guard.safer_lr=0.1"),
    ),
    "fulllora": ("FullLoRA, FGSM", "#0072B2", FGSM),
}


HEAD = f"""# A collapse, provoked

ViT-Ti/16 with ImageNet weights, finetuned by FGSM without a random start at 96 pixels and Linf {EPS}/255, on 2,000
pictures of Imagenette for 20 epochs. The training's own accuracy, under FGSM, is the thin line. The guarded run is the
same run until its guard notices ([guards.md](guards.md)), within 50 batches of the fall below half of the best.

It is no clean example yet. With PGD-2 and half the learning rate after going back, held-out accuracy fell again, and
the run ended at its third collapse; with a tenth of it, it falls slowly. So much of the fall is robust overfitting to
2,000 pictures, and what the guard saves is `adapter_best/`, the adapter of the highest look.

`python tools/collapse.py` trains the arms that `docs/collapse.json` has not and writes this page. Held out: best and
last accuracy under PGD-10 of 400 pictures held out of training. The others are of 500 validation pictures in fp32,
with Wilson's 95 % intervals.

| arm | went back | best held out % | last held out % | clean % | FGSM % | PGD-10 % |
|---|---|---|---|---|---|---|
"""


def command(name: str) -> list[str]:
    """The arm's own command, without the launcher's port."""
    return ["fulllora_dist/train.py", "--config", CONFIG, *COMMON, *ARMS[name][2], f"run.output={RUNS / name}"]


def make_shards(data: Path) -> None:
    tool = [sys.executable, "tools/make_shards.py"]
    train, val = (data / f"imagenette224-{split}.tar" for split in ("train", "val1000"))
    held_out = ["--holdout", "40", "--holdout-dst", str(SHARDS / "held_out")]
    subprocess.run([*tool, train, SHARDS / "train", "--limit", "2400", *held_out], check=True)
    subprocess.run([*tool, val, SHARDS / "val"], check=True)


def run(name: str, checkpoint: Path) -> None:
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "--master_port", str(free_port())]
    script = [*command(name), f"model.checkpoint={checkpoint}"]
    subprocess.run([*launcher, *script], check=True, env=os.environ | ENVIRONMENT)


def _points(path: Path, metric: str) -> list[list[float]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [[line["step"], line[metric]] for line in lines if metric in line]


def read_result(name: str) -> dict[str, Any]:
    """What page and picture need of a run that is done."""
    folder = RUNS / name
    evaluation = json.loads((folder / "evaluation.json").read_text())
    training = json.loads((folder / "adapter" / "adapter.json").read_text())["training"]
    thrown_away = sorted(folder.glob("metrics_before_rollback_*.jsonl"))
    return {
        "held_out": _points(folder / "metrics.jsonl", "guard/robust_accuracy"),
        "training": _points(folder / "metrics.jsonl", "train/accuracy"),
        "thrown_away": [_points(path, "guard/robust_accuracy") for path in thrown_away],
        "rollbacks": [{key: rollback[key] for key in ("at", "to")} for rollback in training["rollbacks"]],
        "attacks": {
            attack: {key: score[key] for key in ("accuracy", "low", "high")}
            for attack, score in evaluation["attacks"].items()
        },
    }


def draw(results: dict[str, Any]) -> Figure:
    """Held-out accuracy of each arm against the batch; what was thrown away is dotted."""
    figure = Figure(figsize=(8, 4.5), dpi=110, layout="constrained")
    axes = figure.subplots()
    for name, result in results.items():
        label, color, _ = ARMS[name]
        axes.plot(*_percent(result["held_out"]), color=color, marker="o", markersize=4, linewidth=2, label=label)
        axes.plot(*_percent(result["training"]), color=color, linewidth=1, alpha=0.4)
        for points, rollback in zip(result["thrown_away"], result["rollbacks"], strict=True):
            axes.plot(*_percent(points), color=color, linestyle=":", linewidth=2)
            axes.annotate(
                f"collapse seen at {rollback['at']}:\nback to {rollback['to']}, on with PGD",
                (rollback["at"], 100 * points[-1][1]),
                xytext=(12, 30),
                textcoords="offset points",
                color=color,
                fontsize=9,
                arrowprops={"arrowstyle": "->", "color": color},
            )
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.set_xlabel("batch")
    axes.set_ylabel(
        f"accuracy, %\n(PGD-10 on held-out pictures; thin: FGSM in training;\n{size_in('linf', EPS / 255)})"
    )
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    return figure


def _percent(points: list[list[float]]) -> tuple[list[float], list[float]]:
    return [step for step, _ in points], [100 * accuracy for _, accuracy in points]


def row(name: str, result: dict[str, Any]) -> str:
    looks = itertools.chain(result["held_out"], *result["thrown_away"])
    best = max(accuracy for _, accuracy in looks)
    scores = (
        f"{100 * s['accuracy']:.1f} ({100 * s['low']:.1f} to {100 * s['high']:.1f})" for s in result["attacks"].values()
    )
    went_back = "; ".join(f"at {rollback['at']}, to {rollback['to']}" for rollback in result["rollbacks"]) or "-"
    held_out = f"{100 * best:.1f} | {100 * result['held_out'][-1][1]:.1f}"
    return f"| {ARMS[name][0]} | {went_back} | {held_out} | {' | '.join(scores)} |"


def write_page() -> None:
    """Add the arms that are done to the results, and write page and picture from all of them."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results |= {name: read_result(name) for name in ARMS if (RUNS / name / "evaluation.json").exists()}
    results = {name: results[name] for name in ARMS if name in results}
    if not results:
        return
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    draw(results).savefig(PICTURE)
    settings = "export " + " ".join(f"{key}={value}" for key, value in ENVIRONMENT.items())
    commands = [settings, *(shlex.join(["deepspeed", "--num_gpus", "2", *command(name)]) for name in results)]
    table = "\n".join(row(name, result) for name, result in results.items())
    lines = "\n".join(commands)
    PAGE.write_text(f"{HEAD}{table}\n\n![Held-out accuracy against batches]({PICTURE.name})\n\n```bash\n{lines}\n```\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "../shared/data", help="folder of the Imagenette tars")
    parser.add_argument("--arms", help=f"some of {','.join(ARMS)} (default: all)")
    parser.add_argument("--table-only", action="store_true", help="write page and picture from what is there")
    args = parser.parse_args()
    wanted = args.arms.split(",") if args.arms else list(ARMS)
    if unknown := set(wanted) - ARMS.keys():
        raise UserError(f"--arms: {', '.join(sorted(unknown))}: no such arm; known: {', '.join(ARMS)}")
    data = args.data.resolve()
    os.chdir(ROOT)
    if not args.table_only:
        make_shards(data)
        for name in wanted:
            if not RESULTS.exists() or name not in json.loads(RESULTS.read_text()):
                run(name, data / "vit_tiny_patch16_224.safetensors")
            write_page()
    write_page()


if __name__ == "__main__":
    run_entry(main)
