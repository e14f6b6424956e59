"""The adapters of an MLflow store: what there is, which one is the champion, and getting them out.

    python tools/adapters.py list [NAME]                     registered models, or the versions of one
    python tools/adapters.py show NAME@champion              all that is known of a version
    python tools/adapters.py diff NAME@champion NAME/4       settings, accuracy with paired intervals, layers
    python tools/adapters.py publish runs/x/adapter --evaluation runs/x/evaluation.json
    python tools/adapters.py promote NAME/4 [--force REASON] @champion, if the gate lets it
    python tools/adapters.py rollback NAME                   @previous becomes @champion again
    python tools/adapters.py pull NAME@champion FOLDER       an adapter's folder, for evaluate.py --adapter
    python tools/adapters.py predict NAME@champion PICTURES --output predictions.jsonl

The store is MLFLOW_TRACKING_URI, or --uri. --json prints one JSON object. Exit codes: 0; 1 where the gate refuses or
another promotion came first; 2 for a mistake. docs/registry.md says how the gate judges.
"""

import argparse
import json
import logging
from typing import Any

from fulllora_dist.commands import adapter_actions


def _parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--uri", help="MLflow tracking URI (default: MLFLOW_TRACKING_URI)")
    shared.add_argument("--json", action="store_true", help="one JSON object on stdout instead of a table")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, meaning: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=meaning, description=meaning, parents=[shared])

    version: dict[str, Any] = {"metavar": "VERSION", "help": "NAME@ALIAS or NAME/NUMBER"}
    one = command("list", "registered models, or the versions of one")
    one.add_argument("name", nargs="?", metavar="NAME", help="of a registered model")
    command("show", "all that is known of a version").add_argument("version", **version)
    one = command("diff", "what B differs in from A: settings, accuracy with paired intervals, layers")
    for name in "ab":
        one.add_argument(name, metavar=name.upper(), help="NAME@ALIAS or NAME/NUMBER")
    one = command("publish", "make an adapter a version, with its evaluation; safe to repeat")
    one.add_argument("folder", metavar="FOLDER", help="what save_adapter wrote")
    one.add_argument("--evaluation", metavar="FILE", help="its evaluation.json (evaluate.py --output)")
    one.add_argument("--name", help="of the registered model (default: BACKBONE-DATA-NORM-EPS)")
    one.add_argument("--data", metavar="NAME", help="of the data set, where the adapter does not tell")
    one.add_argument("--run", metavar="ID", help="MLflow run that it comes from")
    one = command("promote", "make a version @champion, if the gate lets it")
    one.add_argument("version", **version)
    one.add_argument("--margin", type=float, default=0.01, help="loss of robust accuracy to exclude (default: 0.01)")
    one.add_argument("--clean-floor", type=float, default=0.5, help="lowest clean accuracy (default: 0.5)")
    one.add_argument("--force", metavar="REASON", help="whatever the gate says; the reason is kept with the version")
    one.add_argument("--dry-run", action="store_true", help="only say what the gate says")
    one = command("rollback", "make @previous the champion again")
    one.add_argument("name", metavar="NAME", help="of the registered model")
    one.add_argument("--reason", help="kept with the version that is left")
    one = command("pull", "write an adapter's folder")
    one.add_argument("version", **version)
    one.add_argument("folder", metavar="FOLDER", help="empty or not there")
    one = command("predict", "classes of a folder of images, or of shards; the same command goes on after a kill")
    one.add_argument("version", metavar="ADAPTER", help="NAME@ALIAS, NAME/NUMBER, or an adapter's folder")
    one.add_argument("source", metavar="SOURCE", help="folder of images, or shards with an index (folder or URL)")
    one.add_argument("--output", required=True, metavar="FILE", help=".jsonl or .csv")
    one.add_argument("--checkpoint", metavar="FILE", help="the backbone's weights, if not where they were at training")
    one.add_argument("--batch-size", type=int, default=64)
    one.add_argument("--workers", type=int, default=2, help="decoding threads (default: 2)")
    return parser


def main() -> int:
    """Do as the command line says."""
    args = _parser().parse_args()

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    result: dict[str, Any]
    text, result, code = getattr(adapter_actions, f"{args.command}_command")(args)
    if args.json:
        print(json.dumps(result))
    else:
        print(text)
    return code
