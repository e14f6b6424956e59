"""The status of runs: their progress, their jobs, their problems."""

import os
import time
from pathlib import Path

from fulllora_dist.checkpoints.format import list_checkpoints, step_of
from fulllora_dist.checkpoints.manager import checkpoint_places
from fulllora_dist.config.load import read_frame
from fulllora_dist.config.schema import Config
from fulllora_dist.core.errors import UserError
from fulllora_dist.core.messages import one_line
from fulllora_dist.core.text_table import text_table
from fulllora_dist.launching.folder import CONFIG, LAUNCHES, launch_folders, read_restarts
from fulllora_dist.launching.jobs import RunJob, run_jobs
from fulllora_dist.tracking.mlflow_store import patient_client, sqlite_file
from fulllora_dist.tracking.outbox import METRICS
from fulllora_dist.tracking.spool import Spool

_COLUMNS = ("launch", "job", "what", "state", "restarts", "time", "nodes", "last")


def find_runs(path: str) -> list[str]:
    """The launched run in a folder, or those in its folders.

    Raises:
        UserError: there is none.
    """
    runs = [path] if launch_folders(path) else sorted(str(p.parents[0]) for p in Path(path).glob(f"*/{LAUNCHES}"))
    launched = [run for run in runs if launch_folders(run)]
    if not launched:
        raise UserError(f"{path}: no run here was launched; give a run's output folder, or the folder of several")
    return launched


def status(output: str) -> str:
    """A line on the run's progress, a table of its jobs, and a line on each problem."""
    jobs = run_jobs(output)
    try:
        config = read_frame(jobs[-1].folder / CONFIG, output_dir=output)
        progress, problems = _progress(config), _problems(config, jobs)
    except (UserError, OSError) as error:  # a bucket that does not answer costs this line, not the table
        progress, problems = str(error), []
    table = text_table([_COLUMNS, *(_row(job) for job in jobs)])
    return "\n".join([f"{output}: {progress}", table, *problems])


def _row(job: RunJob) -> tuple[str, ...]:
    entries = read_restarts(job.folder, job.id)
    last = f"{_clock(entries[-1]['time'])} {entries[-1]['event'][:60]}" if entries else job.reason
    return (job.folder.name, job.id, job.entry, job.state, job.restarts, job.elapsed, job.nodes, last)


def _clock(seconds: float) -> str:
    return time.strftime("%m-%d %H:%M:%S", time.localtime(seconds))


def _progress(config: Config) -> str:
    output, checkpoints = config.run.output_dir, list_checkpoints(*checkpoint_places(config.run))
    parts = [f"checkpoint of batch {step_of(checkpoints[0])}" if checkpoints else "no checkpoint yet"]
    finite = [line for line in Spool(Path(output, METRICS)) if "train/loss" in line]  # others are under "nonfinite"
    if finite:
        last = finite[-1]
        parts.append(f"loss {last['train/loss']:.4f} at batch {last['step']} ({_clock(last['time'] / 1000)})")
    if os.path.exists(os.path.join(output, "evaluation.json")):
        parts.append("evaluated")
    return ", ".join(parts)


def _problems(config: Config, jobs: list[RunJob]) -> list[str]:
    lines = []
    for job in jobs:
        if job.folder != jobs[-1].folder or job.alive or _cancelled(job):
            continue
        if (reason := job.failure()) or job.state not in ("COMPLETED", "CANCELLED", "UNKNOWN"):
            lines.append(f"job {job.id}: {reason or f'{job.state}; its log is {job.log()}'}")
    if any(job.alive or job.state == "UNKNOWN" for job in jobs):
        return lines
    return [*lines, *_tracked_as_running(config)]


def _cancelled(job: RunJob) -> bool:
    """By a user, after saving: its exit code is not a failure."""
    entries = read_restarts(job.folder, job.id)
    return job.state == "CANCELLED" and bool(entries) and entries[-1]["event"].startswith("stopped by")


def _tracked_as_running(config: Config) -> list[str]:
    """A line on the run, none of whose jobs is alive, if MLflow takes it for running."""
    if not config.tracking.enabled:
        return []
    try:
        uri = config.tracking_uri()
        if (file := sqlite_file(uri)) is not None and not file.exists():  # a client would create it
            return []
        client = patient_client(uri)
        experiment = client.get_experiment_by_name(config.tracking.experiment_name)
        query = f"tags.output = '{os.path.abspath(config.run.output_dir)}' and attributes.status = 'RUNNING'"
        runs = client.search_runs([experiment.experiment_id], query) if experiment else []
    except Exception as error:  # whatever a tracking store does, the table is shown
        return [f"whether MLflow says RUNNING is not known ({one_line(error, 100)})"]
    return [
        f"MLflow run {run.info.run_id} says RUNNING, but no job of this run is alive: it was killed. "
        "Re-run the same launch to resume it"
        for run in runs[:1]
    ]
