"""Runs on a cluster: `fulllora launch --config FILE [key=value ...] --nodes N --gpus-per-node G`.

Submits the training to SLURM (one task per GPU). It is requeued before its time limit and when it is preempted, and
resumes the same run. Afterwards:

  fulllora launch status [RUN]   progress, jobs and problems; RUN: an output folder, or a folder of several
  fulllora launch logs RUN       output of the newest job
  fulllora launch cancel RUN     stop its jobs; a training saves first, and the same launch resumes it

See docs/cluster.md, also for containers and site profiles.
"""

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from fulllora_dist.commands.entry import on_interrupt
from fulllora_dist.commands.parser import Parser
from fulllora_dist.core.errors import UserError
from fulllora_dist.core.messages import one_line
from fulllora_dist.launching.resources import EXECUTORS, Resources, read_profile, resources

PROFILES = Path(__file__).resolve().parents[2] / "jobs" / "profiles"
"""Of the sites, where there is a checkout."""


def main() -> int:
    """Submit, or report on what was submitted."""
    if sys.argv[1:2] and sys.argv[1] in ("status", "logs", "cancel"):
        return report(sys.argv[1:])
    args = launch_arguments().parse_intermixed_args()
    from fulllora_dist.commands import evaluate  # --help need not wait for torch
    from fulllora_dist.config.load import load_config
    from fulllora_dist.launching.jobs import wait
    from fulllora_dist.launching.submit import check, script, submit

    settings = ["--config", args.config, *args.overrides]
    profile = read_profile(args.profile, str(PROFILES)) if args.profile else {}
    requested = resources(profile, given(args))
    evaluation = None if args.evaluate is None else evaluate_arguments(args.evaluate)
    config = load_config(args.config, args.overrides)
    check(config, requested, args.executor, evaluation is not None)
    if evaluation is not None:
        asked, evaluated = evaluate.read_arguments([*settings, *evaluation])
        evaluate.check_inputs(evaluated, adapter=None, preset=asked.preset)
    if args.dry_run:
        print(script(config, requested, evaluation))
        return 0
    with on_interrupt(lambda: "no job was submitted"):
        folder, jobs = submit(config, settings, requested, args.executor, sys.argv, evaluation)
    print(f"{folder}: " + ", then ".join(f"job {job.job_id}" for job in jobs), file=sys.stderr)
    if args.executor == "debug":
        try:
            return jobs[0].results()[0]
        except Exception as error:
            print(f"failed: {type(error).__name__}: {one_line(error, 500)}", file=sys.stderr)
            return 1
    if not args.wait:
        return 0
    output = config.run.output_dir
    shown = (
        f"the jobs go on; `fulllora launch status {output}` shows them, `fulllora launch cancel {output}` stops them"
    )
    with on_interrupt(lambda: shown):
        ended = wait(folder)
    for job in ended:
        if job.state != "COMPLETED":
            reason = job.failure() or f"its log is {job.log()}"
            print(f"job {job.id} ({job.entry}) is {job.state}: {reason}", file=sys.stderr)
    return int(any(job.state != "COMPLETED" for job in ended))


def report(argv: list[str]) -> int:
    """status, logs, cancel."""
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("status", help="progress, jobs and problems of runs")
    run.add_argument("run", metavar="RUN", nargs="?", default="runs", help="output folder, or a folder of several")
    run = commands.add_parser("logs", help="output of a run's newest job")
    run.add_argument("run", metavar="RUN", help="output folder")
    run.add_argument("--task", type=int, default=0, help="rank (default: 0)")
    run.add_argument("--lines", type=int, default=50, help="number of last lines (default: 50)")
    run.add_argument("--follow", action="store_true", help="keep printing as the log grows")
    run.add_argument("--of", choices=("train", "evaluate"), default="train", help="job of the launch (default: train)")
    run = commands.add_parser("cancel", help="stop a run's jobs; a training saves first")
    run.add_argument("run", metavar="RUN", help="output folder")
    args = parser.parse_args(argv)
    from fulllora_dist.launching.jobs import newest_job  # --help need not wait for torch
    from fulllora_dist.launching.report import find_runs, status

    runs = find_runs(args.run)
    if args.command == "status":
        print("\n\n".join(map(status, runs)))
    elif args.command == "cancel":
        cancel(args.run, runs)
    else:
        log = newest_job(args.run, args.of).log(args.task)
        if not log.exists():
            raise UserError(
                f"{log} does not exist yet; `fulllora launch status {args.run}` shows what the job waits for"
            )
        sys.stdout.flush()
        os.execvp("tail", ["tail", "-n", str(args.lines), *(["-F"] if args.follow else []), str(log)])
    return 0


def cancel(run: str, runs: list[str]) -> None:
    """Raises:
    UserError: these are several runs, or it is not known whether a job is alive.
    """
    from fulllora_dist.launching.jobs import run_jobs

    if runs != [run]:
        raise UserError(f"{run} holds {len(runs)} runs; give the one to cancel, e.g. {runs[0]}")
    jobs = run_jobs(run)
    alive = [job for job in reversed(jobs) if job.alive]  # the evaluation first, or it would be started or fail
    for job in alive:
        job.cancel()
        print(f"cancelled job {job.id} ({job.entry})")
    unknown = [job.id for job in jobs if job.state == "UNKNOWN"]
    if unknown:
        raise UserError(f"job {', '.join(unknown)} of {run} may be alive on another machine; it was not cancelled")
    if not alive:
        print(f"no job of {run} is alive")


def evaluate_arguments(text: str) -> list[str]:
    """Arguments of --evaluate, split as a shell does.

    Raises:
        UserError: an open quote, or a setting that was meant for the training.
    """
    try:
        arguments = shlex.split(text)
    except ValueError as error:
        raise UserError(f"--evaluate: {text!r} is not a command line ({error})") from None
    if arguments and not arguments[0].startswith("-"):
        raise UserError(f"--evaluate: {text!r} is not an option of evaluate.py; put settings before --evaluate")
    return arguments


def launch_arguments() -> argparse.ArgumentParser:
    """Arguments of a launch; those of `Resources` under their names."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="of train.py, whose --help-settings lists the settings"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that override the file's")
    parser.add_argument("--executor", choices=EXECUTORS, default="slurm", help="local: tasks of this machine in the "
                        "background; debug: one task in this process")  # fmt: skip
    parser.add_argument("--profile", metavar="NAME", help="settings of a site: jobs/profiles/NAME.yaml, or a YAML file")
    parser.add_argument("--dry-run", action="store_true", help="check everything and print the batch script")
    parser.add_argument("--wait", action="store_true", help="wait for the jobs to end; exit code 1 if one failed")
    parser.add_argument("--evaluate", metavar="ARGUMENTS", nargs="?", const="", help="then run evaluate.py on the "
                        "adapter in a job of its own, e.g. --evaluate '--attacks clean,autoattack'")  # fmt: skip
    group = parser.add_argument_group("resources", "also the settings of a profile, which these override")
    for name, field in Resources.model_fields.items():
        meaning = " ".join((field.description or "").split())
        option: dict[str, Any] = {"metavar": name.rpartition("_")[2].upper(), "help": meaning} | _OPTIONS.get(name, {})
        if name == "gpus":
            group.add_argument("--no-gpus", dest=name, action="store_const", const=False, help=option["help"])
        elif name in ("sbatch", "srun", "setup"):
            group.add_argument(f"--{name}", action="append", **option)
        else:
            group.add_argument("--" + name.replace("_", "-"), **option)
    return parser


_OPTIONS = {
    "nodes": {"metavar": "N"},
    "gpus_per_node": {"metavar": "N"},
    "cpus_per_task": {"metavar": "N"},
    "gpus": {
        "help": "request no GPUs; --gpus-per-node then only counts tasks: for clusters without GPUs, and for sites "
        "that name theirs differently (--sbatch gres=gpu:a100:8)"
    },
    "setup": {"metavar": "LINE", "help": "shell line of the batch script before the tasks start, e.g. 'module load "
              "cuda'; may be repeated"},
    "sbatch": {"metavar": "NAME[=VALUE]", "help": "further argument of sbatch, e.g. --sbatch reservation=mine --sbatch "
               "exclusive; may be repeated"},
    "srun": {"metavar": "OPTION", "help": "further argument of srun, with an equals sign before it, e.g. "
             "--srun=--container-image=image.sqsh; may be repeated"},
}  # fmt: skip
"""Where the command line is written otherwise than a profile."""


def given(args: argparse.Namespace) -> dict[str, Any]:
    """The resources on the command line. `--sbatch exclusive --sbatch reservation=mine` is a mapping.

    Raises:
        UserError: a mapping or list, as a profile has them.
    """
    values = {name: getattr(args, name) for name in Resources.model_fields}
    for name, example in (("sbatch", "--sbatch exclusive"), ("srun", "--srun=--mpi=none")):
        if profile := [text for text in values[name] or () if text.lstrip().startswith(("{", "["))]:
            raise UserError(f"--{name}: {profile[0]!r} is as profiles have it; repeat the option, e.g. {example}")
    if values["sbatch"] is not None:
        pairs = [text.removeprefix("--").partition("=") for text in values["sbatch"]]
        values["sbatch"] = {name: value if equals else True for name, equals, value in pairs}
    return values
