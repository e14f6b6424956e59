"""Arguments that several commands share."""

import argparse

from fulllora_dist.config.describe import describe_settings


def parser(description: str) -> argparse.ArgumentParser:
    """Arguments that train.py and evaluate.py share."""
    result = argparse.ArgumentParser(
        description=description,
        epilog="settings (in the file, or as key=value arguments):\n" + describe_settings(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument(
        "--config", required=True, metavar="FILE", help="YAML file of settings; ready ones are in configs/"
    )
    result.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    result.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file's")
    return result


def add_number(arguments: argparse.ArgumentParser) -> None:
    """--n, with a name that DeepSpeed's launcher does not take for one of its own."""
    arguments.add_argument(
        "--n",
        "--pictures",
        metavar="N",
        help="evaluation.n: pictures, drawn evenly over the classes (--pictures under the deepspeed launcher, which "
        "refuses --n as short for several options of its own)",
    )
