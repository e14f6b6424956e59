"""What people ask of runs day by day: how far are they, what are their jobs doing, what is amiss."""

import json
import os
import time
from pathlib import Path

from fulllora_dist.checkpoints.format import list_checkpoints, step_of
from fulllora_dist.checkpoints.manager import checkpoint_places
from fulllora_dist.config.schema import Config
from fulllora_dist.core.errors import UserError
from fulllora_dist.launching.folder import LAUNCHES, launch_folders, read_attempts, read_settings
from fulllora_dist.launching.jobs import RunJob, newest_launch, run_jobs
from fulllora_dist.tracking.outbox import METRICS

_COLUMNS = ("launch", "job", "what", "state", "restarts", "time", "nodes", "last")


def find_runs(path: str) -> list[str]:
    """The launched run in a folder, or those in its folders.

    Raises:
        UserError: there is none.
    """
    runs = [path] if launch_folders(path) else sorted(str(p.parents[0]) for p in Path(path).glob(f"*/{LAUNCHES}"))
    found = [run for run in runs if launch_folders(run)]
    if not found:
        raise UserError(f"{path}: no run here was launched; give a run's output folder, or the folder of several")
    return found


def status(output: str) -> str:
    """A line on the run, a table of its jobs, and a line on each thing that is amiss."""
    jobs = run_jobs(output)
    rows = [_COLUMNS, *(_row(job) for job in jobs)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    try:
        config = read_settings(jobs[-1].folder)
        # seen from here: it may have been launched from another folder
        config = config.model_copy(update={"run": config.run.model_copy(update={"output": output})})
        progress, amiss = _progress(config), _amiss(config, jobs)
    except (UserError, OSError) as error:  # a bucket that does not answer costs this line, not the table
        progress, amiss = str(error), []
    return "\n".join([f"{output}: {progress}", *table, *amiss])


def newest_job(output: str, entry: str = "train") -> RunJob:
    """Raises:
    UserError: the run has none of that kind.
    """
    jobs = newest_launch(output, entry)
    if not jobs:
        raise UserError(f"{output}: no {entry} job was launched here")
    return jobs[-1]


def _row(job: RunJob) -> tuple[str, ...]:
    notes = read_attempts(job.folder, job.id)
    last = f"{_clock(notes[-1]['time'])} {notes[-1]['event'][:60]}" if notes else job.reason
    return (job.folder.name, job.id, job.entry, job.state, job.restarts, job.elapsed, job.nodes, last)


def _clock(seconds: float) -> str:
    return time.strftime("%m-%d %H:%M:%S", time.localtime(seconds))


def _progress(config: Config) -> str:
    output, states = config.run.output_dir, list_checkpoints(*checkpoint_places(config.run))
    parts = [f"state of batch {step_of(states[0])}" if states else "no state yet"]
    path = os.path.join(output, METRICS)
    if os.path.exists(path):
        with open(path) as file:
            lines = [json.loads(line) for line in file if '"train/loss"' in line and line.endswith("\n")]
        points = [line for line in lines if "train/loss" in line]  # there it is finite
        if points:
            point = points[-1]
            parts.append(f"loss {point['train/loss']:.4f} at batch {point['step']} ({_clock(point['time'] / 1000)})")
    if os.path.exists(os.path.join(output, "evaluation.json")):
        parts.append("evaluated")
    return ", ".join(parts)


def _amiss(config: Config, jobs: list[RunJob]) -> list[str]:
    newest = [job for job in jobs if job.folder == jobs[-1].folder]
    ended = [job for job in newest if not job.alive and not _cancelled(job)]
    lines = [f"job {job.id}: {failure}" for job in ended if (failure := job.failure())]
    if any(job.alive or job.state == "UNKNOWN" for job in jobs):
        return lines
    run = _tracked_as_running(config)
    if run is not None:
        lines.append(
            f"MLflow run {run} says RUNNING, but no job of this run is alive: it was killed. "
            "The next attempt goes on with it; the same launch.py command starts one"
        )
    return lines


def _cancelled(job: RunJob) -> bool:
    """By somebody's wish, after saving: its exit code is no failure."""
    notes = read_attempts(job.folder, job.id)
    return job.state == "CANCELLED" and bool(notes) and notes[-1]["event"].startswith("stopped by")


def _tracked_as_running(config: Config) -> str | None:
    if not config.tracking.enabled:
        return None
    from mlflow import MlflowClient

    try:
        client = MlflowClient(config.tracking_uri())
        experiment = client.get_experiment_by_name(config.tracking.experiment_name)
        query = f"tags.output = '{os.path.abspath(config.run.output_dir)}' and attributes.status = 'RUNNING'"
        found = client.search_runs([experiment.experiment_id], query) if experiment else []
    except Exception as error:  # whatever a tracking store does, the table is shown
        return f"? (MLflow does not answer: {str(error).splitlines()[0][:100]})"
    return found[0].info.run_id if found else None
