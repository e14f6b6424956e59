"""Make docs/symptoms.md: what the checks of an evaluation find on healthy models and on broken ones, on Imagenette.

    python tools/symptoms.py [--data ../shared/data] [--table-only]

Trains what the checks are to be quiet on, and breaks one of them in the ways in which evaluations go wrong. What is
done is kept in docs/symptoms.json. About half an hour on two CPU cores.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fulllora_dist import evaluate, load
from fulllora_dist.data.batch import Batch
from fulllora_dist.data.loader import EvalStream
from fulllora_dist.data.subset import Subset
from fulllora_dist.distributed.ranks import free_port
from fulllora_dist.errors import run_entry
from fulllora_dist.evaluation import EvalPictures, eval_transform
from fulllora_dist.evaluation.checks import CHECKS, Numbers

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "configs/imagenette_vit_tiny.yaml"
RUNS, SHARDS = Path("runs/symptoms"), Path("data/imagenette")
RESULTS, PAGE = Path("docs/symptoms.json"), Path("docs/symptoms.md")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TIMM_FUSED_ATTN": "0"}
EPS, PICTURES = 4 / 255, 50
COMMON = (
    "model.precision=fp32",
    "evaluation.n=200",
    "evaluation.attacks=[clean, pgd10]",
    f"evaluation.check={PICTURES}",
)
NFGSM = ("method=n_fgsm",)
HEALTHY: dict[str, tuple[str, ...] | None] = {
    "standard": None,
    "full adversarial training": (*NFGSM, "finetune=full", "adapter.head=auto", "optim.lr=2e-4"),
    "FullLoRA": NFGSM,
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
    """A step in the midst that passes no gradient: PGD stays where it starts, Square does not care."""

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.detach()) + 0 * x.sum()


class Noisy(Around):
    """Noise in each forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x + 0.1 * torch.randn_like(x))


class Shifted:
    """Pictures that somebody has normalised before."""

    def __init__(self, pictures: Any):
        self._pictures = pictures
        self.batches, self.index, self.digest = pictures.batches, pictures.index, "shifted"

    def read(self, ids: np.ndarray) -> Batch:
        batch = self._pictures.read(ids)
        return replace(batch, images=(batch.pixels() - 0.5) / 0.25)


BROKEN: dict[str, tuple[Callable[[nn.Module], nn.Module], Callable[[EvalPictures], EvalPictures] | None]] = {
    "logits times 10,000": (Saturated, None),
    "a softmax at the end": (Probabilities, None),
    "a step without a gradient": (Detached, None),
    "noise in each pass": (Noisy, None),
    "pictures normalised before": (nn.Identity, Shifted),
}

HEAD = """# Symptoms of robust accuracy that is none

The checks of an evaluation ([evaluation.md](evaluation.md)) on {n} validation pictures of Imagenette at 96 pixels and
Linf 4/255, for ViT-Ti/16 with ImageNet weights: as it is, fully finetuned, and with a FullLoRA adapter, both by N-FGSM.
Below them the last one again, broken in ways in which evaluations have gone wrong. What a check warns of is **bold**.
`tests/evaluation/test_checks.py` has models for the other symptoms, whose loss had to be built for them.

`python tools/symptoms.py` trains and measures what `docs/symptoms.json` has not, and writes this page.

| model | {checks} |
|---|{lines}
"""
LEGEND = """
- pixels: lowest and highest. determinism: change of logits between two passes, of their spread.
- probabilities, zero_gradients, huge_eps: pictures whose outputs are probabilities, where the gradient is zero, that
  stay right at eps = 0.5.
- single_step, square: pictures that only FGSM, or only Square in 300 queries, fools : that only PGD-20 does.
- restarts: pictures that each of five restarts of PGD-10 is the first to fool.
"""


def make_shards(data: Path) -> None:
    tool = [sys.executable, "tools/make_shards.py"]
    for split, name, more in (("train", "train", ["--limit", "2000"]), ("val", "val1000", [])):
        subprocess.run([*tool, data / f"imagenette224-{name}.tar", SHARDS / split, *more], check=True)


def train(name: str, overrides: tuple[str, ...] | None, checkpoint: Path) -> dict[str, Any]:
    """Train or resume; the evaluation at its end, or that of the bare backbone where there is nothing to train."""
    output = RUNS / name.replace(" ", "_")
    common = ["--config", CONFIG, *COMMON, f"model.checkpoint={checkpoint}"]
    if overrides is None:
        script = ["fulllora_dist/evaluate.py", *common, "--output", str(output / "evaluation.json")]
    else:
        script = ["fulllora_dist/train.py", *common, *overrides, f"run.output={output}", "tracking=none"]
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "--master_port", str(free_port())]
    subprocess.run([*launcher, *script], check=True, env=os.environ | ENVIRONMENT)
    return json.loads((output / "evaluation.json").read_text())


def examine(name: str, checkpoint: Path) -> dict[str, Any]:
    """The FullLoRA model of `RUNS`, broken."""
    model = load(str(RUNS / "FullLoRA" / "adapter"), checkpoint=str(checkpoint))
    transform = eval_transform(model.info, crop_pct=1.0)
    pictures = EvalStream(SHARDS / "val", batch_size=25, transform=transform, subset=Subset(PICTURES))
    broken, other = BROKEN[name]
    around = model if broken is nn.Identity else broken(model)
    return evaluate(around, other(pictures) if other else pictures, attacks=("clean",), eps=EPS, check=PICTURES)


def cell(check: str, numbers: Numbers) -> str:
    """What a check has measured, in short."""
    match check:
        case "pixels":
            return f"{numbers['lowest']:.2f} to {numbers['highest']:.2f}"
        case "determinism":
            return f"{numbers['change']:.1%}"
        case "single_step" | "square":
            return f"{numbers['other_alone']} : {numbers['many_alone']}"
        case "restarts":
            return ", ".join(str(number) for key, number in numbers.items() if key != "n")
    counted = {"probabilities": "sum_to_one", "zero_gradients": "zero", "huge_eps": "standing"}[check]
    return f"{numbers[counted]} of {numbers['n']}"


def write_page(results: Mapping[str, Mapping[str, Any]]) -> None:
    head = HEAD.format(n=PICTURES, checks=" | ".join(CHECKS), lines="---|" * len(CHECKS))
    rows = []
    for name in [*HEALTHY, *BROKEN]:
        if name in results:
            found = results[name]
            warned = {line.partition(":")[0] for line in found["warnings"]}
            cells = (cell(check, numbers) for check, numbers in found["checks"].items())
            bold = (f"**{text}**" if c in warned else text for c, text in zip(found["checks"], cells, strict=True))
            rows.append(f"| {name} | {' | '.join(bold)} |\n")
    PAGE.write_text(head + "".join(rows) + LEGEND)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "../shared/data", help="folder of the Imagenette tars")
    parser.add_argument("--table-only", action="store_true", help="write the page from what is there")
    args = parser.parse_args()
    checkpoint = args.data.resolve() / "vit_tiny_patch16_224.safetensors"
    os.chdir(ROOT)
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if not args.table_only:
        make_shards(checkpoint.parent)
        for name in [*HEALTHY, *BROKEN]:
            if name not in results:
                found = train(name, HEALTHY[name], checkpoint) if name in HEALTHY else examine(name, checkpoint)
                results[name] = {key: found[key] for key in ("checks", "warnings")}
                results[name]["accuracy"] = {attack: score["accuracy"] for attack, score in found["attacks"].items()}
                RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            write_page(results)
    write_page(results)


if __name__ == "__main__":
    run_entry(main)
