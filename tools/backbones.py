"""Which timm models can be adapted, and what an adapter of 5 % is there. Nothing is downloaded or allocated.

python tools/backbones.py swin_base_patch4_window7_224 resnet50    # these
python tools/backbones.py --json                                   # all of timm's plain and windowed transformers
python tools/backbones.py --write docs/backbones.md                # the tables of that page, below its marker
"""

import dataclasses
import json
import sys

from tqdm import tqdm

from fulllora_dist.commands.entry import run_entry
from fulllora_dist.commands.parser import Parser
from fulllora_dist.core.errors import UserError

FRACTION = 0.05
MARKER = "<!-- written by tools/backbones.py -->\n"


def _above_the_marker(path: str) -> str:
    try:
        with open(path, "r+") as file:  # for writing too: what cannot be written is said before everything is counted
            above, marker, _ = file.read().partition(MARKER)
    except OSError as error:
        raise UserError(f"--write: {path} cannot be written ({error.strerror}); give an existing page") from None
    if not marker:
        raise UserError(f"--write: {path} has no line {MARKER.strip()}; add it where the tables begin")
    return above


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="timm architectures; left out: all of them")
    parser.add_argument(
        "--trainable-fraction", type=float, default=FRACTION, help=f"adapter.trainable_fraction (default {FRACTION})"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout instead of the table")
    parser.add_argument("--write", metavar="FILE", help="put the table of all below the marker in FILE")
    args = parser.parse_args()
    if not 0 < args.trainable_fraction <= 1:
        raise UserError(f"--trainable-fraction must be > 0 and <= 1, got {args.trainable_fraction:g}")
    if args.write is not None and (args.names or args.json or args.trainable_fraction != FRACTION):
        raise UserError(
            "--write: the page has all architectures at the default fraction; leave out NAME and other options"
        )
    from fulllora_dist.models.backbone import check_name  # --help need not wait for torch
    from fulllora_dist.models.survey import Backbone, architectures, examine, page

    above = _above_the_marker(args.write) if args.write is not None else ""
    for name in args.names:
        check_name(name, needs_tag=False)
    found = [examine(name, args.trainable_fraction) for name in tqdm(args.names or architectures(), disable=None)]
    if args.json:
        metadata = {b.name: {k: v for k, v in dataclasses.asdict(b).items() if k != "name"} for b in found}
        print(json.dumps(metadata))
        return
    if args.write is None:
        print(page(found))
        return
    with open(args.write, "w") as file:
        file.write(above + MARKER + "\n" + page(found))
    supported = sum(isinstance(b, Backbone) for b in found)
    print(f"{args.write}: {supported} supported, {len(found) - supported} refused", file=sys.stderr)


if __name__ == "__main__":
    run_entry(main)
