"""Send to MLflow what a run has not sent itself, e.g. from a login node where compute nodes cannot reach the server.

    python tools/sync_tracking.py RUN_OUTPUT [--uri URI] [--wait SECONDS] [--json]

RUN_OUTPUT is the run's output folder. Sent are points that a saved state covers, parameters, tags, artifacts and the
status that the run ended with. It may be called while the run goes on, and as often as one likes: nothing is doubled.
Exit code 1 where something is left.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fulllora_dist.config.load import read_frame
from fulllora_dist.core.errors import UserError
from fulllora_dist.tracking.outbox import FOLDER, Outbox
from fulllora_dist.tracking.shipping import Shipper


def sync(output: str, uri: str | None, seconds: float, say: Callable[[str], None]) -> dict[str, Any]:
    """Send what is left.

    Args:
        output: the run's output folder.
        uri: of the store; None takes the run's.
        seconds: to wait at most.
        say: for progress and outages.

    Returns:
        {"run_id", "left", "points_left", "entries_left"}; `left` says whether anything is.

    Raises:
        UserError: there is nothing of a tracked run.
    """
    if not os.path.isdir(os.path.join(output, FOLDER)):
        raise UserError(f"{output}: no {FOLDER}/ there; give the output folder of a run with tracking.enabled=true")
    config = read_frame(Path(output, "config.yaml"))
    # seen from here: its folder may be mounted elsewhere
    config = config.model_copy(update={"run": config.run.model_copy(update={"output": output})})
    outbox = Outbox(output)
    shipper = Shipper(
        outbox, uri or config.tracking_uri(), config.tracking.experiment_name, config.tracked_run().name, say
    )
    shipper.start()
    sent = shipper.drain(seconds)
    shipper.stop()
    points, entries = outbox.unsent()
    return {"run_id": outbox.run_id, "left": not sent, "points_left": points, "entries_left": entries}


def main() -> int:
    """Send as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", metavar="RUN_OUTPUT", help="the run's output folder")
    parser.add_argument("--uri", help="MLflow's tracking store, instead of the run's tracking.uri")
    parser.add_argument("--wait", type=float, default=300.0, metavar="SECONDS", help="at most so long (default: 300)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args()
    if args.wait < 0:
        raise UserError(f"--wait: {args.wait:g}; 0 or more is right")
    found = sync(args.output, args.uri, args.wait, say=lambda line: print(line, file=sys.stderr, flush=True))
    if args.json:
        print(json.dumps(found))
    else:
        left = f"{found['points_left']:,} points and {found['entries_left']} other entries are left"
        print(f"MLflow run {found['run_id']}: " + (left if found["left"] else "all is sent"))
    return int(found["left"])
