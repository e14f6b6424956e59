"""What a run would take on a cluster: `tools/simulate.py --config FILE --nodes 64 --gpus-per-node 8 [key=value ...]`.

Passes, bytes and collectives are counted, without a GPU; what the machines do a second is assumed, or measured with
--rates. The table has every power of two of nodes up to --nodes. See docs/scaling.md, which is
`tools/simulate.py --page docs/scaling.md`.
"""

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from fulllora_dist.commands.parser import Parser
from fulllora_dist.core.atomic import atomic_write
from fulllora_dist.core.errors import UserError

if TYPE_CHECKING:
    from fulllora_dist.commands.cluster_model import Machines, Simulated
    from fulllora_dist.commands.plan_counts import RunCounts

NUMBERS: dict[str, tuple[float, str]] = {
    "tflops": (300.0, "TFLOP/s of a GPU in training; --rates has measured ones"),
    "launch-us": (8.0, "microseconds that the host takes to start an operation"),
    "latency-us": (10.0, "microseconds of a message between two nodes' GPUs"),
    "network-gbit": (400.0, "Gbit/s of a node"),
    "bucket-gbit": (100.0, "Gbit/s of the bucket for all nodes together"),
    "decode-rate": (345.0, "images a second of a data worker; tools/benchmark.py data measures it"),
    "image-kb": (110.0, "kB of an image in the bucket"),
    "price": (0.0, "price of an hour of a GPU"),
    "egress-price": (0.0, "price of 10**9 bytes from the bucket"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table, or write the page.

    Raises:
        UserError: an invalid setting or argument, which the message names.
    """
    args = _arguments().parse_intermixed_args(argv)
    for name in NUMBERS:
        value = getattr(args, name.replace("-", "_"))
        least = 0 if "price" in name else None
        if not (value > 0 or value == least) or value == float("inf"):
            raise UserError(f"--{name}: must be {'>= 0' if least == 0 else '> 0'}, got {value:g}")
    for name in ("nodes", "gpus_per_node"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}: must be >= 1, got {getattr(args, name)}")
    if args.page:
        from fulllora_dist.commands.scaling_page import page  # which imports this

        with atomic_write(args.page) as file:
            file.write(page(_machines(args)).encode())
        return
    if args.config is None:
        raise UserError("--config is not set; give the YAML file of a run, or --page FILE")
    counts = count(args.config, args.overrides)
    machines = _machines(args)
    if args.rates:
        machines, source = _with_rates(counts, machines, args.rates)
        print(f"rate: {source}")
    print(report(counts, args.nodes, args.gpus_per_node, machines))


def _arguments() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__)
    parser.add_argument("--config", metavar="FILE", help="of train.py")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that override the file's")
    parser.add_argument("--nodes", type=int, default=64, help="largest number of nodes (default: %(default)s)")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--rates", action="append", default=[], metavar="FILE", help="of tools/benchmark.py step "
                        "--output FILE, measured on one of the GPUs")  # fmt: skip
    parser.add_argument("--page", metavar="FILE", help="write docs/scaling.md with these numbers")
    for name, (default, text) in NUMBERS.items():
        parser.add_argument(
            f"--{name}", type=float, default=default, metavar="X", help=f"{text} (default: {default:g})"
        )
    return parser


def _machines(args: argparse.Namespace) -> "Machines":
    from fulllora_dist.commands.cluster_model import Machines  # torch

    machines = Machines()
    return replace(
        machines,
        flops=args.tflops * 1e12,
        launch=args.launch_us * 1e-6,
        nodes=replace(machines.nodes, latency=args.latency_us * 1e-6, rate=args.network_gbit * 1e9 / 8),
        bucket=args.bucket_gbit * 1e9 / 8,
        decode=args.decode_rate,
        image_bytes=args.image_kb * 1e3,
        price=args.price,
        egress_price=args.egress_price,
    )


def _with_rates(counts: "RunCounts", machines: "Machines", files: Sequence[str]) -> tuple["Machines", str]:
    from fulllora_dist.commands.plan import run_rate

    rate = run_rate(counts, files)
    return replace(machines, flops=rate.flops), rate.source


def count(config: str, overrides: Sequence[str]) -> "RunCounts":
    """Count the run of a config on one node.

    Raises:
        UserError: an invalid setting, or ZeRO-3.
    """
    from fulllora_dist.commands.plan_counts import count_run  # torch
    from fulllora_dist.config.load import load_config

    settings = load_config(config, overrides)
    if settings.distributed.zero_stage == 3:
        raise UserError(
            "distributed.zero_stage: 3 is not simulated, as its gathers overlap with the passes; use 0 to 2"
        )
    return count_run(settings, ranks=1)


def report(counts: "RunCounts", nodes: int, gpus_per_node: int, machines: "Machines") -> str:
    """The run on each power of two of nodes, as text.

    Raises:
        UserError: not even one node divides the batch.
    """
    from fulllora_dist.commands.cluster_model import requests_an_epoch

    runs = simulated(counts, nodes, gpus_per_node, machines)
    epochs = counts.config.optim.epochs * counts.phases.total_steps / counts.phases.total_updates
    gb = counts.images * machines.image_bytes / 1e9
    return "\n".join(
        [
            f"{counts.model.info.name}, {counts.config.method.name}, global batch {counts.config.optim.batch_size}, "
            f"ZeRO-{counts.config.distributed.zero_stage}",
            *_table(runs, machines),
            f"an epoch takes {requests_an_epoch(counts):,} requests and {gb:,.0f} GB from a bucket; the run draws "
            f"{epochs:g} epochs",
            where_it_stops(runs),
        ]
    )


def simulated(counts: "RunCounts", nodes: int, gpus_per_node: int, machines: "Machines") -> list["Simulated"]:
    """The run on each power of two of nodes whose ranks divide the batch."""
    from fulllora_dist.commands.cluster_model import simulate

    parts = counts.config.optim.batch_size // counts.config.distributed.gradient_accumulation_steps
    numbers = [2**i for i in range(nodes.bit_length()) if 2**i <= nodes]
    fits = [n for n in dict.fromkeys([*numbers, nodes]) if parts % (n * gpus_per_node) == 0]
    if not fits:
        raise UserError(f"optim.batch_size: must be divisible by {gpus_per_node} ranks, got micro-batches of {parts}")
    return [simulate(counts, n, gpus_per_node, machines) for n in fits]


def _table(runs: Sequence["Simulated"], machines: "Machines") -> list[str]:
    cost = machines.price or machines.egress_price
    lines = [
        "| GPUs | images a GPU | step | passes | of it launching | collectives | waiting for | guard | start | hours | "
        "GPU-hours | efficiency |" + " cost |" * bool(cost),
        "|---" * (12 + bool(cost)) + "|",
    ]
    for run in runs:
        waits = f"{_ms(run.waiting)} {run.waits_for}" if run.waiting > 5e-5 else "-"
        lines.append(
            f"| {run.gpus} | {run.images} | {_ms(run.step)} | {_ms(run.compute)} | {_ms(run.launching)} | "
            f"{_ms(run.exposed)} | {waits} | {run.guard:.0%} | {run.start:.0f} s | {run.hours:.2f} | "
            f"{run.gpu_hours:.1f} | {run.efficiency:.0%} |" + f" {run.cost:,.0f} |" * bool(cost)
        )
    return lines


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms"


def where_it_stops(runs: Sequence["Simulated"]) -> str:
    """The last doubling that still makes the run at least a third shorter, and what is in the way of the next."""
    for before, after in itertools.pairwise(runs):
        if before.hours / after.hours < 1.5:
            parts = {
                "starting operations": after.launching,
                "the collectives of the updates": after.exposed,
                f"waiting for the {after.waits_for}": after.waiting,
                "the start": after.start * after.step / (3600 * after.hours),
            }
            most = max(parts, key=lambda name: parts[name])
            return (
                f"it stops scaling at {before.gpus} GPUs: {after.gpus} take {after.hours / before.hours:.0%} of the "
                f"time; most of what is lost is {most}"
            )
    return f"it scales to {runs[-1].gpus} GPUs: each doubling makes the run at least a third shorter"
