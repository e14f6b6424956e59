"""Where robustness sits: the size of each branch beside W, and the accuracy lost when branches are switched off.

    deepspeed --num_gpus N tools/where_robustness_sits.py --config FILE --adapter FOLDER --attack pgd10 \\
        --num-samples 200

One process: `python tools/where_robustness_sits.py ...`. Adversarial examples are made anew against each model whose
branches are off. Prints a table, and writes where.json with where.png beside it. The same command resumes after a kill.
"""

import argparse
import json
import os
from collections.abc import Sequence
from typing import Any

from fulllora_dist.commands.arguments import add_num_samples, parser
from fulllora_dist.commands.entry import on_interrupt, run_entry
from fulllora_dist.commands.evaluate import check_inputs
from fulllora_dist.config.load import load_config
from fulllora_dist.config.schema import Config
from fulllora_dist.core.errors import UserError
from fulllora_dist.training.inputs import check_evaluation


def read_arguments(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, Config]:
    """The command line, and the config with what the command line says of it.

    Raises:
        UserError: naming the setting.
    """
    arguments = parser(__doc__ or "")
    arguments.add_argument("--adapter", metavar="WHERE", required=True, help="a folder, or models:/NAME@ALIAS")
    arguments.add_argument("--attack", metavar="NAME", default="pgd10", help="of evaluate.py's (default: pgd10)")
    add_num_samples(arguments)
    arguments.add_argument(
        "--by",
        default="component,block",
        metavar="A,B",
        help="what is switched off at a time: component, block or branch (default: component,block)",
    )
    arguments.add_argument("--output", metavar="FILE", default="where.json", help="default: where.json")
    args = arguments.parse_intermixed_args(argv)
    from fulllora_dist.evaluation.where import parse_by  # --help need not wait for torch

    args.by = parse_by(args.by)
    if args.attack == "clean" or "," in args.attack:
        raise UserError(f"--attack: {args.attack}; clean is always measured, name one that changes images")
    if not args.output.endswith(".json"):
        raise UserError(f"--output: {args.output} must end in .json; the figure goes beside it")
    # of symptoms of masked gradients evaluate.py has told: here they would be looked for in each variant
    short = [f"evaluation.attacks=[clean,{args.attack}]", "evaluation.eps=[]", "evaluation.gradient_masking_samples=0"]
    short += [f"evaluation.num_samples={args.num_samples}"] if args.num_samples is not None else []
    return args, load_config(args.config, [*args.overrides, *short])


def _check_replaced(output: str) -> None:
    if not os.path.exists(output):
        return
    try:
        with open(output, "rb") as file:
            ours = "off" in json.load(file)
    except (OSError, ValueError, TypeError):
        ours = False
    if not ours:
        raise UserError(f"--output: {output} does not hold results of this tool; name another file")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure as the command line says."""
    args, config = read_arguments(argv)
    folder = check_inputs(config, args.adapter, args.output)
    _check_replaced(args.output)
    from fulllora_dist.commands.evaluation import kept

    with on_interrupt(lambda: kept(args.output)):
        _measure(args, config, folder)


def _measure(args: argparse.Namespace, config: Config, folder: str) -> None:
    from fulllora_dist.commands.evaluation import build_evaluated
    from fulllora_dist.distributed.comm import start_comm, stop_comm
    from fulllora_dist.evaluation.report import write_evaluation
    from fulllora_dist.evaluation.where import where_robustness_sits
    from fulllora_dist.evaluation.where_report import where_figure, where_table
    from fulllora_dist.registry.address import resolved
    from fulllora_dist.training.build import build_eval_stream, build_evaluator

    comm = start_comm(config.distributed.timeout_minutes)
    adapter = comm.broadcast(comm.run_on_rank0(lambda: resolved(args.adapter, config.tracking_uri())))
    model = comm.run_on_all(lambda: build_evaluated(config, adapter)).to(comm.device)
    stream = build_eval_stream(config, folder, model, comm, subset=check_evaluation(config))
    evaluator = comm.run_on_all(lambda: build_evaluator(config, model.info, comm, adapter))

    def write(results: dict[str, Any]) -> None:
        print(where_table(results), flush=True)
        write_evaluation(results, args.output)
        where_figure(results, args.output)

    where_robustness_sits(model, evaluator, stream, args.by, f"{args.output}.partial", write)
    stop_comm()


if __name__ == "__main__":
    run_entry(main)
