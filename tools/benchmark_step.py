"""Cost of one adversarial step, side by side: PGD-k attack, weight step and optimizer on the same batch.

    OMP_NUM_THREADS=1 python tools/benchmark.py step --output step.json --compiled
    python tools/benchmark.py step --output l.json --precision bf16 --row vit_large_patch16_224:224:64:3

Arms, interleaved, each a plain loop with torch's AdamW and with the gradients of parameters off in the attack:

    bound      k + 1 forward and input-gradient passes of the frozen backbone: what no adapter can beat
    fulllora   FullLoRA with this package's PGD
    peft       peft's LoRA of the same rank on the same layers (one branch for q, k and v), hand-written PGD
    full       full finetuning of the timm model, hand-written PGD

and with --compiled each also with its blocks compiled one by one, as NAME_compiled; its `ratio_to_bound` is relative to
`bound_compiled`. Random weights: speed does not depend on them. Medians over rounds, with [min, max]; ratios are of CPU
time of the process, which other work on the machine hardly changes, and on CUDA of wall time. `saved_bytes_ratio` is
what an attack pass keeps for its backward pass, parameters aside, relative to the frozen backbone's.

FILE is written after each row; the same command continues it.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from fulllora_dist.attacks.pgd import attack_mode, cross_entropy, input_gradient
from fulllora_dist.attacks.threat import Linf
from fulllora_dist.commands.parser import Parser
from fulllora_dist.core.atomic import write_text
from fulllora_dist.core.errors import UserError
from fulllora_dist.data.batch import Batch
from fulllora_dist.methods import METHODS
from fulllora_dist.models.adapt import create_model
from fulllora_dist.models.adapted_model import AdaptedModel
from fulllora_dist.models.families import family_of
from fulllora_dist.models.precision import compute_in_bf16

EPS = 4 / 255
CLASSES = 1000
Arm = Callable[[], object]


@dataclass(frozen=True)
class Row:
    backbone: str
    image_size: int
    batch: int
    steps: int

    @classmethod
    def parse(cls, text: str) -> "Row":
        """From BACKBONE:SIZE:BATCH:STEPS."""
        backbone, *numbers = text.split(":")
        if len(numbers) != 3 or not all(n.isdecimal() and int(n) for n in numbers) or not timm.is_model(backbone):
            raise UserError(f"--row must be BACKBONE:SIZE:BATCH:STEPS with a backbone of timm, got {text}")
        return cls(backbone, *map(int, numbers))

    def work(self) -> float:
        """Relative to other rows: forward passes times images, tokens and parameters."""
        with torch.device("meta"):
            model = timm.create_model(self.backbone)
        return (self.steps + 1) * self.batch * self.image_size**2 * sum(p.numel() for p in model.parameters())


TINY, BASE = "vit_tiny_patch16_224", "vit_base_patch16_224"
ROWS = [Row(TINY, 96, 50, 1), Row(TINY, 96, 50, 3), Row(BASE, 224, 2, 1), Row(BASE, 224, 2, 3)]


class Normalised(nn.Module):
    """A bare timm model behind the normaliser, for the arms that are not ours."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone

    def forward(self, pixels: Tensor) -> Tensor:
        return self.backbone((pixels - 0.5) / 0.5)


class PlainEngine:
    """A weight step without DeepSpeed (`methods.base.WeightStep`): clipping and AdamW."""

    classes = CLASSES

    def __init__(self, model: nn.Module):
        self.attack_view = model
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(self._parameters)

    def __call__(self, pixels: Tensor) -> Tensor:
        return self.attack_view(pixels)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def accumulate(self, batch: Batch) -> Iterator[Batch]:
        self._optimizer.zero_grad()
        yield batch
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()


def full_lora(row: Row, precision: str) -> AdaptedModel:
    model = create_model(
        row.backbone, pretrained=False, num_classes=CLASSES, image_size=row.image_size, head="frozen",
        precision=precision,
    )  # fmt: skip
    model.pixels_checked = True  # as the engine sets it
    return model


def bare(row: Row, precision: str, trained: bool) -> nn.Module:
    backbone = timm.create_model(row.backbone, num_classes=CLASSES, img_size=row.image_size).eval()
    backbone.requires_grad_(trained)
    if precision == "bf16":
        compute_in_bf16(family_of(backbone, row.backbone).modules(backbone))
    return Normalised(backbone)


def peft_lora(row: Row, precision: str, rank: int) -> nn.Module:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise UserError("peft is not installed; install .[benchmark], or leave it out with --arms") from None
    targets = ["qkv", "attn.proj", "fc1", "fc2", "patch_embed.proj"]
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)
    return get_peft_model(bare(row, precision, trained=False), config)  # type: ignore[arg-type]


def frozen_passes(model: nn.Module, row: Row, batch: Batch) -> None:
    pixels = batch.pixels()
    for _ in range(row.steps + 1):
        input_gradient(model, pixels, batch.labels, cross_entropy)


def hand_written(model: nn.Module, parameters: list[nn.Parameter], optimizer: Any, row: Row, batch: Batch) -> None:
    clean = batch.pixels()
    x = (clean + torch.empty_like(clean).uniform_(-EPS, EPS)).clamp(0, 1)
    for parameter in parameters:
        parameter.requires_grad_(False)
    for _ in range(row.steps):
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), batch.labels), x)
        x = (clean + (x.detach() + EPS / 2 * gradient.sign() - clean).clamp(-EPS, EPS)).clamp(0, 1)
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer.zero_grad()
    F.cross_entropy(model(x.detach()), batch.labels).backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def arm(name: str, row: Row, precision: str, rank: int, batch: Batch) -> Arm:
    """One adversarial step of the arm; see the top of this file."""
    kind, _, compiled = name.partition("_")
    if kind == "fulllora":
        model: nn.Module = full_lora(row, precision)
    elif kind == "peft":
        model = peft_lora(row, precision, rank)
    else:
        model = bare(row, precision, trained=kind == "full")
    model.to(batch.labels.device)
    if compiled:
        for block in (m for path, m in model.named_modules() if path.split(".")[-2:-1] == ["blocks"]):
            block.compile(dynamic=False)
    if kind == "bound":
        return partial(frozen_passes, model, row, batch)
    if kind == "fulllora":
        method = METHODS["pgd"](METHODS["pgd"].Settings(steps=row.steps), Linf(EPS), 0)  # type: ignore[call-arg]
        return partial(method.step, PlainEngine(model), batch, 0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    return partial(hand_written, model, parameters, torch.optim.AdamW(parameters), row, batch)


def saved_bytes(model: nn.Module, batch: Batch) -> int:
    """Bytes kept for the backward pass of an attack, each storage once, parameters and buffers aside."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with attack_mode(model), saved_tensors_hooks(pack, lambda tensor: tensor):
        input_gradient(model, batch.pixels(), batch.labels, cross_entropy)
    return sum(kept.values())


def timed(step: Arm, device: torch.device) -> dict[str, float]:
    """Seconds of CPU (of all threads) and by the clock; on CUDA also the rise of allocated memory in bytes."""
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    cpu, wall = time.process_time(), time.perf_counter()
    step()
    if on_cuda:
        torch.cuda.synchronize()
    taken = {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}
    return taken | ({"peak_bytes": torch.cuda.max_memory_allocated() - before} if on_cuda else {})


def summary(measured: dict[str, list[dict[str, float]]], clock: str) -> dict[str, dict[str, Any]]:
    """Medians of each arm, their spread, and the ratio to the bound."""
    arms: dict[str, dict[str, Any]] = {}
    for name, rounds in measured.items():
        arms[name] = arm = {}
        for key in rounds[0]:
            values = [one[key] for one in rounds]
            arm[key], arm[f"{key}_spread"] = statistics.median(values), [min(values), max(values)]
    for name, arm in arms.items():
        bound = arms.get("bound_compiled" if name.endswith("_compiled") else "bound")
        arm["ratio_to_bound"] = arm[clock] / bound[clock] if bound else None
    return arms


def measure(
    row: Row, names: list[str], rounds: int, precision: str, device: torch.device, tell: Callable[[int], None]
) -> dict[str, Any]:
    """One row of the file."""
    pixels = torch.randint(0, 256, (row.batch, 3, row.image_size, row.image_size), dtype=torch.uint8)
    ids = torch.arange(row.batch)
    batch = Batch(pixels, ids % CLASSES, ids, torch.ones(row.batch, dtype=torch.bool)).to(device)
    ours = full_lora(row, precision).to(device)
    rank = ours.spec.rank
    assert rank is not None
    saved = saved_bytes(ours, batch) / saved_bytes(bare(row, precision, trained=False).to(device), batch)
    arms = {name: arm(name, row, precision, rank, batch) for name in names}
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
    for i in range(rounds + 1):
        for name, step in arms.items():
            taken = timed(step, device)
            if i:  # the first round warms up and compiles
                measured[name].append(taken)
        tell(i)
    torch._dynamo.reset()
    return {
        "arms": summary(measured, "wall_s" if device.type == "cuda" else "cpu_s"),
        "saved_bytes_ratio": saved,
        "rank": rank,
    }


def conditions(args: argparse.Namespace) -> dict[str, Any]:
    """What every row of a file has in common, beside the machine."""
    return {
        "precision": args.precision,
        "rounds": args.rounds,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def begun(file: Path, device: str, common: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that the file has already.

    Raises:
        UserError: it is of another machine or of other settings.
    """
    if not file.exists():
        return []
    try:
        content = json.loads(file.read_text())
        rows, theirs = content["rows"], {"cpu": content["cpu"]}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"--output: {file} is no file of this benchmark; give another name") from None
    for key, mine in ({"cpu": device} | common).items():
        for other in [theirs] if key == "cpu" else rows:
            if other.get(key) != mine:
                raise UserError(
                    f"--output: {file} was measured with {key} {other.get(key)}, not {mine}; give another name"
                )
    return rows


def processor() -> str:
    """The name of the CPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def table(row: dict[str, Any], clock: str) -> str:
    head = (
        f"{row['backbone']}, {row['image_size']} pixels, batch {row['batch']}, PGD-{row['steps']}, {row['precision']}"
    )
    lines = [f"{head}; kept for backward {row['saved_bytes_ratio']:.3f} of the frozen backbone's"]
    for name, arm in row["arms"].items():
        low, high = arm[f"{clock}_spread"]
        ratio = arm["ratio_to_bound"]
        told = "" if ratio is None else f"  {ratio:.3f} of the bound"
        lines.append(f"  {name:<18} {arm[clock]:7.3f} s [{low:.3f}, {high:.3f}]{told}")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """Measure the rows that FILE does not have yet, and print all."""
    parser = Parser(prog="benchmark.py step", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSON file to write or continue")
    parser.add_argument("--row", action="append", metavar="BACKBONE:SIZE:BATCH:STEPS", help="default: ViT-Ti and ViT-B")
    parser.add_argument("--arms", default="bound,fulllora,peft,full", help="default: %(default)s")
    parser.add_argument("--compiled", action="store_true", help="each arm also with compiled blocks")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args(argv)
    kinds = args.arms.split(",")
    if unknown := set(kinds) - {"bound", "fulllora", "peft", "full"}:
        raise UserError(f"--arms: {min(unknown)} is unknown; known: bound, fulllora, peft, full")
    if args.rounds < 1:
        raise UserError(f"--rounds must be >= 1, got {args.rounds}")
    rows = [Row.parse(text) for text in args.row] if args.row else ROWS
    names = kinds + [f"{kind}_compiled" for kind in kinds if args.compiled]

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = torch.cuda.get_device_name() if device.type == "cuda" else processor()
    common = conditions(args)
    done = begun(args.output, machine, common)
    missing = [
        row
        for row in rows
        if not any(vars(row).items() <= one.items() and one["arms"].keys() >= {*names} for one in done)
    ]
    work = [row.work() for row in missing]
    start = time.monotonic()

    def tell(row: int, turn: int) -> None:
        made = sum(work[:row]) + work[row] * (turn + 1) / (args.rounds + 1)
        left = (time.monotonic() - start) * (sum(work) / made - 1) / 60
        place = f"row {row + 1} of {len(missing)}, round {turn} of {args.rounds}"
        print(f"{place}, about {left:.0f} minutes left", file=sys.stderr, flush=True)

    for i, row in enumerate(missing):
        measured = measure(row, names, args.rounds, args.precision, device, partial(tell, i))
        done = [one for one in done if not vars(row).items() <= one.items()] + [vars(row) | common | measured]
        write_text(args.output, json.dumps({"cpu": machine, "rows": done}, indent=1))
    clock = "wall_s" if device.type == "cuda" else "cpu_s"
    print("\n".join(table(row, clock) for row in done))
