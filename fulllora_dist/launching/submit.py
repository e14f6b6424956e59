"""From a config and resources to jobs, through submitit's executors."""

import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import Any, Literal, get_args

from submitit import DebugExecutor, LocalExecutor, SlurmExecutor
from submitit.core.core import Executor, Job
from submitit.core.utils import FailedJobError, FailedSubmissionError

from fulllora_dist.checkpoints.format import DESCRIPTION, list_checkpoints
from fulllora_dist.checkpoints.manager import checkpoint_places
from fulllora_dist.config.schema import Config
from fulllora_dist.core.errors import UserError
from fulllora_dist.launching.folder import CODE, CONFIG, launches_of, launching, make_folder, write_record
from fulllora_dist.launching.jobs import run_jobs
from fulllora_dist.launching.resources import Resources
from fulllora_dist.launching.worker import REQUEUE_SIGNALS, Worker
from fulllora_dist.storage import urls
from fulllora_dist.training.build import check_inputs
from fulllora_dist.training.resume import check_same_run

ExecutorName = Literal["slurm", "local", "debug"]
EXECUTORS: tuple[str, ...] = get_args(ExecutorName)

_TIME_IS_UP = " | ".join(str(128 + number) for number in REQUEUE_SIGNALS)
_REQUEUE = f"""code=$?
# 128 + signal, by which the run ended after saving. SIGTERM is a preemption where SLURM says so, else somebody's wish
case $code in
  {_TIME_IS_UP}) again=1 ;;
  143) scontrol show job "$SLURM_JOB_ID" | grep -q 'PreemptTime=[0-9]' && again=1 ;;
esac
[ -n "${{again-}}" ] && scontrol requeue "$SLURM_JOB_ID"
exit $code"""
"""The end of the batch script. It asks for the requeue because scontrol may be missing in the tasks' container."""


_KEPT_PATH = '"${PYTHONPATH:+:$PYTHONPATH}"'  # as the batch script's shell expands it


class _ScriptWriter(SlurmExecutor):
    """Writes the batch script on machines without SLURM too."""

    @classmethod
    def affinity(cls) -> int:
        return 1


def submit(
    config: Config,
    settings: list[str],
    asked: Resources,
    executor: ExecutorName,
    command: list[str],
    evaluation: list[str] | None = None,
) -> tuple[Path, list[Job[int]]]:
    """Submit the training and, where arguments of evaluate.py are given, an evaluation that begins after its success.

    Args:
        config: that `check` has let through.
        settings: what it was read from, as train.py is given it: --config FILE key=value ...
        command: the command line, for the record.
        evaluation: beyond --config, --adapter and --output.

    Returns:
        The launch's folder; the jobs, the training first.

    Raises:
        UserError: a job of the run is alive, or the scheduler refuses.
    """
    if executor == "slurm" and shutil.which("srun") is None:
        raise UserError("--executor slurm: there is no srun here; submit on a login node, or take --executor local")
    with launching(config.run.output_dir):
        refuse_second(config.run.output_dir)
        return _submit(config, settings, asked, executor, command, evaluation)


def refuse_second(output: str) -> None:
    """Raises:
    UserError: a job of the run is alive, or may be.
    """
    for job in run_jobs(output):
        if job.alive:
            raise UserError(f"run.output_dir: job {job.id} of {output} is {job.state}; cancel it first")
        if job.executor == "local" and job.state == "UNKNOWN":
            raise UserError(
                f"run.output_dir: whether job {job.id} of {output} is alive, only {job.nodes} knows; launch there"
            )


def _submit(
    config: Config,
    settings: list[str],
    asked: Resources,
    executor: ExecutorName,
    command: list[str],
    evaluation: list[str] | None,
) -> tuple[Path, list[Job[int]]]:
    folder = make_folder(config)
    record: dict[str, Any] = {
        "command": command,
        "executor": executor,
        "host": os.uname().nodename,
        "resources": asked.model_dump(mode="json"),
        "jobs": [],
    }
    jobs: list[Job[int]] = []
    entries = _entries(config, folder, evaluation)
    if executor == "debug":  # this process has the code, and plugins of these names, already
        entries = [("train", settings)]
    for entry, arguments in entries:
        try:
            runner = _executor(config, asked, executor, folder, entry, after=jobs[-1].job_id if jobs else None)
            with redirect_stderr(io.StringIO()), _detached() if executor == "local" else nullcontext():
                jobs.append(runner.submit(Worker(entry, arguments)))
            record["jobs"].append({"id": jobs[-1].job_id, "entry": entry, "tasks": asked.nodes * asked.gpus_per_node})
            write_record(folder, record)
        except BaseException as error:
            for job in jobs:
                job.cancel()
            shutil.rmtree(folder)
            if isinstance(error, FailedJobError | FailedSubmissionError | subprocess.CalledProcessError):
                raise UserError(f"{executor} refuses the job: {_said(error)}") from None
            raise
    return folder, jobs


def check(config: Config, asked: Resources, executor: ExecutorName, evaluates: bool) -> None:
    """Refuse what can be refused before anything is queued.

    Args:
        evaluates: whether an evaluation is to follow.

    Raises:
        UserError: naming the setting.
    """
    world = asked.nodes * asked.gpus_per_node
    if executor == "debug" and world > 1:
        raise UserError(f"--gpus-per-node: --executor debug runs one task in this process, not {world}")
    if executor != "slurm" and asked.nodes > 1:
        raise UserError(f"--nodes: --executor {executor} has one machine, not {asked.nodes}")
    if executor != "slurm" and evaluates:
        raise UserError(f"--evaluate: --executor {executor} has no queue; run evaluate.py when the training is done")
    if executor != "slurm" and asked.setup:
        raise UserError(f"--setup: --executor {executor} has no batch script to run it; run it in this shell before")
    if asked.signal_seconds >= asked.time * 60:
        raise UserError(f"--signal-seconds: {asked.signal_seconds} leave nothing of --time {asked.time} minutes")
    if executor != "debug" and ":" in str(Path(config.run.output_dir).absolute()):
        raise UserError(
            f"run.output_dir: {config.run.output_dir}: ':' would end the folder's name in the jobs' PYTHONPATH"
        )
    check_inputs(config, world)
    _check_states(config)


def _check_states(config: Config) -> None:
    """The run's own newest state, as far as it is on a disk, refuses what the job would refuse after its time in the
    queue. One that cannot be read is the job's to judge."""
    places = [place for place in checkpoint_places(config.run) if not urls.is_remote(place)]
    try:
        states = list_checkpoints(*places)
        saved = json.loads((Path(states[0]) / DESCRIPTION).read_text())["config"] if states else None
    except (OSError, ValueError, KeyError, TypeError):
        return
    if saved is not None:
        check_same_run(config, saved, config.run.output_dir)


def script(config: Config, asked: Resources, evaluation: list[str] | None) -> str:
    """The batch scripts that would be submitted."""
    folder = launches_of(config.run.output_dir) / "NEXT"
    scripts: list[str] = []
    for entry, _ in _entries(config, folder, evaluation):
        runner = _ScriptWriter(folder, python=_python(asked, folder))
        runner.update_parameters(**_slurm_parameters(config, asked, entry, after="TRAIN" if scripts else None))
        scripts.append(runner._make_submission_file_text(runner._submitit_command_str, uid=""))
    return "\n".join(scripts)


def _entries(config: Config, folder: Path, evaluation: list[str] | None) -> list[tuple[str, list[str]]]:
    """Entry points and their arguments, in the order in which they run."""
    settings = ["--config", str(folder / CONFIG)]
    entries = [("train", settings)]
    if evaluation is not None:
        output = Path(config.run.output_dir)
        result = str(output / f"evaluation_{folder.name}.json")
        entries.append(("evaluate", [*settings, "--adapter", str(output / "adapter"), "--output", result, *evaluation]))
    return entries


def _python(asked: Resources, folder: Path, after: str = _KEPT_PATH) -> str:
    """Python with the launch's own copy of the package before everything else: `python -m` alone would begin with the
    working directory, which may be a repository.

    Args:
        after: what follows the copy in PYTHONPATH, as the command takes it.
    """
    python = asked.python or shlex.quote(sys.executable)
    return f"env PYTHONSAFEPATH=1 PYTHONPATH={shlex.quote(str(folder / CODE))}{after} {python}"


def _executor(
    config: Config, asked: Resources, name: ExecutorName, folder: Path, entry: str, after: str | None
) -> Executor:
    if name == "debug":
        os.environ["SUBMITIT_FOLDER"] = str(folder)  # of a job, where a process of its own would set it
        return DebugExecutor(folder)
    if name == "local":
        above = os.environ.get("PYTHONPATH")  # no shell expands it
        python = _python(asked, folder, shlex.quote(f":{above}") if above else "")
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if asked.gpus and visible is not None:  # submitit counts from 0
            python = f"env CUDA_VISIBLE_DEVICES={shlex.quote(visible)} {python}"
        local = LocalExecutor(folder, python=python)
        local.update_parameters(
            tasks_per_node=asked.gpus_per_node,
            gpus_per_node=asked.gpus_per_node if asked.gpus else 0,
            timeout_min=asked.time,
            signal_delay_s=asked.signal_seconds,
            stderr_to_stdout=True,
        )
        return local
    slurm = SlurmExecutor(folder, python=_python(asked, folder))
    slurm.update_parameters(**_slurm_parameters(config, asked, entry, after))
    return slurm


@contextmanager
def _detached() -> Iterator[None]:
    """A process that is started inside outlives the terminal, and holds no pipe that somebody reads to its end. Ctrl-C,
    while launch.py waits, comes to the tasks alone, who save."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGHUP)}
    streams = [os.dup(stream) for stream in (0, 1, 2)]
    nothing = os.open(os.devnull, os.O_RDWR)
    try:
        for stream in (0, 1, 2):
            os.dup2(nothing, stream)
        yield
    finally:
        for stream, kept in enumerate(streams):
            os.dup2(kept, stream)
            os.close(kept)
        os.close(nothing)
        for number, handler in before.items():
            signal.signal(number, handler)


def _slurm_parameters(config: Config, asked: Resources, entry: str, after: str | None) -> dict[str, Any]:
    """submitit's names for them. `after`: the job whose success is waited for."""
    cpus = asked.cpus_per_task or config.data.num_workers + 1
    name = Path(config.run.output_dir).absolute().name
    # sbatch takes either, and submitit's own are these: a user's setting takes the place of ours
    more: dict[str, Any] = {name.replace("-", "_"): value for name, value in asked.sbatch.items()}
    if "open_mode" in more:  # the one that submitit writes with a hyphen
        more["open-mode"] = more.pop("open_mode")
    # a cluster's default may be that jobs are not requeued
    more = {"requeue": True} | more
    if after is not None:
        wanted = [f"afterok:{after}", *([str(more["dependency"])] if "dependency" in more else [])]
        more = {"kill_on_invalid_dep": "yes"} | more | {"dependency": ",".join(wanted)}
    left_out = {name for name, value in more.items() if str(value).lower() == "false"}
    optional = {
        "partition": asked.partition,
        "account": asked.account,
        "qos": asked.qos,
        "constraint": asked.constraint,
        "mem": asked.mem,
        "gpus_per_node": asked.gpus_per_node if asked.gpus else None,
    }
    parameters = {
        "job_name": name if entry == "train" else f"{name}-{entry}",
        "nodes": asked.nodes,
        "ntasks_per_node": asked.gpus_per_node,
        "cpus_per_task": cpus,
        "time": asked.time,
        "signal_delay_s": asked.signal_seconds,
        "stderr_to_stdout": True,
        "setup": list(asked.setup),
        "teardown": [_REQUEUE],
        # the first rank that ends badly ends the others, who would wait for it. srun does not take sbatch's CPUs
        "srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={cpus}", *asked.srun],
        "additional_parameters": {key: value for key, value in more.items() if key not in left_out},
        **{key: value for key, value in optional.items() if value is not None},
    }
    return {key: value for key, value in parameters.items() if key not in left_out}


def _said(error: Exception) -> str:
    text = error.stderr or "" if isinstance(error, subprocess.CalledProcessError) else str(error)
    lines = [line for line in str(text).splitlines() if "error" in line.lower()] or [str(error)]
    return " ".join(lines[0].split())[:300]
