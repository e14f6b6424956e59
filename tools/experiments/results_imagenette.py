"""Make docs/results_one_seed.md: the variants of configs/imagenette_vit_tiny.yaml, trained and evaluated on Imagenette.

    python tools/experiments/results_imagenette.py [--data ../shared/data] [--rows NAME,...] [--table-only]

Finished rows are kept, an interrupted one resumes, and the table is written after each row.
About 8 minutes a row on two CPU cores.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import timm

from fulllora_dist.commands.entry import run_entry
from fulllora_dist.config.load import load_config
from fulllora_dist.core.errors import UserError
from fulllora_dist.distributed.comm import local_launcher
from fulllora_dist.evaluation.compare import paired_difference
from fulllora_dist.studies.work import training_work

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "configs/imagenette_vit_tiny.yaml"
RUNS = Path("runs/imagenette")
PAGE = Path("docs/results_one_seed.md")
RESULTS = Path("docs/results_one_seed.json")  # what was measured, a row each; the page is made from it
TRAINING_IMAGES = 2000
BEFORE = "before"
ATTACK = "pgd10"
# on the CPU the fused attention's backward is several times slower in bf16 than the plain one
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TIMM_FUSED_ATTN": "0"}

FULL = ("finetune=full", "adapter.head=auto", "optim.lr=2e-4")
EXPERIMENTS = "plugins=[tools/experiments/cheaper_passes.py]"
FP32, BF16 = "model.precision=fp32", "model.precision=bf16"  # bf16 where a row does not say fp32
SMALL_FIRST = "phases=[{fraction: 0.8, image_size: 64, method: n_fgsm}, {fraction: 0.2}]"
# name -> (what it is, overrides)
ROWS: dict[str, tuple[str, tuple[str, ...]]] = {
    BEFORE: ("the backbone as it is", ()),
    "fulllora_pgd2": ("FullLoRA, PGD-2", ()),
    "fulllora_nfgsm": ("FullLoRA, N-FGSM", ("method=n_fgsm",)),
    "full_pgd2": ("full finetuning, PGD-2", FULL),
    "fulllora_free4": ("FullLoRA, Free-4, as many passes as N-FGSM", ("method=free", "optim.epochs=16")),
    "fulllora_pgd2_r16": ("FullLoRA, PGD-2, rank 16", ("adapter.rank=16",)),
    "nfgsm_fp32": ("FullLoRA, N-FGSM, fp32", ("method=n_fgsm", FP32)),
    "agat_fp32": ("FullLoRA, N-FGSM with token dropping (AGAT), fp32", (EXPERIMENTS, "method=agat_n_fgsm", FP32)),
    "nfgsm_short_fp32": ("FullLoRA, N-FGSM, as much work as AGAT, fp32", ("method=n_fgsm", "optim.epochs=5.1", FP32)),
    "free4_fp32": ("FullLoRA, Free-4, fp32", ("method=free", "optim.epochs=16", FP32)),
    "yopo_fp32": (
        "FullLoRA, Free-4 with 3 steps through the first block (YOPO), fp32",
        (EXPERIMENTS, "method=yopo", "optim.epochs=12.3", FP32),
    ),
    "phases_fp32": ("FullLoRA, 80 % N-FGSM at 64 pixels, then PGD-2, fp32", (SMALL_FIRST, FP32)),
    "lora_pgd2": ("plain LoRA (no LN), PGD-2", ("finetune=lora",)),
    "lora_pgd2_lr5e-4": ("plain LoRA, PGD-2, lr 5e-4", ("finetune=lora", "optim.lr=5e-4")),
    "fulllora_trades": ("FullLoRA, TRADES-2, beta 6", ("method.name=trades", "method.steps=2")),
    "fulllora_mart": ("FullLoRA, MART-2, lambda 5", ("method.name=mart", "method.steps=2")),
    "fulllora_mixed": (
        "FullLoRA, PGD-2, mixup 0.8 and CutMix 1 on 30 %",
        ("targets={mixup: 0.8, cutmix: 1.0, mix_probability: 0.3}",),
    ),
    "fulllora_weakened": (
        "FullLoRA, PGD-2, attention drop and perturbation mask over 25 %",
        ("method.attention_drop=0.25", "method.perturbation_mask=0.25"),
    ),
    "fulllora_fgsm_rs": ("FullLoRA, FGSM-RS", ("method=fgsm_rs",)),
    "full_nfgsm": ("full finetuning, N-FGSM", (*FULL, "method=n_fgsm")),
    "fulllora_pgd2_nowarmup": ("FullLoRA, PGD-2, eps not warmed up", ("threat.eps_warmup_ratio=0",)),
}

HEAD = """# Imagenette: ViT-Ti/16 at 96 pixels, Linf 4/255

A real ImageNet ViT-Ti/16 (`augreg_in21k_ft_in1k`), its head cut to Imagenette's ten classes; 2,000 training images,
8 epochs (320 updates of 50 images), blocks in bf16 where a row does not say fp32, two DeepSpeed ranks (ZeRO-1) on two
CPU cores, one seed. Evaluated on 1,000 validation images in fp32; intervals are Wilson's at 95 %. PGD-10: random
start, steps of 1/255. The backbone has seen most of these images in its own pretraining, so clean accuracy is
optimistic for all rows alike. Nothing was chosen on the validation images but the recipe itself (learning rate, flip
instead of crop, trained head, warm-up of eps), on the first 300 of them: read differences between rows, not digits.

All rows but "Free-4, fp32" and YOPO saw a full permutation of each epoch, before its order became that of
[data.md](data.md).

*Work* is the floating-point operations of the whole training, attack and weight steps, counted on the real model and
relative to the row of FullLoRA with PGD-2.

Shards, once. The tars hold Imagenette v2 squashed to 224 pixels (github.com/thunderInfy/imagenette) in class folders;
put your own paths in place of `../shared/data`, which is not part of the repository:

```bash
python tools/make_shards.py ../shared/data/imagenette224-train.tar data/imagenette/train --limit 2000
python tools/make_shards.py ../shared/data/imagenette224-val1000.tar data/imagenette/val
```

`python tools/experiments/results_imagenette.py` trains the rows that `docs/results_one_seed.json` has not and writes
this page.

| row | trained share | updates | work | clean % | PGD-10 % |
|---|---|---|---|---|---|
"""


FINDINGS = """## Cheaper passes

Both ideas are in `tools/experiments/cheaper_passes.py`, outside of the package. Differences of PGD-10 accuracy are in
points, paired over the 1,000 images, with the 95 % interval of [evaluation.md](evaluation.md); fp32 rows, one seed.

- **Dropping tokens by attention** (AGAT, arXiv 2207.10498; 70 % of the patch tokens continue at blocks 3, 6 and 9, in
  every pass) saves a third of N-FGSM's work. Training N-FGSM for 5.1 instead of 8 epochs saves as much. AGAT minus
  that: {agat_fp32 - nfgsm_short_fp32}. At 96 pixels there are only 36 patches; at 224 and more the saving in attention
  is larger, which was not measured.
- **Updating the perturbation through the first block** (YOPO, arXiv 1905.00877): each full pass gives the adapter's
  gradient and moves the perturbation three times through the patch embedding and the first block, where Free moves it
  once by the whole model's gradient. At equal work, YOPO minus Free-4: {yopo_fp32 - free4_fp32}. An earlier variant
  (`yopo` of commit e456b7f), whose full pass served the perturbation alone and was followed by a weight step of its
  own, cost 13 % more work than N-FGSM; minus that: {yopo_separate_fp32 - nfgsm_fp32}. The paper's one update from m
  passes was not tried.
- N-FGSM of 5.1 epochs minus N-FGSM of 8: {nfgsm_short_fp32 - nfgsm_fp32}.
"""


def command(name: str) -> list[str]:
    """The row's own command, without the launcher's port."""
    overrides = ROWS[name][1]
    if name == BEFORE:
        return ["fulllora_dist/evaluate.py", "--config", CONFIG, "--output", str(RUNS / name / "evaluation.json")]
    precision = [] if FP32 in overrides else [BF16]
    return ["fulllora_dist/train.py", "--config", CONFIG, *overrides, *precision, f"run.output_dir={RUNS / name}"]


def make_shards(data: Path) -> None:
    for archive, split, limit in (("train", "train", ["--limit", str(TRAINING_IMAGES)]), ("val1000", "val", [])):
        source = data / f"imagenette224-{archive}.tar"
        make = [sys.executable, "tools/make_shards.py", str(source), f"data/imagenette/{split}", *limit]
        subprocess.run(make, check=True)


def run(name: str, checkpoint: Path) -> None:
    script = [*command(name), f"model.checkpoint_path={checkpoint}"]
    subprocess.run([*local_launcher(2), *script], check=True, env=os.environ | ENVIRONMENT)


def work(name: str) -> tuple[int, int]:
    """(optimizer updates, floating-point operations) of a row's whole training."""
    timm.layers.set_fused_attn(False)  # the methods of cheaper_passes.py read the attention's weights
    found = training_work(load_config(CONFIG, ROWS[name][1]), TRAINING_IMAGES)
    return found["updates"], found["flops"]


def read_result(name: str) -> dict[str, Any]:
    """What the table needs of a run that is done."""
    evaluation = json.loads((RUNS / name / "evaluation.json").read_text())
    scores = {
        attack: {key: score[key] for key in ("accuracy", "low", "high")}
        | {"correct": "".join(str(int(right)) for right in score["correct"])}  # a digit an image, to pair rows by
        for attack, score in evaluation["attacks"].items()
    }
    if name == BEFORE:
        return {"share": 0, "rank": None, "attacks": scores}
    adapter = json.loads((RUNS / name / "adapter" / "adapter.json").read_text())
    return {"share": adapter["trainable_share"], "rank": adapter["adapter"]["rank"], "attacks": scores}


def row(name: str, result: dict[str, Any], reference: int) -> str:
    scores = [
        f"{100 * s['accuracy']:.1f} ({100 * s['low']:.1f} to {100 * s['high']:.1f})" for s in result["attacks"].values()
    ]
    if name == BEFORE:
        return f"| {ROWS[name][0]} | 0 | 0 | 0 | {' | '.join(scores)} |"
    updates, operations = work(name)
    rank = f", rank {result['rank']}" if result["rank"] else ""
    share = f"{result['share']:.2%}{rank}"
    return f"| {ROWS[name][0]} | {share} | {updates} | {operations / reference:.2f} | {' | '.join(scores)} |"


def difference(pair: str, results: dict[str, Any]) -> str:
    """Of the robust accuracies of `row - other row`, in points."""
    names = pair.split(" - ")
    if not all("correct" in results.get(name, {}).get("attacks", {}).get(ATTACK, {}) for name in names):
        return "not measured"
    one, other = (np.array(list(results[name]["attacks"][ATTACK]["correct"])) == "1" for name in names)
    found = paired_difference(other, one, 10_000, np.random.default_rng(0))
    return "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * found[key] for key in ("difference", "low", "high")))


def write_table() -> None:
    """Add the runs that are done to the results, and write the page from all of them."""
    results = json.loads(RESULTS.read_text())
    results |= {name: read_result(name) for name in ROWS if (RUNS / name / "evaluation.json").exists()}
    done = [name for name in ROWS if name in results]
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    reference = work("fulllora_pgd2")[1]
    settings = "export " + " ".join(f"{key}={value}" for key, value in ENVIRONMENT.items())
    commands = "\n".join([settings, *(shlex.join(["deepspeed", "--num_gpus", "2", *command(name)]) for name in done)])
    table = "\n".join(row(name, results[name], reference) for name in done)
    findings = re.sub(r"\{(.+?)\}", lambda found: difference(found[1], results), FINDINGS)
    PAGE.write_text(f"{HEAD}{table}\n\n{findings}\n```bash\n{commands}\n```\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the Imagenette tars")
    parser.add_argument("--rows", help=f"some of {','.join(ROWS)} (default: all)")
    parser.add_argument("--table-only", action="store_true", help="write the page from what is there")
    args = parser.parse_args()
    wanted = args.rows.split(",") if args.rows else list(ROWS)
    if unknown := set(wanted) - ROWS.keys():
        raise UserError(f"--rows: {', '.join(sorted(unknown))}: no such row; known: {', '.join(ROWS)}")
    os.chdir(ROOT)
    if not args.table_only:
        make_shards(args.data)
        for name in wanted:
            if name not in json.loads(RESULTS.read_text()):
                run(name, args.data / "vit_tiny_patch16_224.safetensors")
            write_table()
    write_table()


if __name__ == "__main__":
    run_entry(main)
