"""Side-by-side cost of one adversarial step, all arms interleaved in one run.

    python tools/benchmark.py step --backbone vit_base_patch16_224.augreg2_in21k_ft_in1k --batch 64 --precision bf16

Arms, each one PGD-k step (k attack passes and one weight step) on the same batch:

    bound      k + 1 forward and input-gradient passes of the frozen backbone: what no adapter can beat
    fulllora   ours, through the DeepSpeed engine at ZeRO-0
    full       full finetuning through the same engine
    peft       peft's LoRA of the same rank on the same linear layers, with a hand-written PGD loop and AdamW

Random weights (speed does not depend on them). Ratios are of medians; repeat the command on a busy machine.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fulllora_dist.attacks.pgd import cross_entropy, input_gradient
from fulllora_dist.attacks.threat import Linf
from fulllora_dist.data.batch import Batch
from fulllora_dist.distributed.comm import Comm, start_comm, stop_comm
from fulllora_dist.distributed.engine import Engine
from fulllora_dist.distributed.settings import DistributedSettings, OptimSettings
from fulllora_dist.methods import METHODS
from fulllora_dist.models.adapt import create_model
from fulllora_dist.models.adapted_model import AdaptedModel
from fulllora_dist.models.families import family_of
from fulllora_dist.models.precision import compute_in_bf16

EPS = 4 / 255


class Normalised(nn.Module):
    """A bare timm model behind the normaliser, for the arms that are not ours."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone

    def forward(self, pixels: Tensor) -> Tensor:
        return self.backbone((pixels - 0.5) / 0.5)


def through_engine(args: argparse.Namespace, comm: Comm, finetune: str, batch: Batch) -> Callable[[], object]:
    model = create_model(
        args.backbone, pretrained=False, num_classes=1000, image_size=args.image_size, finetune=finetune,
        head="frozen" if finetune == "fulllora" else "auto", precision=args.precision,
    )  # fmt: skip
    optim, method = OptimSettings(batch_size=args.batch), METHODS["pgd"]
    engine = Engine(model, optim, DistributedSettings(zero_stage=0), {}, comm, total_updates=10**6)
    step = method(method.Settings(steps=args.steps), Linf(EPS), 0).step
    return lambda: step(engine, batch, 0)


def bound(model: nn.Module, args: argparse.Namespace, batch: Batch) -> Callable[[], object]:
    model.requires_grad_(False)

    def passes() -> None:
        pixels = batch.pixels()
        for _ in range(args.steps + 1):
            input_gradient(model, pixels, batch.labels, cross_entropy)

    return passes


def peft_lora(model: nn.Module, rank: int, args: argparse.Namespace, batch: Batch) -> Callable[[], object]:
    from peft import LoraConfig, get_peft_model

    targets = ["qkv", "attn.proj", "fc1", "fc2", "patch_embed.proj"]
    adapted = get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))  # type: ignore[arg-type]
    trainable = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable)

    def step() -> None:
        clean = batch.pixels()
        x = clean + torch.empty_like(clean).uniform_(-EPS, EPS)
        for _ in range(args.steps):
            x = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(F.cross_entropy(adapted(x), batch.labels), x)
            x = (clean + (x + EPS / 2 * gradient.sign() - clean).clamp(-EPS, EPS)).clamp(0, 1)
        optimizer.zero_grad()
        F.cross_entropy(adapted(x.detach()), batch.labels).backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()

    return step


def bare(args: argparse.Namespace, device: torch.device) -> nn.Module:
    backbone = timm.create_model(args.backbone, num_classes=1000, img_size=args.image_size).eval().to(device)
    if args.precision == "bf16":
        backbone.requires_grad_(False)
        compute_in_bf16(family_of(backbone, args.backbone).modules(backbone))
    return Normalised(backbone)


def timed(arm: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    arm()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main(argv: list[str]) -> None:
    """Run the arms and print their ratios."""
    parser = argparse.ArgumentParser(
        "benchmark.py step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", default="vit_tiny_patch16_224")
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--steps", type=int, default=3, help="attack steps")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout instead of a table")
    args = parser.parse_args(argv)

    comm = start_comm()
    device = comm.device
    size = args.image_size
    images = torch.randint(0, 256, (args.batch, 3, size, size), dtype=torch.uint8)
    ids = torch.arange(args.batch)
    batch = Batch(images, ids % 1000, ids, torch.ones(args.batch, dtype=torch.bool)).to(device)
    with torch.device("meta"):
        planned: AdaptedModel = create_model(
            args.backbone, pretrained=False, num_classes=1000, image_size=size, head="frozen"
        )
    assert planned.spec.rank is not None
    arms = {
        "bound": bound(bare(args, device), args, batch),
        "fulllora": through_engine(args, comm, "fulllora", batch),
        "full": through_engine(args, comm, "full", batch),
        "peft": peft_lora(bare(args, device), planned.spec.rank, args, batch),
    }
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for i in range(args.rounds + 1):
        for name, arm in arms.items():
            taken = timed(arm, device)
            if i:  # the first round warms up
                seconds[name].append(taken)
        print(f"round {i} of {args.rounds}", file=sys.stderr)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    result = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        **{key: getattr(args, key) for key in ("backbone", "image_size", "batch", "steps", "precision")},
        "rank": planned.spec.rank,
        "images_per_second": {name: args.batch / median for name, median in medians.items()},
        "ratio_to_bound": {name: median / medians["bound"] for name, median in medians.items()},
    }
    if args.json:
        print(json.dumps(result))
    else:
        print(f"{args.backbone}, {size} pixels, batch {args.batch}, PGD-{args.steps}, {args.precision}")
        for name, median in medians.items():
            print(f"{name:<9} {args.batch / median:8.1f} images/s  {median / medians['bound']:.2f} of the bound")
    stop_comm()
