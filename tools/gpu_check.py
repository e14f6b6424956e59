"""What the program does on a GPU, in a few minutes, the most valuable figures first.

    python tools/gpu_check.py --minutes 8 --output gpu

writes gpu/results.jsonl, a line for each figure as soon as it is known, and gpu/table.md, the table and the checks for
docs/performance.md. Parts, each in a process of its own, so that one that fails or crashes costs no other; what is
missing is recorded with its reason:

    machine    names and versions
    matmul     rate of a large product in bf16 and fp32, which the other rates are relative to
    step       one adversarial step of each arm of `benchmark.py step` on ViT-B, L and H: time, memory, FLOPs
    nccl       collectives of one rank
    zero       training at ZeRO 0 to 3 against plain PyTorch (needs DeepSpeed)
    bf16       logits and input gradients in bf16 against fp32
    compile    compiled blocks against eager ones
    compiled   the steps again, with compiled blocks

The exit code is 1 where something is missing or wrong. Without a GPU it does the same on the CPU with a tiny model, to
show that it works.
"""

import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import gpu_parts
import torch
from gpu_parts import Put, attempt

from fulllora_dist.commands.parser import Parser
from fulllora_dist.core.errors import UserError

ROWS = {
    "cuda": ["vit_base_patch16_224:224:64:3", "vit_large_patch16_224:224:64:3", "vit_huge_patch14_224:224:64:3"],
    "cpu": ["vit_tiny_patch16_224:32:2:1"],
}
ARMS = ("bound", "fulllora", "peft", "full")
PARTS = ("machine", "matmul", "step", "nccl", "zero", "bf16", "compile", "compiled")
FORK = multiprocessing.get_context("fork")  # shares the imports
_LEAST_SECONDS = 5  # that a part is worth starting for


def has_gpu() -> bool:
    """Asked in another process: one that has touched a GPU must not fork."""
    process = FORK.Process(target=lambda: sys.exit(not torch.cuda.is_available()))
    process.start()
    process.join()
    return process.exitcode == 0


def run_part(file: Path, part: str, work: Callable[[Put], None], limit: float) -> None:
    """Run a part in a process of its own, for at most `limit` seconds."""

    def put(name: str, **figures: Any) -> None:
        with file.open("a") as lines:
            lines.write(json.dumps({"part": part, "name": name, **figures}) + "\n")
        print(f"{part}: {name} {figures}", file=sys.stderr, flush=True)

    if limit < _LEAST_SECONDS:
        put(part, error="not started: no time was left")
        return
    process = FORK.Process(target=attempt, args=(put, part, partial(work, put)))
    process.start()
    process.join(limit)
    if process.is_alive():
        process.kill()
        process.join()
        put(part, error=f"stopped after {limit:.0f} s: no time was left")
    elif process.exitcode:
        put(part, error=f"the process ended with code {process.exitcode}")


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown of what is known so far."""
    rate = next((line["tflops"] for line in lines if line["part"] == "matmul" and line["name"] == "bf16"), None)
    steps = [line for line in lines if "images_per_second" in line]
    bounds = {(line["row"], line["compiled"]): line["seconds"] for line in steps if line["name"] == "bound"}
    rows = [
        [
            line["row"],
            line["name"] + (", compiled" if line["compiled"] else ""),
            f"{1000 * line['seconds']:.0f} ({1000 * line['spread'][0]:.0f} to {1000 * line['spread'][1]:.0f})",
            f"{line['seconds'] / bound:.2f}" if (bound := bounds.get((line["row"], line["compiled"]))) else "",
            f"{line['images_per_second']:.0f}",
            f"{line['peak_gib']:.1f}" if "peak_gib" in line else "",
            f"{line['tflops']:.3g}" if rate is None else f"{line['tflops']:.3g} ({line['tflops'] / rate:.0%})",
        ]
        for line in steps
    ]
    head = ["backbone:pixels:batch:PGD steps", "arm", "ms a step", "to the bound", "images/s", "peak GiB", "TFLOP/s"]
    text = ["One adversarial step in bf16; TFLOP/s also as a share of the measured matmul rate.", ""]
    text += ["\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows]), ""] if rows else []
    for line in (line for line in lines if line not in steps):
        known = {key: value for key, value in line.items() if key not in ("part", "name", "ok", "error")}
        figures = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in known.items())
        verdict = "" if "ok" not in line else "ok, " if line["ok"] else "**WRONG**, "
        error = f"missing: {line['error']}" if "error" in line else ""
        text.append(f"- {line['part']}, {line['name']}: {verdict}{', '.join(filter(None, (figures, error)))}")
    return "\n".join(text) + "\n"


def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts together (default: 8)")
    parser.add_argument("--row", action="append", metavar="BACKBONE:SIZE:BATCH:STEPS", help="default: ViT-B, L and H")
    parser.add_argument("--arms", default="bound,fulllora,full", help="default: %(default)s; peft too if installed")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of them (default: all)")
    args = parser.parse_args()
    chosen = args.parts.split(",")
    if unknown := {*chosen} - {*PARTS}:
        raise UserError(f"--parts: {min(unknown)} is unknown; known: {', '.join(PARTS)}")
    if unknown := {*args.arms.split(",")} - {*ARMS}:
        raise UserError(f"--arms: {min(unknown)} is unknown; known: {', '.join(ARMS)}")
    if args.minutes <= 0:
        raise UserError(f"--minutes must be > 0, got {args.minutes:g}")
    end = time.monotonic() + 60 * args.minutes
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / "results.jsonl"
    file.write_text("")
    with suppress(ImportError):
        import benchmark_step  # noqa: F401  # once for all parts
    rows, arms = args.row or ROWS["cuda" if has_gpu() else "cpu"], args.arms.split(",")
    parts: list[tuple[str, Callable[[Put], None]]] = [("machine", gpu_parts.machine), ("matmul", gpu_parts.matmul)]
    parts += [("step", partial(gpu_parts.step, row=row, arms=arms, compiled=False)) for row in rows]
    parts += [("nccl", gpu_parts.nccl), ("zero", gpu_parts.zero), ("bf16", partial(gpu_parts.bf16, row=rows[0]))]
    parts += [("compile", partial(gpu_parts.compile_, row=rows[0]))]
    parts += [("compiled", partial(gpu_parts.step, row=row, arms=arms, compiled=True)) for row in rows]
    for name, work in (part for part in parts if part[0] in chosen):
        run_part(file, name, work, end - time.monotonic())
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        (args.output / "table.md").write_text(table(lines))
    print((args.output / "table.md").read_text())
    return 1 if any("error" in line or line.get("ok") is False for line in lines) else 0


if __name__ == "__main__":
    try:  # not commands/entry.py, which needs more than torch
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
