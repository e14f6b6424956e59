"""Arguments shared by several commands."""

import argparse
from typing import Any

from fulllora_dist.commands.parser import Parser


class _HelpSettings(argparse.Action):
    """--help-settings: print all settings, and exit."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from fulllora_dist.config.describe import describe_settings  # --help need not wait

        print("settings (in the file, or as key=value arguments):\n" + describe_settings())
        parser.exit()


def parser(description: str) -> argparse.ArgumentParser:
    """Create a parser with the arguments shared by train.py and evaluate.py."""
    result = Parser(
        description=description,
    )
    result.add_argument(
        "--config", required=True, metavar="FILE", help="YAML file with settings; see configs/ for examples"
    )
    result.add_argument(
        "--help-settings", action=_HelpSettings, nargs=0, help="explain all settings of FILE and key=value, and exit"
    )
    result.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    result.add_argument("overrides", nargs="*", metavar="key=value", help="settings that override the file's")
    return result


def add_dry_run(arguments: argparse.ArgumentParser, instead: str) -> None:
    """Add --dry-run, which takes the place of `instead`, and what it can be told of the machines."""
    arguments.add_argument(
        "--dry-run", action="store_true", help=f"check the settings and estimate the cost without {instead}"
    )
    group = arguments.add_argument_group("with --dry-run")
    group.add_argument(
        "--rates", action="append", default=[], metavar="FILE", help="measured rates, of tools/benchmark.py step "
        "--output FILE; once for bf16 and once for fp32, in which evaluations are made",
    )  # fmt: skip
    group.add_argument(
        "--memory-gb", type=float, metavar="GB", help="memory of a GPU, 10**9 bytes (default: 80 and 141)"
    )
    group.add_argument("--price", type=float, metavar="X", help="price of an hour of a GPU")


def check_dry_run(arguments: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse options of --dry-run without it, and numbers that are none of a machine's."""
    given = {"--rates": args.rates or None, "--memory-gb": args.memory_gb, "--price": args.price}
    for name, value in given.items():
        if value is not None and not args.dry_run:
            arguments.error(f"{name} is an option of --dry-run; add that")
    for name in ("--memory-gb", "--price"):
        if given[name] is not None and not 0 < given[name] < float("inf"):
            arguments.error(f"{name} must be > 0, got {given[name]:g}")


def add_num_samples(arguments: argparse.ArgumentParser) -> None:
    """Add --num-samples (not --n, which DeepSpeed's launcher would take for an abbreviation of its own options)."""
    arguments.add_argument(
        "--num-samples", metavar="N", help="evaluation.num_samples: number of images, drawn evenly over the classes"
    )
