"""Send to MLflow what a run could not send itself, e.g. from a login node where compute nodes cannot reach the server.

    fulllora sync OUTPUT_DIR [--uri URI] [--wait SECONDS] [--json]

OUTPUT_DIR is the run's output folder. Sends metrics that a saved checkpoint covers, parameters, tags, artifacts and the
run's final status. Safe to repeat, also while the run is training: nothing is duplicated. Exit code 1 if something
could not be sent.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fulllora_dist.commands.entry import on_interrupt
from fulllora_dist.commands.parser import Parser
from fulllora_dist.core.errors import UserError


def sync(output: str, uri: str | None, seconds: float, say: Callable[[str], None]) -> dict[str, Any]:
    """Send what has not been sent yet.

    Args:
        output: the run's output folder.
        uri: of the store; None takes the run's.
        seconds: longest wait.
        say: prints progress and outages.

    Returns:
        {"run_id", "left", "points_left", "entries_left"}; `left` tells whether anything is.

    Raises:
        UserError: this is not the output folder of a tracked run; MLflow cannot open such an address.
    """
    from fulllora_dist.config.load import read_frame  # --help need not wait for torch
    from fulllora_dist.tracking.outbox import FOLDER, Outbox
    from fulllora_dist.tracking.settings import check_uri
    from fulllora_dist.tracking.shipping import Shipper

    if not os.path.isdir(os.path.join(output, FOLDER)):
        raise UserError(f"{output} has no {FOLDER}/; give the output folder of a run with tracking.enabled=true")
    run = read_frame(Path(output, "config.yaml"), output_dir=output).tracked_run()
    check_uri(uri or run.uri, "--uri" if uri else "MLFLOW_TRACKING_URI" if run.settings.uri is None else "tracking.uri")
    outbox = Outbox(output)
    shipper = Shipper(outbox, uri or run.uri, run.settings.experiment_name, run.name, say)
    shipper.start()
    sent = shipper.drain(seconds)
    shipper.stop()
    metrics, entries = outbox.unsent()
    return {"run_id": outbox.run_id, "left": not sent, "points_left": metrics, "entries_left": entries}


def main() -> int:
    """Run the command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("output", metavar="OUTPUT_DIR", help="the run's output folder")
    parser.add_argument("--uri", help="MLflow's tracking store, in place of the run's tracking.uri")
    parser.add_argument("--wait", type=float, default=300.0, metavar="SECONDS", help="longest wait (default: 300)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    if args.wait < 0:
        raise UserError(f"--wait must be >= 0, got {args.wait:g}")
    with on_interrupt(lambda: "what was sent is not sent again; re-run the same command to send the rest"):
        result = sync(args.output, args.uri, args.wait, say=lambda line: print(line, file=sys.stderr, flush=True))
    if args.json:
        print(json.dumps(result))
    else:
        left = f"{result['points_left']:,} metric values and {result['entries_left']} other entries are left"
        print(f"MLflow run {result['run_id']}: " + (left if result["left"] else "everything is sent"))
    return int(result["left"])
