"""Make docs/symptoms.md: what the checks of an evaluation find on healthy models and on broken ones, on digits.

    make demo && python tools/experiments/symptoms.py

Takes the demo's models, trains a fully finetuned one beside them, and breaks the adapted one in the ways in which
evaluations go wrong. About five minutes on two CPU cores.
"""

import os
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fulllora_dist import evaluate, load
from fulllora_dist.commands.entry import run_entry
from fulllora_dist.commands.parser import Parser
from fulllora_dist.core.errors import UserError
from fulllora_dist.data.loader import EvalStream
from fulllora_dist.distributed.comm import local_launcher
from fulllora_dist.evaluation.checks import CHECKS, Numbers
from fulllora_dist.evaluation.trained import eval_transform

ROOT = Path(__file__).resolve().parents[2]
DEMO, FULL, PAGE = Path("runs/demo"), Path("runs/symptoms/full"), Path("docs/symptoms.md")
EPS, IMAGES = 12 / 255, 50  # the demo's; as many as a check takes
HEALTHY = {
    "standard": DEMO / "backbone" / "adapter",
    "full adversarial finetuning": FULL / "adapter",
    "FullLoRA": DEMO / "fulllora" / "adapter",
}


class Around(nn.Module):
    """Of a healthy model, and broken in `forward`."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model


class Saturated(Around):
    """Logits so far apart that cross-entropy's gradient is zero in fp32."""

    def forward(self, x: Tensor) -> Tensor:
        return 1e4 * self.model(x)


class Probabilities(Around):
    """A softmax at the end."""

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).softmax(dim=1)


class Detached(Around):
    """A step in the middle that passes no gradient: PGD stays where it starts, Square does not care."""

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.detach()) + 0 * x.sum()


class Noisy(Around):
    """Noise in each forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x + 0.1 * torch.randn_like(x))


BROKEN: dict[str, Callable[[nn.Module], nn.Module]] = {
    "logits times 10,000": Saturated,
    "a softmax at the end": Probabilities,
    "a step without a gradient": Detached,
    "noise in each pass": Noisy,
}

HEAD = """# Symptoms of masked gradients

Results of the checks of an evaluation ([evaluation.md](evaluation.md)) on {n} images of the demo's digits at Linf
12/255: the demo's backbone, the same fully finetuned by N-FGSM, and with its FullLoRA adapter. Below them the last one
again, broken in ways in which evaluations have gone wrong. A result with a warning is **bold**.
`tests/evaluation/test_checks.py` has models with the other symptoms.
`make demo && python tools/experiments/symptoms.py` writes this page.

| model | clean % | PGD-20 % | {checks} |
|---|---|---|{lines}
"""
LEGEND = """
- Clean and PGD-20: accuracy on all 400 images, as reported.
- determinism: change of the logits between two passes, in % of their spread.
- probabilities, zero_gradients, huge_eps: images whose outputs are probabilities, where the gradient is zero, that
  stay correct at eps = 0.5.
- single_step, square, transfer: images that only FGSM, only Square in 300 queries, or only PGD-20 on the model without
  its branches fools : images that only PGD-20 fools. A model that has no branches has no such check (-).
- restarts: images that each of five restarts of PGD-10 is the first to fool.
"""


def train_full() -> None:
    """The demo's recipe with everything trained; nothing where that is done."""
    weights = DEMO / "backbone" / "adapter" / "adapter.safetensors"
    settings = [
        "finetune=full",
        "adapter.head=auto",
        "adapter.rank=null",
        "optim.lr=1e-3",
        f"model.checkpoint_path={weights}",
    ]
    script = [
        "fulllora_dist/train.py",
        "--config",
        "configs/demo.yaml",
        *settings,
        f"run.output_dir={FULL}",
        "tracking=none",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*local_launcher(2), *script, "evaluation.gradient_masking_samples=0"], check=True, env=environment)


def examine(adapter: Path, broken: str | None = None) -> dict[str, Any]:
    """A model of the demo, or what `BROKEN` makes of it."""
    model = load(str(adapter))
    transform = eval_transform(model, crop_pct=1.0, interpolation="bicubic")
    images = EvalStream(DEMO / "shards" / "val", batch_size=50, transform=transform)
    predict = model if broken is None else BROKEN[broken](model)
    return evaluate(predict, images, attacks=("clean", "pgd20"), eps=EPS, gradient_masking_samples=IMAGES)


def cell(check: str, numbers: Numbers) -> str:
    """What a check has measured, in short."""
    match check:
        case "determinism":
            return f"{100 * numbers['change']:.1f}"
        case "single_step" | "square" | "transfer":
            return f"{numbers['other_alone']} : {numbers['many_alone']}"
        case "restarts":
            return ", ".join(str(number) for key, number in numbers.items() if key != "n")
    counted = {"probabilities": "sum_to_one", "zero_gradients": "zero", "huge_eps": "standing"}[check]
    return f"{numbers[counted]} of {numbers['n']}"


def row(name: str, found: Mapping[str, Any]) -> str:
    """Of the table; checks that warn are bold."""
    warned = {line.partition(":")[0] for line in found["warnings"]}
    figures = [f"{100 * found['attacks'][attack]['accuracy']:.1f}" for attack in ("clean", "pgd20")]
    made = found["checks"]
    cells = {check.name: cell(check.name, made[check.name]) if check.name in made else "-" for check in CHECKS}
    bold = [f"**{text}**" if check in warned else text for check, text in cells.items()]
    return f"| {name} | {' | '.join([*figures, *bold])} |\n"


def main() -> None:
    parser = Parser(description=__doc__)
    parser.parse_args()
    os.chdir(ROOT)
    if not HEALTHY["FullLoRA"].is_dir():
        raise UserError(f"{HEALTHY['FullLoRA']}: no adapter there; `make demo` trains it")
    train_full()
    rows = [row(name, examine(adapter)) for name, adapter in HEALTHY.items()]
    rows += [row(name, examine(HEALTHY["FullLoRA"], name)) for name in BROKEN]
    head = HEAD.format(n=IMAGES, checks=" | ".join(check.name for check in CHECKS), lines="---|" * len(CHECKS))
    PAGE.write_text(head + "".join(rows) + LEGEND)


if __name__ == "__main__":
    run_entry(main)
