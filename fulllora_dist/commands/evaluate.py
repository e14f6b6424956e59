"""Robust accuracy: `deepspeed --num_gpus N fulllora_dist/evaluate.py --config FILE --adapter WHERE [key=value ...]`.

One process: `python fulllora_dist/evaluate.py --config FILE --adapter WHERE`. WHERE is a folder, or a version
in MLflow, e.g. models:/NAME@champion. Without --adapter the bare backbone of the config is evaluated. An adapter has
its own backbone, which must match the config. The images are those of data.validation. Prints a table, and writes the
counts with --output.
"""

import argparse
import importlib.util
import os
from collections.abc import Sequence
from typing import get_args

from fulllora_dist.attacks.settings import Norm
from fulllora_dist.commands.arguments import add_dry_run, add_num_samples, check_dry_run, parser
from fulllora_dist.config.load import load_config
from fulllora_dist.config.schema import Config
from fulllora_dist.core.errors import UserError
from fulllora_dist.distributed.launcher import is_main_process, join_launcher
from fulllora_dist.models.adapter_address import DESCRIPTION, instead_of
from fulllora_dist.storage.store import stop_retrying
from fulllora_dist.training.inputs import check_evaluated, check_evaluation, load_index

ROBUSTBENCH_IMAGES = 5000


def check_inputs(config: Config, adapter: str | None, output: str | None = None, preset: str | None = None) -> str:
    """Check the inputs before the process group is set up. Returns the folder of shards.

    Args:
        adapter, output, preset: arguments of the command line.

    Raises:
        UserError: an invalid setting or argument, which the message names.
    """
    check_evaluation(config)
    folder = config.data.validation
    if folder is None:
        raise UserError("data.validation is not set; set it to the folder of shards to evaluate on")
    images = check_evaluated(config, load_index(folder, "data.validation"))
    if preset and images != ROBUSTBENCH_IMAGES:
        raise UserError(
            f"--ids: {config.evaluation.ids} names {images:,} images; --preset {preset} needs RobustBench's "
            f"{ROBUSTBENCH_IMAGES:,} of ImageNet"
        )
    from fulllora_dist.evaluation.output import check_output  # --help need not wait for torch
    from fulllora_dist.models.adapter_file import read_description
    from fulllora_dist.models.rebuild import check_model
    from fulllora_dist.registry.address import in_mlflow

    if output is not None:
        check_output(output)
    if adapter is not None and not in_mlflow(adapter) and "://" not in adapter:
        if not os.path.exists(os.path.join(adapter, DESCRIPTION)):
            raise UserError(f"--adapter: {adapter} has no {DESCRIPTION}; {instead_of(adapter)}")
        check_model(config.model, read_description(adapter).backbone, adapter)
    return folder


def _other_norm(args: argparse.Namespace) -> bool:
    """Whether the command line changes the norm of the config, which makes the config's eps meaningless."""
    given = [override for override in args.overrides if override.startswith("threat.norm=")]
    given += [f"threat.norm={args.norm}"] if args.norm else []
    others = [override for override in args.overrides if not override.startswith("threat.")]
    name = given[-1].partition("=")[2] if given else None  # one that is unknown is refused with the config
    return name in get_args(Norm) and load_config(args.config, others).threat.norm != name


_OF_PRESET = {
    *("threat.norm", "threat.eps"),
    *(f"evaluation.{name}" for name in ("attacks", "eps", "norms", "num_samples", "first", "ids")),
}


def _apply_preset(args: argparse.Namespace) -> None:
    """Set what RobustBench asks of an entry of its ImageNet leaderboard.

    Raises:
        UserError: an argument that says otherwise, or no list of images.
    """
    for name in ("attacks", "eps", "norm", "norms", "num_samples", "first"):
        if getattr(args, name) is not None:
            raise UserError(f"--{name.replace('_', '-')}: --preset {args.preset} has its own; leave one of them out")
    for key in (override.partition("=")[0].strip() for override in args.overrides):
        if key == "evaluation.ids":
            raise UserError(f"{key}: with --preset {args.preset} give --ids")
        if key in _OF_PRESET:
            raise UserError(f"{key}: --preset {args.preset} has its own; leave one of them out")
        if any(name.startswith(f"{key}.") for name in _OF_PRESET):
            raise UserError(f"{key}: --preset {args.preset} sets some of it; write the others as {key}.NAME=...")
    args.attacks, args.norm, args.eps = "clean,autoattack", "linf", "4/255"
    if args.ids is None:
        package = importlib.util.find_spec("robustbench")
        if package is None or package.origin is None:
            raise UserError(
                f"--preset {args.preset}: its list of 5,000 images is in the package robustbench, which is not "
                "installed; give --ids imagenet_test_image_ids.txt"
            )
        args.ids = os.path.join(os.path.dirname(package.origin), "helper_files", "imagenet_test_image_ids.txt")


def read_arguments(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, Config]:
    """Parse the command line, and load the config with its overrides.

    Raises:
        UserError: an invalid setting or argument, which the message names.
    """
    arguments = parser(__doc__ or "")
    arguments.add_argument(
        "--adapter",
        metavar="WHERE",
        help="a folder, models:/NAME@ALIAS or models:/NAME/VERSION; default: the bare backbone",
    )
    arguments.add_argument(
        "--attacks",
        metavar="A,B",
        help="evaluation.attacks: clean, fgsm, pgdK, cwK, dlrK, pgdKxR with R restarts, autoattack, apgd-ce+square, "
        "transfer:ADAPTER",
    )
    add_num_samples(arguments)
    arguments.add_argument("--first", metavar="N", help="evaluation.first: the first N images")
    arguments.add_argument("--ids", metavar="FILE", help="evaluation.ids: a file with one id or image name per line")
    arguments.add_argument("--eps", metavar="K/255,...", help="threat.eps; further ones are evaluation.eps")
    arguments.add_argument("--norm", metavar="NORM", help="threat.norm: linf, l2 or l1")
    arguments.add_argument("--norms", metavar="N=EPS,...", help="evaluation.norms: further norms, e.g. l2=2,l1=255")
    arguments.add_argument(
        "--preset",
        choices=["robustbench"],
        help="RobustBench's 5,000 images of ImageNet, linf, 4/255, the standard AutoAttack; --ids names the list where "
        "its package is not installed",
    )
    arguments.add_argument(
        "--output",
        metavar="FILE",
        help="path of evaluation.json, with figures next to it; the same command resumes after a kill. Default: only "
        "the table",
    )
    add_dry_run(arguments, "evaluating")
    args = arguments.parse_intermixed_args(argv)
    check_dry_run(arguments, args)
    for name in ("attacks", "num_samples", "first", "ids", "eps", "norm", "norms", "output"):
        given = getattr(args, name)
        parts = given.split(",") if given and name in ("attacks", "eps", "norms") else [given]
        if given is not None and not all(part.strip() for part in parts):
            raise UserError(
                f"--{name.replace('_', '-')}: must not have empty values, got {given!r}; complete or remove it"
            )
    if args.preset:
        _apply_preset(args)
    eps, *more = args.eps.split(",") if args.eps else (None,)
    other_norm = _other_norm(args)
    if other_norm and eps is None and not any(override.startswith("threat.eps=") for override in args.overrides):
        raise UserError("threat.norm: eps of different norms are not comparable; give --eps too")
    short = {
        "evaluation.attacks": args.attacks and f"[{args.attacks}]",
        "evaluation.num_samples": "null" if args.preset else args.num_samples,
        "evaluation.first": "null" if args.preset else args.first,
        "evaluation.ids": args.ids,
        "threat.eps": eps,
        "evaluation.eps": f"[{','.join(more)}]" if more or other_norm or args.preset else None,
        "threat.norm": args.norm,
        "evaluation.norms": "[]" if args.preset else args.norms and f"[{args.norms}]",
    }
    overrides = [f"{key}={value}" for key, value in short.items() if value is not None]
    return args, load_config(args.config, [*args.overrides, *overrides])


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate according to the command line. What is checked first needs no torch."""
    join_launcher()
    args, config = read_arguments(argv)
    if args.dry_run:
        stop_retrying()
    folder = check_inputs(config, args.adapter, args.output, args.preset)
    if args.dry_run:
        if is_main_process():
            from fulllora_dist.commands.plan import Prices, estimate_evaluation  # torch

            print(estimate_evaluation(config, Prices(args.rates, args.memory_gb, args.price)))
        return
    from fulllora_dist.commands.evaluation import evaluate  # torch

    evaluate(config, folder, args.adapter, args.output)
