"""Compare two evaluations of the same images: B minus A, with paired 95 % intervals.

    fulllora compare A/evaluation.json B/evaluation.json [--attack pgd20] [--json]

Images are resampled with the results of both (paired bootstrap); if few of them differ, the interval is widened to
Tango's score interval. p is that of McNemar's exact test. Evaluations of different images, norms or precisions are
refused.
"""

import json
import sys

from fulllora_dist.commands.parser import Parser
from fulllora_dist.core.errors import UserError

MAX_SAMPLES = 10_000_000  # some hundred MB


def main() -> None:
    """Run the command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("a", metavar="A", help="evaluation.json")
    parser.add_argument("b", metavar="B", help="evaluation.json")
    parser.add_argument("--attack", action="append", metavar="NAME", help="compare only this attack; may be repeated")
    parser.add_argument("--shared", action="store_true", help="compare on the images that both have")
    parser.add_argument("--samples", type=int, default=10_000, help="bootstrap samples (default: 10000)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: 0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    if not 1 <= args.samples <= MAX_SAMPLES:
        raise UserError(f"--samples must be between 1 and {MAX_SAMPLES:,}, got {args.samples}")
    if args.seed < 0:
        raise UserError(f"--seed must be >= 0, got {args.seed}")
    from fulllora_dist.evaluation.compare import compare, comparison_table
    from fulllora_dist.evaluation.report import read_evaluation  # --help need not wait

    settings = {"attacks": args.attack, "shared": args.shared, "samples": args.samples, "seed": args.seed}
    comparison = compare(read_evaluation(args.a), read_evaluation(args.b), **settings)
    if args.json:
        print(json.dumps(comparison))
        for line in comparison["warnings"]:
            print(f"warning: {line}", file=sys.stderr)
    else:
        print(f"A: {args.a}\nB: {args.b}\n\n{comparison_table(comparison)}")
