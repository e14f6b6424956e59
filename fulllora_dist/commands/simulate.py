"""What a run would take on a cluster: `tools/simulate.py --config FILE --nodes 64 --gpus-per-node 8 [key=value ...]`.

Passes, bytes and collectives are counted, without a GPU; what the machines do a second is assumed, or measured with
--rates. The table has every power of two of nodes up to --nodes. See docs/scaling.md, which is
`tools/simulate.py --page docs/scaling.md`.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fulllora_dist.commands.parser import Parser
from fulllora_dist.core.atomic import write_text
from fulllora_dist.core.errors import UserError

if TYPE_CHECKING:
    from fulllora_dist.commands.cluster_model import Machines
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
        if args.config or args.overrides or args.rates:
            raise UserError(
                "--page is of three backbones at the given numbers; leave out --config, --rates and settings"
            )
        from fulllora_dist.commands.scaling import page

        write_text(Path(args.page), page(_machines(args)))
        return
    if args.config is None:
        raise UserError("--config is not set; give the YAML file of a run, or --page FILE")
    from fulllora_dist.commands.scaling import count, report  # torch

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
    from fulllora_dist.commands.cluster_model import Machines, Network  # torch

    return Machines(
        flops=args.tflops * 1e12,
        launch=args.launch_us * 1e-6,
        nodes=Network(args.latency_us * 1e-6, args.network_gbit * 1e9 / 8, trees=True),
        local=Network(3e-6, 300e9, trees=True),
        host=Network(30e-6, 1e9, asks=True),
        bucket=args.bucket_gbit * 1e9 / 8,
        decode=args.decode_rate,
        image_bytes=args.image_kb * 1e3,
        imports=30.0,
        price=args.price,
        egress_price=args.egress_price,
    )


def _with_rates(counts: "RunCounts", machines: "Machines", files: Sequence[str]) -> tuple["Machines", str]:
    from fulllora_dist.commands.plan import run_rate

    rate = run_rate(counts, files)
    return replace(machines, flops=rate.flops), rate.source
