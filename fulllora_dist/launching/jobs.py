"""The jobs of a run as its launch folders and the scheduler know them: their state, and why they failed."""

import os
import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import psutil
from submitit import SlurmJob
from submitit.core.utils import JobPaths, pickle_load

from fulllora_dist.core.errors import UserError
from fulllora_dist.core.messages import one_line
from fulllora_dist.launching.folder import launch_folders, read_record, read_restarts
from fulllora_dist.launching.worker import REQUEUED

# SLURM's words for jobs that run, will run, or run again
_ALIVE = frozenset((
    "PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING",
    "PREEMPTED", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD"
))  # fmt: skip


# srun's and slurmstepd's own words, which may follow a progress bar in its line
_SLURM_SAYS = re.compile(r"(?:srun|slurmstepd|sbatch): (?:error|fatal): .*")
# a task's end, and what it brings about on the others; a preempted step is requeued
_CONSEQUENCE = re.compile(
    r": tasks? \d|CANCELLED AT \S+ \*\*\*|DUE TO (PREEMPTION|JOB REQUEUE)|Timed out waiting for job step"
)
_NO_STEP = re.compile(r"fatal:|Unable to (create step|allocate|confirm)|(Task|Application) launch .*failed")


@dataclass(frozen=True)
class RunJob:
    """A job and its state in the scheduler now.

    Attributes:
        folder: of its launch.
        id, entry, tasks, executor: as submitted.
        state: SLURM's word, its equivalent, or UNKNOWN.
        restarts, elapsed, nodes, reason: for people; empty where unknown.
    """

    folder: Path
    id: str
    entry: str
    tasks: int
    executor: str
    state: str
    restarts: str = ""
    elapsed: str = ""
    nodes: str = ""
    reason: str = ""

    @property
    def alive(self) -> bool:
        return self.state in _ALIVE

    def paths(self, task: int) -> JobPaths:
        """submitit's files of a task."""
        return JobPaths(self.folder, self.id, task)

    def log(self, task: int = 0) -> Path:
        """Output and errors of a task over all restarts; task 0 has the batch script's too."""
        return self.paths(task).stdout

    def cancel(self) -> None:
        """Stop it: it saves, and is not requeued."""
        if self.executor == "slurm":
            SlurmJob(self.folder, self.id).cancel(check=False)
        elif (process := _controller(self.folder, self.id)) is not None:
            process.terminate()

    def failure(self) -> str | None:
        """One line: the first task that failed and its exception, or how it was killed, and what SLURM says about it.
        None where none failed."""
        cause = self._slurm_cause()
        if cause and _NO_STEP.search(cause):  # so that no task has ended
            return cause
        task = self._failed_task()
        return f"{task} ({cause})" if task and cause else task or cause

    def _failed_task(self) -> str | None:
        errors = {task: path for task in range(self.tasks) if (path := self._error_file(task)) is not None}
        first = self._first_bad_exit()
        if first is not None and first[0] not in errors:
            return f"task {first[0]}: {first[1]}"
        if not errors:
            return None
        # the others fail a moment later, as they have lost a rank
        task = first[0] if first else min(errors, key=lambda task: errors[task].stat().st_mtime_ns)
        return f"task {task}: {_last_line(pickle_load(errors[task])[1])}"

    def _slurm_cause(self) -> str | None:
        """The last reason that SLURM gives in the logs of the last restart: memory, time limit, a lost node."""
        causes = [
            line
            for task in range(self.tasks)
            for line in _SLURM_SAYS.findall(self._last_restart(task))
            if not _CONSEQUENCE.search(line)
        ]
        return causes[-1][:300] if causes else None

    def _last_restart(self, task: int = 0) -> str:
        log = self.log(task)
        text = log.read_text(errors="replace") if log.exists() else ""
        return text.rpartition("Starting with JobEnvironment")[2]

    def _error_file(self, task: int) -> Path | None:
        path = self.paths(task).result_pickle
        try:
            return path if pickle_load(path)[0] == "error" else None
        except (OSError, EOFError, UnpicklingError):  # there is none, or the disk was full
            return None

    def _first_bad_exit(self) -> tuple[int, str] | None:
        """Task and how it ended, as srun reports it of the last restart."""
        match = re.search(r"srun: error: (\S+): tasks? (\d+)\S*: (.*)", self._last_restart())
        return (int(match[2]), f"{match[3]} on {match[1]}") if match else None


def wait(folder: Path, seconds: float = 5.0) -> list[RunJob]:
    """The jobs of a launch at their end, through all requeues. Polls the scheduler every few seconds.

    submitit's own waiting takes a job's first result for its end, and polls up to ten minutes later.
    """
    while True:
        jobs = launch_jobs(folder)
        if not any(job.alive or job.state == "UNKNOWN" for job in jobs):
            return jobs
        time.sleep(seconds)


def newest_job(output: str, entry: str = "train") -> RunJob:
    """The job of a kind in the newest launch that has one; the scheduler is asked for no others.

    Raises:
        UserError: the run has no job of that kind.
    """
    for folder in reversed(launch_folders(output)):
        if any(job["entry"] == entry for job in read_record(folder)["jobs"]):
            return next(job for job in launch_jobs(folder) if job.entry == entry)
    raise UserError(f"{output}: no {entry} job was launched here")


def run_jobs(output: str) -> list[RunJob]:
    """All jobs of a run, the oldest first."""
    return [job for folder in launch_folders(output) for job in launch_jobs(folder)]


def launch_jobs(folder: Path) -> list[RunJob]:
    """The jobs of one launch; the scheduler is asked for no others."""
    record, jobs = read_record(folder), []
    for job in record["jobs"]:
        slurm = record["executor"] == "slurm"
        state = _slurm_state(job["id"]) if slurm else _local_state(folder, job["id"], record["host"])
        jobs.append(RunJob(folder, job["id"], job["entry"], job["tasks"], record["executor"], **state))
    return jobs


def _slurm_state(job: str) -> dict[str, str]:
    """From the controller, which forgets a job some minutes after its end; then from the accounting, which lags."""
    if output := _output("scontrol", "--oneliner", "show", "job", job):
        fields = dict(re.findall(r"(\w+)=(\S*)", output))
        return {
            "state": fields["JobState"],
            "restarts": fields["Restarts"],
            "elapsed": fields["RunTime"],
            "nodes": fields["NodeList"].replace("(null)", ""),
            "reason": fields["Reason"].replace("None", ""),
        }
    columns = "State,Elapsed,NodeList"
    if output := _output("sacct", "--allocations", "--noheader", "--parsable2", f"--format={columns}", f"--jobs={job}"):
        state, elapsed, nodes = output.splitlines()[-1].split("|")
        return {"state": state.split()[0], "elapsed": elapsed, "nodes": nodes}  # "CANCELLED by 0"
    return {"state": "UNKNOWN"}


def _output(*command: str) -> str:
    """Empty if the command fails: the scheduler may be away for a moment, or have forgotten the job."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _local_state(folder: Path, job: str, host: str) -> dict[str, str]:
    """Of a local or debug job, from its process and its last entry in restarts.jsonl."""
    here = host == os.uname().nodename
    if here and _controller(folder, job) is not None:
        return {"state": "RUNNING", "nodes": host}
    entries = read_restarts(folder, job)
    last = entries[-1]["event"] if entries else ""
    states = {"finished": "COMPLETED", "stopped": "CANCELLED", "failed:": "FAILED", "gave": "FAILED"}
    state = states.get(last.partition(" ")[0])
    if not here and (state is None or last in REQUEUED):  # process ids mean nothing on another machine
        return {"state": "UNKNOWN", "nodes": host}
    return {"state": state or "FAILED"}


def _controller(folder: Path, job: str) -> psutil.Process | None:
    """submitit's process that holds a local job's tasks. Its id may be another process's by now."""
    try:
        process = psutil.Process(int(job))
        if str(folder) in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
            return process
    except (ValueError, psutil.Error):
        pass
    return None


def _last_line(trace: str) -> str:
    """The exception of a traceback, without its frames."""
    lines = trace.strip().splitlines()
    last_frame = max((i for i, line in enumerate(lines) if line.startswith("  ")), default=-1)
    return one_line(" ".join(lines[last_frame + 1 :] or lines[-1:]), 500)
