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


def add_num_samples(arguments: argparse.ArgumentParser) -> None:
    """Add --num-samples (not --n, which DeepSpeed's launcher would take for an abbreviation of its own options)."""
    arguments.add_argument(
        "--num-samples", metavar="N", help="evaluation.num_samples: number of images, drawn evenly over the classes"
    )
