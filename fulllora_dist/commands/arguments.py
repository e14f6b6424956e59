"""Arguments shared by several commands."""

import argparse

from fulllora_dist.commands.parser import Parser
from fulllora_dist.config.describe import describe_settings


def parser(description: str) -> argparse.ArgumentParser:
    """Create a parser with the arguments shared by train.py and evaluate.py."""
    result = Parser(
        description=description,
        epilog="settings (in the file, or as key=value arguments):\n" + describe_settings(),
    )
    result.add_argument(
        "--config", required=True, metavar="FILE", help="YAML file with settings; see configs/ for examples"
    )
    result.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    result.add_argument("overrides", nargs="*", metavar="key=value", help="settings that override the file's")
    return result


def add_num_samples(arguments: argparse.ArgumentParser) -> None:
    """Add --num-samples (not --n, which DeepSpeed's launcher would take for an abbreviation of its own options)."""
    arguments.add_argument(
        "--num-samples", metavar="N", help="evaluation.num_samples: number of images, drawn evenly over the classes"
    )
