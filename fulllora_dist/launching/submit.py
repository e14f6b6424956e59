"""From a config and resources to jobs: check, submit, or print the batch scripts."""

import io
import os
import re
import shutil
import subprocess
from contextlib import nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

from submitit.core.core import Job
from submitit.core.utils import FailedJobError, FailedSubmissionError

from fulllora_dist.config.schema import Config
from fulllora_dist.core.errors import UserError
from fulllora_dist.core.messages import one_line
from fulllora_dist.launching.executors import batch_script, build_executor, detached, own_environment
from fulllora_dist.launching.folder import CONFIG, launches_of, launching, make_folder, write_record
from fulllora_dist.launching.jobs import run_jobs
from fulllora_dist.launching.resources import ExecutorName, Resources
from fulllora_dist.launching.worker import Worker
from fulllora_dist.training.inputs import check_inputs
from fulllora_dist.training.resume import check_saved


def check(config: Config, resources: Resources, executor: ExecutorName, evaluates: bool) -> None:
    """Refuse what can be refused before anything is queued.

    Args:
        evaluates: whether an evaluation is to follow.

    Raises:
        UserError: naming the setting.
    """
    world = resources.nodes * resources.gpus_per_node
    if executor == "debug" and world > 1:
        raise UserError(f"--gpus-per-node: --executor debug runs one task in this process, not {world}")
    if executor != "slurm" and resources.nodes > 1:
        raise UserError(f"--nodes: --executor {executor} has one machine, not {resources.nodes}")
    if executor != "slurm" and evaluates:
        raise UserError(f"--evaluate: --executor {executor} has no queue; run evaluate.py after the training")
    if executor != "slurm" and resources.setup:
        raise UserError(f"--setup: --executor {executor} has no batch script to run it; run it in this shell before")
    if resources.signal_seconds >= resources.time * 60:
        raise UserError(
            f"--signal-seconds: {resources.signal_seconds} leave nothing of --time {resources.time} minutes"
        )
    if executor != "debug" and ":" in str(Path(config.run.output_dir).absolute()):
        raise UserError(
            f"run.output_dir: {config.run.output_dir}: ':' would end the folder's name in the jobs' PYTHONPATH"
        )
    check_inputs(config, world)
    check_weights(config, resources)
    check_saved(config)


def check_weights(config: Config, resources: Resources) -> None:
    """Refuse a tag of the hub whose weights nodes without internet cannot find.

    Raises:
        UserError: the jobs have HF_HUB_OFFLINE, from this shell or --setup, and the hub's cache lacks the weights.
    """
    lines = "\n".join([f"HF_HUB_OFFLINE={os.environ.get('HF_HUB_OFFLINE', '')}", *resources.setup])
    switches = re.findall(r"\bHF_HUB_OFFLINE=[\"']?(\w*)", lines)
    elsewhere = re.search(r"\b(HF_HOME|HF_HUB_CACHE|XDG_CACHE_HOME)=", lines)
    offline = switches[-1].upper() in ("1", "ON", "YES", "TRUE")  # as huggingface_hub reads it
    model = config.model
    if not offline or elsewhere or not model.pretrained or model.checkpoint_path is not None:
        return
    from fulllora_dist.models.hub import kept_weights  # of timm: only where there is something to look for

    if kept_weights(model.backbone) is None:
        raise UserError(
            f"model.backbone: the jobs have HF_HUB_OFFLINE={switches[-1]}, and the hub's cache here has no weights of "
            f"{model.backbone}; run `hf download timm/{model.backbone}` where there is internet, or set "
            "model.checkpoint_path to a file"
        )


def submit(
    config: Config,
    settings: list[str],
    resources: Resources,
    executor: ExecutorName,
    command: list[str],
    evaluation: list[str] | None = None,
) -> tuple[Path, list[Job[int]]]:
    """Submit the training and, given arguments of evaluate.py, an evaluation that begins after its success.

    Args:
        config: one that passed `check`.
        settings: what it was read from, as train.py takes it: --config FILE key=value ...
        command: the command line, for the record.
        evaluation: beyond --config, --adapter and --output.

    Returns:
        The launch's folder; the jobs, the training first.

    Raises:
        UserError: a job of the run is alive, or the scheduler refuses.
    """
    if executor == "slurm" and shutil.which("srun") is None:
        raise UserError("--executor slurm: srun not found; submit on a login node, or use --executor local")
    with launching(config.run.output_dir):
        refuse_second(config.run.output_dir)
        folder = make_folder(config)
        record: dict[str, Any] = {
            "command": command,
            "executor": executor,
            "host": os.uname().nodename,
            "resources": resources.model_dump(mode="json"),
            "jobs": [],
        }
        entries = _entries(config, folder, evaluation)
        if executor == "debug":  # this process has the code, and plugins of these names, already
            entries = [("train", settings)]
        jobs: list[Job[int]] = []
        try:
            for entry, arguments in entries:
                after = jobs[-1].job_id if jobs else None
                runner = build_executor(config, resources, executor, folder, entry, after)
                in_background = detached() if executor == "local" else nullcontext()
                ours = nullcontext() if executor == "debug" else own_environment(resources)
                with redirect_stderr(io.StringIO()), in_background, ours:
                    jobs.append(runner.submit(Worker(entry, arguments)))
                tasks = resources.nodes * resources.gpus_per_node
                record["jobs"].append({"id": jobs[-1].job_id, "entry": entry, "tasks": tasks})
                write_record(folder, record)
        except BaseException as error:
            for job in jobs:
                job.cancel()
            shutil.rmtree(folder)
            if isinstance(error, FailedJobError | FailedSubmissionError | subprocess.CalledProcessError):
                raise UserError(f"{executor} refuses the job: {_error_line(error)}") from None
            raise
        return folder, jobs


def refuse_second(output: str) -> None:
    """Raises:
    UserError: a job of the run is alive, or may be.
    """
    for job in run_jobs(output):
        if job.alive:
            raise UserError(f"run.output_dir: job {job.id} of {output} is {job.state}; cancel it first")
        if job.executor == "local" and job.state == "UNKNOWN":
            raise UserError(
                f"run.output_dir: only {job.nodes} knows whether job {job.id} of {output} is alive; launch there"
            )


def script(config: Config, resources: Resources, evaluation: list[str] | None) -> str:
    """The batch scripts that would be submitted."""
    folder = launches_of(config.run.output_dir) / "NEXT"
    scripts: list[str] = []
    for entry, _ in _entries(config, folder, evaluation):
        scripts.append(batch_script(config, resources, folder, entry, after="TRAIN" if scripts else None))
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


def _error_line(error: Exception) -> str:
    text = error.stderr or "" if isinstance(error, subprocess.CalledProcessError) else str(error)
    lines = [line for line in str(text).splitlines() if "error" in line.lower()] or [str(error)]
    return one_line(lines[0], 300)
