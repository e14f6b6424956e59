"""Send to MLflow what a run has not sent itself, e.g. from a login node where compute nodes cannot reach the server.

    python tools/sync_tracking.py RUN_OUTPUT [--uri URI] [--wait SECONDS] [--json]

RUN_OUTPUT is the run's output folder. Sent are points that a saved state covers, parameters, tags, artifacts and the
status that the run ended with. It may be called while the run goes on, and as often as one likes: nothing is doubled.
Exit code 1 where something is left.
"""

import argparse
import json
import sys

from fulllora_dist.errors import UserError, run_entry
from fulllora_dist.tracking.sync import sync


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


if __name__ == "__main__":
    run_entry(main)
