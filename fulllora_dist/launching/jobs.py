"""The jobs of a run as its launch folders and the scheduler know them: alive or not, why they failed, their end."""

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

from fulllora_dist.launching.folder import launch_folders, read_attempts, read_record
from fulllora_dist.launching.worker import WILL_GO_ON

# SLURM's words for jobs that run, will run, or run again
_ALIVE = frozenset(
    [
        "PENDING",
        "CONFIGURING",
        "RUNNING",
        "COMPLETING",
        "SUSPENDED",
        "STOPPED",
        "SIGNALING",
        "STAGE_OUT",
        "RESIZING",
        "PREEMPTED",
        "REQUEUED",
        "REQUEUE_FED",
        "REQUEUE_HOLD",
        "SPECIAL_EXIT",
        "RESV_DEL_HOLD",
    ]
)


@dataclass(frozen=True)
class RunJob:
    """A job and what the scheduler says of it now.

    Attributes:
        folder: of its launch.
        id, entry, tasks, executor: as they were submitted.
        state: SLURM's word, the like of it, or UNKNOWN.
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
        """Output and errors of a task over all attempts; task 0 holds the batch script's too."""
        return self.paths(task).stdout

    def cancel(self) -> None:
        """Ask it to end: it saves, and is not requeued."""
        if self.executor == "slurm":
            SlurmJob(self.folder, self.id).cancel(check=False)
        elif (process := _controller(self.folder, self.id)) is not None:
            process.terminate()

    def failure(self) -> str | None:
        """One line: the first task that failed and its exception, or how it was killed. None where none failed."""
        errors = {task: path for task in range(self.tasks) if (path := self._error_file(task)) is not None}
        first = self._first_bad_exit()
        if first is not None and first[0] not in errors:
            return f"task {first[0]}: {first[1]}"
        if not errors:
            return None
        # the others fail a moment later, as they lose a partner
        task = first[0] if first else min(errors, key=lambda task: errors[task].stat().st_mtime_ns)
        return f"task {task}: {_last_line(pickle_load(errors[task])[1])}"

    def _error_file(self, task: int) -> Path | None:
        path = self.paths(task).result_pickle
        try:
            return path if pickle_load(path)[0] == "error" else None
        except (OSError, EOFError, UnpicklingError):  # none, or the disk was full
            return None

    def _first_bad_exit(self) -> tuple[int, str] | None:
        """Task and how it ended, as srun tells it of the last attempt."""
        if not self.log().exists():
            return None
        last = self.log().read_text(errors="replace").rpartition("Starting with JobEnvironment")[2]
        found = re.search(r"srun: error: (\S+): tasks? (\d+)\S*: (.*)", last)  # may follow a progress bar in its line
        return (int(found[2]), f"{found[3]} on {found[1]}") if found else None


def wait(folder: Path, seconds: float = 5.0) -> list[RunJob]:
    """The jobs of a launch at their end, through all requeues. Asks the scheduler every few seconds.

    submitit's own waiting takes a job's first result for its end, and asks up to ten minutes later.
    """
    output = str(folder.parents[1])
    while True:
        jobs = run_jobs(output, only=folder)
        if not any(job.alive or job.state == "UNKNOWN" for job in jobs):
            return jobs
        time.sleep(seconds)


def newest_launch(output: str, entry: str) -> list[RunJob]:
    """The job of a kind in the newest launch that has one, without asking for the others."""
    for folder in reversed(launch_folders(output)):
        if any(job["entry"] == entry for job in read_record(folder)["jobs"]):
            return [job for job in run_jobs(output, only=folder) if job.entry == entry]
    return []


def run_jobs(output: str, only: Path | None = None) -> list[RunJob]:
    """All jobs of a run, the first one first, or those of one launch; the scheduler is asked for no others."""
    jobs = []
    for folder in launch_folders(output):
        if only is not None and folder != only:
            continue
        record = read_record(folder)
        executor, host = record["executor"], record["host"]
        for job in record["jobs"]:
            known = _slurm_facts(job["id"]) if executor == "slurm" else _local_facts(folder, job["id"], host)
            jobs.append(RunJob(folder, job["id"], job["entry"], job["tasks"], executor, **known))
    return jobs


def _slurm_facts(job: str) -> dict[str, str]:
    """Of the controller, which forgets a job some minutes after its end; then of the accounting, which lags behind."""
    if said := _said("scontrol", "--oneliner", "show", "job", job):
        metadata = dict(re.findall(r"(\w+)=(\S*)", said))
        return {
            "state": metadata["JobState"],
            "restarts": metadata["Restarts"],
            "elapsed": metadata["RunTime"],
            "nodes": metadata["NodeList"].replace("(null)", ""),
            "reason": metadata["Reason"].replace("None", ""),
        }
    columns = "State,Elapsed,NodeList"
    if said := _said("sacct", "--allocations", "--noheader", "--parsable2", f"--format={columns}", f"--jobs={job}"):
        state, elapsed, nodes = said.splitlines()[-1].split("|")
        return {"state": state.split()[0], "elapsed": elapsed, "nodes": nodes}  # "CANCELLED by 0"
    return {"state": "UNKNOWN"}


def _said(*command: str) -> str:
    """Empty where the command fails: the scheduler may be away for a moment, or have forgotten the job."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _local_facts(folder: Path, job: str, host: str) -> dict[str, str]:
    """Of a local or debug job, by its process and what its last attempt said."""
    here = host == os.uname().nodename
    if here and _controller(folder, job) is not None:
        return {"state": "RUNNING", "nodes": os.uname().nodename}
    notes = read_attempts(folder, job)
    last = notes[-1]["event"] if notes else ""
    ends = {"finished": "COMPLETED", "stopped": "CANCELLED", "failed:": "FAILED", "gave": "FAILED"}
    said = ends.get(last.partition(" ")[0])
    if not here and (said is None or last in WILL_GO_ON):  # numbers of processes mean nothing on another machine
        return {"state": "UNKNOWN", "nodes": host}
    return {"state": said or "FAILED"}


def _controller(folder: Path, job: str) -> psutil.Process | None:
    """submitit's process that holds a local job's tasks. Its number may be another's by now."""
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
    return " ".join(" ".join(lines[last_frame + 1 :] or lines[-1:]).split())[:500]
