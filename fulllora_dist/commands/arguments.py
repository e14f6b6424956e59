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


def add_num_samples(arguments: argparse.ArgumentParser) -> None:
    """--num-samples (DeepSpeed's launcher would take --n for one of its own options)."""
    arguments.add_argument(
        "--num-samples", metavar="N", help="evaluation.num_samples: images, drawn evenly over the classes"
    )
