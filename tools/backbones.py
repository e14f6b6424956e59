"""Which timm models can be adapted, and what an adapter of 5 % is there. Nothing is downloaded or allocated.

python tools/backbones.py swin_base_patch4_window7_224 resnet50    # these
python tools/backbones.py --json                                   # all of timm's plain and windowed transformers
python tools/backbones.py --write docs/backbones.md                # the tables of that page, below its marker
"""

import argparse
import dataclasses
import json
import sys

from tqdm import tqdm

from fulllora_dist.errors import UserError, run_entry
from fulllora_dist.models.backbone import check_name
from fulllora_dist.models.survey import Backbone, architectures, examine, page

MARKER = "<!-- written by tools/backbones.py -->\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="timm architectures; left out: all of them")
    parser.add_argument("--budget", type=float, default=0.05, help="adapter.budget (default 0.05)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout instead of the table")
    parser.add_argument("--write", metavar="FILE", help="put the table below the marker in FILE")
    args = parser.parse_args()
    for name in args.names:
        check_name(name, needs_tag=False)
    found = [examine(name, args.budget) for name in tqdm(args.names or architectures(), disable=None)]
    if args.json:
        facts = {b.name: {k: v for k, v in dataclasses.asdict(b).items() if k not in ("name", "layers")} for b in found}
        print(json.dumps(facts))
        return
    if args.write is None:
        print(page(found))
        return
    with open(args.write) as file:
        above, marker, _ = file.read().partition(MARKER)
    if not marker:
        raise UserError(f"--write: {args.write} has no line {MARKER.strip()}; add it where the tables shall begin")
    with open(args.write, "w") as file:
        file.write(above + MARKER + "\n" + page(found))
    supported = sum(isinstance(b, Backbone) for b in found)
    print(f"{args.write}: {supported} supported, {len(found) - supported} refused", file=sys.stderr)


if __name__ == "__main__":
    run_entry(main)
