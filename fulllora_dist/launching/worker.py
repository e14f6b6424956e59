"""What every task of a job runs: joins the ranks, runs train.py or evaluate.py, ends as the batch script expects.

submitit's own way, a `checkpoint` that is called in a signal handler on rank 0, does not fit: saving is a collective,
and a run that is requeued from outside is not asked. So a signal only asks the run to stop (GracefulStop). It saves
after the step on all ranks, and the task ends with 128 + the signal's number, by which the batch script (executors.py)
decides whether to requeue. A run finds its own newest checkpoint, so the pickle that started it never changes.
"""

import atexit
import contextlib
import json
import os
import runpy
import signal
import sys
import time
from typing import Any

from submitit import JobEnvironment
from submitit.core.utils import cloudpickle_dump, temporary_save_path
from submitit.helpers import TorchDistributedEnvironment
from submitit.local.local import LOCAL_REQUEUE_RETURN_CODE

from fulllora_dist.checkpoints.format import list_checkpoints, step_of
from fulllora_dist.checkpoints.manager import checkpoint_places
from fulllora_dist.config.load import read_frame
from fulllora_dist.core.messages import one_line
from fulllora_dist.distributed.failures import exit_answer
from fulllora_dist.distributed.launcher import FIRST_PORT, PORTS
from fulllora_dist.distributed.signals import GracefulStop
from fulllora_dist.evaluation.resume_log import items_done
from fulllora_dist.launching.folder import CONFIG, RESTARTS, read_restarts
from fulllora_dist.storage import store
from fulllora_dist.tracking.provenance import PACKAGE

MAX_STALLED_RESTARTS = 3
"""Restarts in a row that may end at the same batch before the job is no longer requeued."""
REQUEUE_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)
"""They mean that the time is nearly up. SIGTERM may also be a user who wants the job to end."""
REQUEUED = frozenset(f"stopped by {number.name}" for number in REQUEUE_SIGNALS)
"""Events of restarts.jsonl after which a job is requeued."""
REFUSED = "refused-"
"""With the job's number, a file beside its logs: another start would not help, as the run ended with exit code 2."""


class Worker:
    """`main(arguments)` of an entry point as one task of a job.

    Args:
        entry: train or evaluate.
        arguments: its command line.
    """

    def __init__(self, entry: str, arguments: list[str]):
        self.entry, self.arguments = entry, arguments

    def __call__(self) -> int:
        """The exit code, if the job runs in the caller's process; otherwise a task that fails leaves."""
        with GracefulStop():
            environment = JobEnvironment()
            # an earlier start's result would be taken for this one's
            environment.paths.result_pickle.unlink(missing_ok=True)
            join_ranks(environment)
            record = _RestartLog(environment, self.entry)
            record("started", nodes=list(environment.hostnames), code=str(PACKAGE))
            try:
                code = entry_point(self.entry)["main"](self.arguments) or 0
            except SystemExit as stop:  # a signal came outside of the training loop
                code = int(stop.code or 0)
            except Exception as error:
                record(f"failed: {one_line(error, 300) or type(error).__name__}")
                answer = exit_answer(error)
                if answer is None:
                    if environment.cluster != "debug":
                        # as soon as submitit has written the traceback
                        atexit.register(_exit, 1)
                    raise
                line, code = answer
                if line is not None:
                    print(line, file=sys.stderr, flush=True)
                _leave(environment, code, line or str(error))
                return code
        if code > 128:
            record(f"stopped by {signal.Signals(code - 128).name}", **_reached(environment, self.entry))
        else:
            record("finished")
        if code - 128 in REQUEUE_SIGNALS and environment.global_rank == 0 and _stuck(environment):
            line = f"gave up: {MAX_STALLED_RESTARTS} restarts without progress; increase --time"
            record(line)
            _note_refusal(environment)
            print(f"error: {line}", file=sys.stderr, flush=True)
            _leave(environment, 1, line)
        _leave(environment, code)
        return code


def _leave(environment: JobEnvironment, code: int, reason: str | None = None) -> None:
    """End a task whose job is not done. Returns if it is, or if it runs in the caller's process.

    Args:
        reason: a line in place of submitit's traceback, for `status` and --wait. Without one there is no result, and
            rank 0 reports for all, as one code that is not 0 ends the others.
    """
    if code == 2:
        _note_refusal(environment)
    if code == 0 or environment.cluster == "debug":
        return
    if reason is not None:
        with contextlib.suppress(OSError), temporary_save_path(environment.paths.result_pickle) as path:
            cloudpickle_dump(("error", reason), path)
        try:
            time.sleep(1)  # a rank that the others lost is reported first
        finally:  # srun's SIGTERM may come meanwhile
            _exit(code)
    if environment.global_rank:
        code = 0
    elif environment.cluster == "local" and code - 128 in REQUEUE_SIGNALS:
        code = LOCAL_REQUEUE_RETURN_CODE
    _exit(code)


def _note_refusal(environment: JobEnvironment) -> None:
    """For the batch script, which srun may give another task's code."""
    with contextlib.suppress(OSError):
        (environment.paths.folder / f"{REFUSED}{environment.job_id}").touch()


def _exit(code: int) -> None:
    """Without clean-up, which may wait forever, such as of communicators with ranks that wait in a collective."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def entry_point(name: str) -> dict[str, Any]:
    """What train.py or evaluate.py defines. They are loaded as scripts: as a module of the package, evaluate would hide
    the function of that name."""
    return runpy.run_path(str(PACKAGE / f"{name}.py"))


def join_ranks(environment: JobEnvironment) -> None:
    """RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT from the scheduler's variables.

    The port follows from the job's number, so that jobs that share a node have different ones.
    """
    job = int("".join(filter(str.isdigit, environment.job_id)))
    os.environ["MASTER_PORT"] = str(FIRST_PORT + job % PORTS)
    # CUDA_VISIBLE_DEVICES stays the scheduler's: start_comm takes its own among those that are visible
    TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    if environment.num_nodes == 1:
        os.environ["MASTER_ADDR"] = "127.0.0.1"  # a laptop's name may not resolve


class _RestartLog:
    """Writes restarts.jsonl beside the jobs' logs, on rank 0."""

    def __init__(self, environment: JobEnvironment, entry: str):
        self._path = environment.paths.folder / RESTARTS if environment.global_rank == 0 else None
        restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        self._always = {"job": environment.job_id, "entry": entry, "restart": restart}

    def __call__(self, event: str, **more: Any) -> None:
        if self._path is None:
            return
        try:
            with open(self._path, "a") as file:
                file.write(json.dumps({"time": time.time(), **self._always, "event": event, **more}) + "\n")
        except OSError as error:  # a full disk must not fail a finished run
            print(f"warning: {self._path}: {error.strerror}; '{event}' is not recorded", file=sys.stderr, flush=True)


def _reached(environment: JobEnvironment, entry: str) -> dict[str, int | None]:
    """Progress of a start that was stopped: the newest checkpoint's step, None if there is none, and how far the
    evaluation is; nothing if it is not known."""
    if environment.global_rank or environment.cluster == "debug":
        return {}
    store.stop_retrying()  # the scheduler does not wait
    try:
        run = read_frame(environment.paths.folder / CONFIG).run
        evaluated = items_done(run.output_dir)
        checkpoints = list_checkpoints(*checkpoint_places(run)) if entry == "train" else []
    except Exception as error:  # of a bucket, say: the run is saved, and the record can do without
        print(f"warning: the newest checkpoint is not known: {one_line(error)}", file=sys.stderr)
        return {}
    return {"step": step_of(checkpoints[0]) if checkpoints else None, "evaluated": evaluated}


def _stuck(environment: JobEnvironment) -> bool:
    """Whether the last starts of this job were all stopped for a requeue at the same place."""
    entries = read_restarts(environment.paths.folder, environment.job_id)
    last = [entry for entry in entries if entry["event"] != "started"][-MAX_STALLED_RESTARTS:]
    requeued = all(entry["event"] in REQUEUED and "evaluated" in entry for entry in last)
    places = {(entry["step"], entry["evaluated"]) for entry in last} if requeued else set()
    return len(last) == MAX_STALLED_RESTARTS and len(places) == 1
