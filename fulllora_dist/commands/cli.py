"""Every command under one name: `fulllora train --config FILE`. `fulllora COMMAND --help` lists its arguments.

On several ranks, start the scripts instead: deepspeed --num_gpus N PACKAGE/train.py --config FILE.
"""

import importlib
import sys

from fulllora_dist.commands.entry import run_entry
from fulllora_dist.core.errors import UserError

# {command: (module and function, what it is)}
COMMANDS = {
    "train": ("train:main", "adversarial finetuning"),
    "evaluate": ("evaluate:main", "robust accuracy of an adapter or a backbone"),
    "shards": ("shards:make", "images to WebDataset shards with their index"),
    "index": ("shards:index", "an index of shards that are there"),
    "adapters": ("adapters:main", "the adapters of an MLflow store"),
    "compare": ("compare:main", "the difference between two evaluations"),
    "launch": ("launch:main", "runs on a SLURM cluster"),
    "sync": ("sync:main", "to MLflow what a run could not send"),
    "study": ("study:main", "arms, tries and seeds, and tables with paired intervals"),
}


def dispatch() -> int | None:
    """Run the command that the command line names."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return None
    name, *rest = arguments
    if name == "--version":
        from fulllora_dist import __version__

        print(f"fulllora {__version__}")
        return None
    if name not in COMMANDS:
        from fulllora_dist.core.suggest import suggestion

        raise UserError(f"fulllora {name}: unknown command; {suggestion(name, list(COMMANDS))}")
    module, _, function = COMMANDS[name][0].partition(":")
    sys.argv = [f"fulllora {name}", *rest]
    main = getattr(importlib.import_module(f"fulllora_dist.commands.{module}"), function)
    code: int | None = main()
    return code


def _help() -> str:
    lines = [f"  {name:<10}{what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(["usage: fulllora COMMAND ...", "", *lines, "", (__doc__ or "").strip()])


def main() -> None:
    """The console script."""
    run_entry(dispatch)


if __name__ == "__main__":
    main()
