"""The difference between two evaluations of the same images, B minus A, with paired 95 % intervals.

    python tools/compare_evaluations.py A/evaluation.json B/evaluation.json [--attack pgd20] [--json]

Images are resampled with the results of both (paired bootstrap); where few of them differ, the interval is widened to
Tango's score interval. p is McNemar's exact test. Evaluations of other images, of another norm or precision are
refused.
"""

import argparse
import json
import sys

from fulllora_dist.core.errors import UserError
from fulllora_dist.evaluation.compare import compare, comparison_table
from fulllora_dist.evaluation.report import read_evaluation

MOST_SAMPLES = 10_000_000  # some hundred MB


def main() -> None:
    """Compare as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", metavar="A", help="evaluation.json of the one")
    parser.add_argument("b", metavar="B", help="evaluation.json of the other")
    parser.add_argument("--attack", action="append", metavar="NAME", help="this one alone; may be repeated")
    parser.add_argument("--shared", action="store_true", help="compare on the ids that both have")
    parser.add_argument("--samples", type=int, default=10_000, help="of the bootstrap (default: 10000)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args()
    if not 1 <= args.samples <= MOST_SAMPLES:
        raise UserError(f"--samples: {args.samples}; a number from 1 to {MOST_SAMPLES:,} is right")
    if args.seed < 0:
        raise UserError(f"--seed: {args.seed}; 0 or more is right")
    settings = {"attacks": args.attack, "shared": args.shared, "samples": args.samples, "seed": args.seed}
    found = compare(read_evaluation(args.a), read_evaluation(args.b), **settings)
    if args.json:
        print(json.dumps(found))
        for line in found["warnings"]:
            print(f"warning: {line}", file=sys.stderr)
    else:
        print(f"A: {args.a}\nB: {args.b}\n\n{comparison_table(found)}")
