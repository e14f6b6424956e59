"""A study: arms, tries and seeds as ordinary runs, and tables with paired intervals.

  fulllora study FILE                   run what is not done yet, and write the tables after each run
  fulllora study power FILE             the power of each margin, to be declared before the runs
  fulllora study report FILE            write the tables from the committed results, without training
  fulllora study verify NAME            evaluate 50 images of a result again, from its committed adapter

What is done is found by its content and not run again; the same command resumes after any interruption. FILE is a YAML
file such as configs/studies/imagenette.yaml; see docs/studies.md.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fulllora_dist.commands.entry import on_interrupt
from fulllora_dist.commands.parser import Parser
from fulllora_dist.core.errors import UserError
from fulllora_dist.core.text_table import text_table

if TYPE_CHECKING:
    from fulllora_dist.studies.plan import Study

SEEDS = (1, 2, 3, 5)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = {"power": _power, "report": _report, "verify": _verify}.get(arguments[0] if arguments else "")
    return _run(arguments) if command is None else command(arguments[1:])


def _parser(command: str = "") -> Parser:
    parser = Parser(prog=f"fulllora study {command}".rstrip(), description=__doc__)
    if command != "verify":
        parser.add_argument("file", metavar="FILE", help="YAML file of the study")
    return parser


def _run(argv: Sequence[str]) -> int:
    parser = _parser()
    parser.add_argument("--parallel", type=int, default=1, metavar="N", help="runs at a time (default: 1)")
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="ranks of each run (default: 1)")
    parser.add_argument("--dry-run", action="store_true", help="check everything and list what is left")
    args = parser.parse_args(argv)
    for option in ("parallel", "ranks"):
        if getattr(args, option) < 1:
            raise UserError(f"--{option} must be >= 1, got {getattr(args, option)}")
    study = _study(args.file)
    from fulllora_dist.studies.processes import make_shards

    make_shards(study.settings.shards, study.path, dry_run=args.dry_run)
    from fulllora_dist.studies.runner import Options, Runner  # torch

    runner = Runner(study, Options(args.parallel, args.ranks), _say, lambda: _write(study))
    runner.check()
    if args.dry_run:
        print("\n".join(runner.plan()))
        return 0
    _say(f"{study.path}: {runner.plan()[-1]}")
    with on_interrupt(lambda: "runs under way save and end; re-run the same command to resume"):
        code = runner.run()
    _write(study)
    return code


def _study(path: str) -> "Study":
    from fulllora_dist.studies.plan import Study  # --help need not wait

    return Study(path)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _write(study: "Study") -> None:
    from fulllora_dist.studies.report import Report

    Report(study).write()


def _report(argv: Sequence[str]) -> int:
    parser = _parser("report")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if the page is not up to date")
    args = parser.parse_args(argv)
    from fulllora_dist.studies.report import Report

    report = Report(_study(args.file))
    if args.check:
        return int(not report.is_written())
    print(report.write())
    return 0


def _power(argv: Sequence[str]) -> int:
    parser = _parser("power")
    parser.add_argument("--studies", type=int, default=500, metavar="N", help="to simulate (default: 500)")
    args = parser.parse_args(argv)
    if args.studies < 1:
        raise UserError(f"--studies must be >= 1, got {args.studies}")
    from fulllora_dist.evaluation.power import Assumptions, power_rows

    study = _study(args.file)
    for comparison in study.settings.comparisons:
        if comparison.margin is None or comparison.power is None:
            continue
        declared = comparison.power
        assumptions = Assumptions(declared.disagreement, declared.seed_sd, declared.image_correlation)
        n = study.images(comparison.attack)
        counts = sorted({*SEEDS, len(study.settings.seeds)})
        rows = power_rows(assumptions, comparison.margin, (n // 2, n, 2 * n), tuple(counts), studies=args.studies)
        table = [("n", "seeds", "power", "wrongly non-inferior", "margin with a power of 80 %")]
        for row in rows:
            here = " <- this study" * (row["n"] == n and row["seeds"] == len(study.settings.seeds))
            shares = f"{row['power']:.3f}", f"{row['wrongly']:.3f}", f"{row['reach']:.4f}{here}"
            table.append((f"{row['n']:.0f}", f"{row['seeds']:.0f}", *shares))
        print(f"{comparison.arm} - {comparison.against} under {comparison.attack}, margin {comparison.margin:g}:")
        print(text_table(table, "r") + "\n")
    return 0


def _verify(argv: Sequence[str]) -> int:
    parser = _parser("verify")
    parser.add_argument("name", metavar="NAME", help="of a result: results/NAME.json")
    parser.add_argument("--results", default="results", metavar="FOLDER", help="of the results (default: results)")
    args = parser.parse_args(argv)
    from fulllora_dist.studies.verify import verify

    evaluations = verify(args.name, args.results)
    for found in evaluations:
        for attack, ids in found.differing.items():
            verdict = "as committed" if not ids else f"{len(ids)} differ (ids {', '.join(map(str, ids))})"
            print(f"{args.name}: {found.images}: {attack}: {found.n} images, {verdict}")
    return int(not all(found.passed for found in evaluations))
