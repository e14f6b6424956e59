"""The adapters of an MLflow store: list, compare, publish, promote and download them.

    fulllora adapters list [NAME]                            registered models, or the versions of one
    fulllora adapters show NAME@champion                     everything about a version
    fulllora adapters diff NAME@champion NAME/4              settings, accuracy with paired intervals, layers
    fulllora adapters publish runs/x/adapter --evaluation runs/x/evaluation.json
    fulllora adapters promote NAME/4 [--force REASON]        make it @champion, if it passes the gate
    fulllora adapters rollback NAME                          @previous becomes @champion again
    fulllora adapters pull NAME@champion FOLDER              download an adapter, as evaluate.py --adapter takes it
    fulllora adapters export NAME@champion FOLDER --name Mine2026FullLoRA  for RobustBench's model zoo
    fulllora adapters predict NAME@champion IMAGES --output predictions.jsonl

The store is MLFLOW_TRACKING_URI, or --uri. --json prints one JSON object. Exit codes: 0; 1 if the gate refuses or
another promotion came first; 2 for bad input. docs/registry.md explains the gate.
"""

import argparse
import json
import logging
from collections.abc import Callable
from typing import Any

from fulllora_dist.commands.entry import on_interrupt
from fulllora_dist.commands.parser import Parser

_KEPT = {
    "publish": "re-run the same command to finish",
    "promote": "`fulllora adapters list NAME` shows whether @champion has moved",
    "rollback": "`fulllora adapters list {name}` shows whether @champion has moved",
    "pull": "{folder} may be incomplete",
    "export": "{folder} may be incomplete",
    "predict": "finished lines are kept in {output}; re-run the same command to resume",
}
"""What an interrupted command leaves; the others change nothing."""


def _parser() -> Parser:
    shared = Parser(add_help=False)
    shared.add_argument("--uri", help="MLflow tracking URI (default: MLFLOW_TRACKING_URI)")
    shared.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, meaning: str) -> Parser:
        return commands.add_parser(name, help=meaning, description=meaning, parents=[shared])

    version: dict[str, Any] = {"metavar": "VERSION", "help": "NAME@ALIAS or NAME/NUMBER"}
    one = command("list", "list registered models, or the versions of one")
    one.add_argument("name", nargs="?", metavar="NAME", help="of a registered model")
    command("show", "show everything about a version").add_argument("version", **version)
    one = command("diff", "show how B differs from A: settings, accuracy with paired intervals, layers")
    for name in "ab":
        one.add_argument(name, **version | {"metavar": name.upper()})
    one = command("publish", "make an adapter a version, with its evaluation; safe to repeat")
    one.add_argument("folder", metavar="FOLDER", help="what save_adapter wrote")
    one.add_argument("--evaluation", metavar="FILE", help="its evaluation.json (evaluate.py --output)")
    one.add_argument("--name", help="registered model (default: BACKBONE-DATA-NORM-EPS)")
    one.add_argument("--data", metavar="NAME", help="name of the data set, if the adapter does not record it")
    one.add_argument("--run", metavar="ID", help="MLflow run that it comes from")
    one = command("promote", "make a version @champion, if it passes the gate")
    one.add_argument("version", **version)
    one.add_argument("--margin", type=float, default=0.01, help="loss of robust accuracy to exclude (default: 0.01)")
    one.add_argument("--clean-floor", type=float, default=0.5, help="lowest clean accuracy (default: 0.5)")
    one.add_argument("--force", metavar="REASON", help="overrule the gate; the reason is kept with the version")
    one.add_argument("--dry-run", action="store_true", help="only print the gate's verdict")
    one = command("rollback", "make @previous the champion again")
    one.add_argument("name", metavar="NAME", help="of the registered model")
    one.add_argument("--reason", help="kept with the version that is left")
    one = command("pull", "download an adapter")
    one.add_argument("version", **version)
    one.add_argument("folder", metavar="FOLDER", help="empty or not yet there")
    one = command("export", "write the whole network and its entry for RobustBench's model zoo")
    one.add_argument("version", metavar="ADAPTER", help="NAME@ALIAS, NAME/NUMBER, or an adapter's folder")
    one.add_argument("folder", metavar="FOLDER", help="for NAME.pt and NAME.py, such as models/imagenet/Linf")
    one.add_argument("--name", required=True, help="in the model zoo, such as Mine2026FullLoRA")
    one.add_argument("--checkpoint", metavar="FILE", help="the backbone's weights, if they have moved since training")
    one = command("predict", "classify a folder of images, or shards; re-run the same command to resume")
    one.add_argument("version", metavar="ADAPTER", help="NAME@ALIAS, NAME/NUMBER, or an adapter's folder")
    one.add_argument("source", metavar="SOURCE", help="folder of images, or shards with an index (folder or URL)")
    one.add_argument("--output", required=True, metavar="FILE", help=".jsonl or .csv")
    one.add_argument("--checkpoint", metavar="FILE", help="the backbone's weights, if they have moved since training")
    one.add_argument("--batch-size", type=int, default=64, help="images of one forward pass (default: 64)")
    one.add_argument("--workers", type=int, default=2, help="decoding threads (default: 2)")
    return parser


def _action(command: str) -> Callable[[argparse.Namespace], tuple[str, dict[str, Any], int]]:
    """What a command does. --help need not wait for MLflow, nor a list for torch."""
    if command in ("list", "show"):
        from fulllora_dist.commands import adapter_listing as actions
    else:
        from fulllora_dist.commands import adapter_actions as actions  # type: ignore[no-redef]
    return getattr(actions, f"{command}_command")


def main() -> int:
    """Run the command line."""
    args = _parser().parse_args()
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    with on_interrupt(lambda: _KEPT.get(args.command, "nothing was changed").format(**vars(args))):
        text, result, code = _action(args.command)(args)
    print(json.dumps(result) if args.json else text)
    return code
