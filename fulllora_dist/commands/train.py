"""Adversarial finetuning: `deepspeed --num_gpus N fulllora_dist/train.py --config FILE [key=value ...]`.

One process: `python fulllora_dist/train.py --config FILE`. Re-running the same command resumes an interrupted run.
"""

from collections.abc import Sequence

from fulllora_dist.commands.arguments import add_dry_run, check_dry_run, parser
from fulllora_dist.commands.entry import on_interrupt
from fulllora_dist.config.load import load_config
from fulllora_dist.distributed.launcher import is_main_process, join_launcher, say, world_size
from fulllora_dist.storage.store import stop_retrying
from fulllora_dist.training.inputs import check_inputs
from fulllora_dist.training.resume import check_saved, check_unlocked


def main(argv: Sequence[str] | None = None) -> int:
    """Train according to the command line. The exit code is 128 + the signal number if a signal ended the run.

    What is checked first needs no torch, and is refused within a second or two; nothing is written before all has been.
    """
    join_launcher()
    arguments = parser(__doc__ or "")
    add_dry_run(arguments, "training")
    arguments.add_argument(
        "--profile",
        type=int,
        default=0,
        metavar="N",
        help="record N batches, after 3 others, in run.output_dir/profile, and train on",
    )
    args = arguments.parse_intermixed_args(argv)
    if args.profile < 0:
        arguments.error(f"--profile must be >= 0, got {args.profile}")
    check_dry_run(arguments, args)
    config = load_config(args.config, args.overrides)
    if args.dry_run:
        stop_retrying()
        if is_main_process():
            from fulllora_dist.commands.plan import Prices, estimate

            print(estimate(config, prices=Prices(args.rates, args.memory_gb, args.price)))
        return 0
    with on_interrupt(lambda: "nothing was changed"):
        check_inputs(config, world_size())
        check_unlocked(config, say)
        check_saved(config)
        from fulllora_dist.training.run import train  # torch

    return train(config, args.profile)
