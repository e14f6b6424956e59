"""Make docs/collapse.md: training provoked to collapse, and what `guard.on_collapse` makes of it, on digits.

    make demo && python tools/experiments/collapse.py [--arms NAME,...] [--table-only]

Finished arms are kept, an interrupted one resumes, and page and image are written after each.
About half an hour on two CPU cores.
"""

import itertools
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from fulllora_dist.commands.entry import run_entry
from fulllora_dist.commands.parser import Parser
from fulllora_dist.core.errors import UserError
from fulllora_dist.core.units import size_in
from fulllora_dist.distributed.comm import local_launcher
from fulllora_dist.models.adapter_file import TENSORS

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "configs/demo_backbone.yaml"
DIGITS, RUNS, SHARDS = Path("runs/demo/pictures"), Path("runs/collapse"), Path("runs/collapse/shards")
RESULTS, PAGE, IMAGE = Path("docs/collapse.json"), Path("docs/collapse.md"), Path("docs/collapse.png")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TIMM_FUSED_ATTN": "0", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
EPS, LARGE = 40, 128  # in 1/255

# convolutions that overlap, and no large strides, make single-step training fragile; a plain ViT on digits holds
MODEL = (
    "model.backbone=xcit_nano_12_p8_224.fb_in1k",
    "model.image_size=32",
    "model.model_kwargs={patch_size: 8, embed_dim: 64, depth: 3, cls_attn_layers: 1, eta: 1.0}",
    f"threat.eps={EPS}/255",
    f"data.train={SHARDS / 'train'}",
    f"data.validation={SHARDS / 'val'}",
    "evaluation.attacks=[clean, fgsm, pgd10]",
)
BACKBONE = "backbone"
COMMON = (
    *MODEL,
    f"model.checkpoint_path={RUNS / BACKBONE / 'adapter' / TENSORS}",
    "model.pretrained=true",
    f"data.held_out={SHARDS / 'held_out'}",
    "optim.epochs=100",
    "optim.warmup_ratio=0.05",
    "threat.eps_warmup_ratio=0.5",
    "run.checkpoint_every=50",
)
FULL = ("optim.lr=3e-3",)
FULLLORA = ("finetune=fulllora", "adapter.rank=3", "adapter.head=trained", "optim.lr=5e-3")
ROLLBACK = "guard.on_collapse=rollback"
SAFER = (ROLLBACK, f"guard.rollback_eps={EPS}/255")


def _trained_by(method: str) -> str:
    return f"phases=[{{fraction: 1, eps: {LARGE}/255, method: {method}}}]"


FGSM, PGD = _trained_by("{name: n_fgsm, noise: 0}"), _trained_by("{name: pgd, steps: 3}")


class Arm(NamedTuple):
    """A run: what it finetunes, how, its colour, and its overrides."""

    part: str
    label: str
    color: str
    overrides: tuple[str, ...]


ARMS = {
    "full": Arm("full finetuning", "FGSM", "#D55E00", (*FULL, FGSM)),
    "full_rollback": Arm("full finetuning", "FGSM, rollback", "#009E73", (*FULL, FGSM, *SAFER)),
    "full_rollback_same_eps": Arm(
        "full finetuning", "FGSM, rollback without rollback_eps", "#CC79A7", (*FULL, FGSM, ROLLBACK)
    ),
    "full_pgd": Arm("full finetuning", "PGD-3", "#0072B2", (*FULL, PGD)),
    "fulllora": Arm("FullLoRA", "FGSM", "#D55E00", (*FULLLORA, FGSM)),
    "fulllora_rollback": Arm("FullLoRA", "FGSM, rollback", "#009E73", (*FULLLORA, FGSM, *SAFER)),
}


HEAD = f"""# A collapse, provoked

FGSM without a random start, with an eps that grows to {LARGE}/255 over half of the run, on digits. Robust accuracy is
that under PGD-10 at {EPS}/255. The model is XCiT (nano, three blocks, patches of 8 pixels) on 32 pixels, trained on
clean digits before. Full finetuning and FullLoRA (9.3 % of the parameters) start from the same weights. One seed
each: digits are no threat model, and none of this is a claim about adapters.

Full finetuning by FGSM becomes robust first. From 75/255 on, accuracy under PGD falls, steeply from 98/255 (below
half of its best at 105/255), while that under FGSM rises in training, at last to 100 %: the model has learned to make
FGSM harmless, and no curve of the training shows it. PGD-3 at the same eps is no cure: a little later (113/255) its
robust accuracy falls below half of the best, and then to 0 %, while its accuracy under its own attack ends at 94 to
100 %; its three steps of 107/255 are coarse, too. In its one run FullLoRA under FGSM, which reached 42 % where full
finetuning reached 69, fell at the same eps; at the full eps it then did not learn any more at all, which its training
accuracy does show. So this run does not show what others find at smaller eps, that adapters make FGSM more stable
(arXiv 2506.22602).

Guarded, each run is bit for bit the unguarded one until its guard notices, within 50 batches of the fall below half
of the best; from there on it trains by PGD-3 at half the learning rate and, with `guard.rollback_eps`, at {EPS}/255.
That eps is what saves it: where it goes back to PGD-3 at the growing eps it collapses twice more, which ends it
(`guard.max_rollbacks`). What such a run leaves, `adapter_best/`, is robust, and that is what its row evaluates.

Whether plain ViTs collapse like this, pretrained ones on photographs among them, and whether a guard saves them, no
page shows yet.

`make demo && python tools/experiments/collapse.py` trains the arms and writes this page. Held out: best and last
accuracy under PGD-10 of 256 images held out of training. The others are of 400 validation images in fp32, with Wilson's
95 % intervals, at {EPS}/255.

| finetuned | by | rolled back | best held out % | last held out % | clean % | FGSM % | PGD-10 % |
|---|---|---|---|---|---|---|---|
"""


def command(name: str) -> list[str]:
    """The run's own command, without the launcher's port."""
    overrides = MODEL if name == BACKBONE else (*COMMON, *ARMS[name].overrides)
    return ["fulllora_dist/train.py", "--config", CONFIG, *overrides, f"run.output_dir={RUNS / name}"]


def make_shards() -> None:
    """Of the demo's digits, 30 of each held out of training."""
    if not DIGITS.is_dir():
        raise UserError(f"{DIGITS} is not there; `make demo` writes it")
    tool = [sys.executable, "tools/make_shards.py"]
    held_out = ["--holdout", "30", "--holdout-dst", str(SHARDS / "held_out")]
    subprocess.run([*tool, DIGITS / "train", SHARDS / "train", *held_out], check=True)
    subprocess.run([*tool, DIGITS / "val", SHARDS / "val"], check=True)


def _made_by(name: str) -> Path:
    return RUNS / f"{name}.json"


def run(name: str) -> None:
    """An arm; where it ends by a collapse, what it leaves is evaluated.

    Raises:
        UserError: what is there of it was made by another command.
    """
    environment, folder, made_by = os.environ | ENVIRONMENT, RUNS / name, _made_by(name)
    if folder.exists() and (not made_by.exists() or json.loads(made_by.read_text()) != command(name)):
        raise UserError(f"{folder}: made by another command; remove it to run the arm anew")
    made_by.write_text(json.dumps(command(name)))
    done = subprocess.run([*local_launcher(2), *command(name)], env=environment)
    if done.returncode == 2 and (folder / "adapter_best").is_dir() and not (folder / "adapter").exists():
        evaluate = ["fulllora_dist/evaluate.py", "--config", CONFIG, "--adapter", str(folder / "adapter_best")]
        output = ["--output", str(folder / "evaluation.json")]
        done = subprocess.run([*local_launcher(2), *evaluate, *output, *MODEL], env=environment)
    done.check_returncode()


def _points(path: Path, metric: str) -> list[list[float]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [[line["step"], line[metric]] for line in lines if metric in line]


def read_result(name: str) -> dict[str, Any]:
    """What page and image need of a run that is done."""
    folder = RUNS / name
    evaluation = json.loads((folder / "evaluation.json").read_text())
    newest = max((folder / "checkpoints").glob("*/checkpoint.json"))
    thrown_away = sorted(folder.glob("metrics_before_rollback_*.jsonl"))
    return {
        "command": json.loads(_made_by(name).read_text()),
        "held_out": _points(folder / "metrics.jsonl", "guard/robust_accuracy"),
        "training": _points(folder / "metrics.jsonl", "train/accuracy"),
        "thrown_away": [_points(path, "guard/robust_accuracy") for path in thrown_away],
        "rollbacks": [{key: r[key] for key in ("at", "to")} for r in json.loads(newest.read_text())["rollbacks"]],
        "ended": not (folder / "adapter").is_dir(),
        "attacks": {
            attack: {key: score[key] for key in ("accuracy", "low", "high")}
            for attack, score in evaluation["attacks"].items()
        },
    }


def draw(results: dict[str, Any]) -> Figure:
    """Held-out accuracy of each arm against the batch; what was thrown away is dotted."""
    figure = Figure(figsize=(10, 4.5), dpi=110, layout="constrained")
    parts = list(dict.fromkeys(ARMS[name].part for name in results))
    panels = dict(zip(parts, figure.subplots(1, len(parts), sharey=True, squeeze=False)[0], strict=True))
    for name, result in results.items():
        part, label, color, _ = ARMS[name]
        axes = panels[part]
        axes.plot(*_percent(result["held_out"]), color=color, marker="o", markersize=3, linewidth=2, label=label)
        axes.plot(*_percent(result["training"]), color=color, linewidth=1, alpha=0.4)
        for points, rollback in zip(result["thrown_away"], result["rollbacks"], strict=True):
            fallen = (rollback["at"], 100 * points[-1][1])
            axes.plot(*_percent(points), color=color, linestyle=":", linewidth=2)
            arrow = {"arrowstyle": "->", "color": color}
            axes.annotate("", (rollback["to"], fallen[1]), xytext=fallen, arrowprops=arrow)
    for part, axes in panels.items():
        axes.set_title(part)
        axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
        axes.set_xlabel("batch")
        axes.grid(alpha=0.25)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2, frameon=False, fontsize=9)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    panels[parts[0]].set_ylabel(
        f"accuracy, %\n(PGD-10 on held-out images, {size_in('linf', EPS / 255)};"
        f"\nthin: training's own attack, to {LARGE}/255)"
    )
    return figure


def _percent(points: list[list[float]]) -> tuple[list[float], list[float]]:
    return [step for step, _ in points], [100 * accuracy for _, accuracy in points]


def row(name: str, result: dict[str, Any]) -> str:
    checks = itertools.chain(result["held_out"], *result["thrown_away"])
    best = max(accuracy for _, accuracy in checks)
    scores = (
        f"{100 * s['accuracy']:.1f} ({100 * s['low']:.1f} to {100 * s['high']:.1f})" for s in result["attacks"].values()
    )
    went_back = [f"at {rollback['at']}, to {rollback['to']}" for rollback in result["rollbacks"]]
    if result["ended"]:
        went_back.append(f"ended at {result['held_out'][-1][0]}")
    held_out = f"{100 * best:.1f} | {100 * result['held_out'][-1][1]:.1f}"
    arm = f"{ARMS[name].part} | {ARMS[name].label}"
    return f"| {arm} | {'; '.join(went_back) or '-'} | {held_out} | {' | '.join(scores)} |"


def write_page() -> None:
    """Add the arms that are done to the results, and write page and image from all of them."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results |= {name: read_result(name) for name in ARMS if (RUNS / name / "evaluation.json").exists()}
    # one of other settings is none of this page
    results = {name: results[name] for name in ARMS if name in results and results[name]["command"] == command(name)}
    if not results:
        return
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    draw(results).savefig(IMAGE)
    settings = "export " + " ".join(f"{key}={value}" for key, value in ENVIRONMENT.items())
    commands = [shlex.join(["deepspeed", "--num_gpus", "2", *command(name)]) for name in (BACKBONE, *results)]
    table = "\n".join(row(name, result) for name, result in results.items())
    lines = "\n".join([settings, *commands])
    PAGE.write_text(f"{HEAD}{table}\n\n![Held-out accuracy against batches]({IMAGE.name})\n\n```bash\n{lines}\n```\n")


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--arms", help=f"some of {','.join(ARMS)} (default: all)")
    parser.add_argument("--table-only", action="store_true", help="write page and image from what is there")
    args = parser.parse_args()
    wanted = args.arms.split(",") if args.arms else list(ARMS)
    if unknown := set(wanted) - ARMS.keys():
        raise UserError(f"--arms: {', '.join(sorted(unknown))}: no such arm; known: {', '.join(ARMS)}")
    os.chdir(ROOT)
    if not args.table_only:
        make_shards()
        run(BACKBONE)
        for name in wanted:
            run(name)
            write_page()
    write_page()


if __name__ == "__main__":
    run_entry(main)
