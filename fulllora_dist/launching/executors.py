"""submitit's executors as a launch uses them, and the batch script that SLURM gets."""

import os
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from submitit import DebugExecutor, LocalExecutor, SlurmExecutor
from submitit.core.core import Executor
from submitit.helpers import clean_env

from fulllora_dist.checkpoints.manager import checkpoint_places
from fulllora_dist.config.schema import Config
from fulllora_dist.launching.folder import CODE
from fulllora_dist.launching.requeue import begin, end
from fulllora_dist.launching.resources import ExecutorName, Resources
from fulllora_dist.storage.urls import is_remote

_KEPT_PATH = '"${PYTHONPATH:+:$PYTHONPATH}"'  # as the batch script's shell expands it
# for the others once a task has ended well. A site's default may be too short for rank 0, which publishes at the end,
# or endless, so that one that hangs there holds all nodes
_WAIT_SECONDS = 1800


class _ScriptWriter(SlurmExecutor):
    """Writes the batch script on machines without SLURM too."""

    @classmethod
    def affinity(cls) -> int:
        return 1


def build_executor(
    config: Config, resources: Resources, name: ExecutorName, folder: Path, entry: str, after: str | None
) -> Executor:
    """The executor of one job.

    Args:
        folder: of the launch.
        entry: train or evaluate.
        after: id of the job that must succeed first.
    """
    if name == "debug":
        os.environ["SUBMITIT_FOLDER"] = str(folder)  # a job in a process of its own would have it set
        return DebugExecutor(folder)
    if name == "local":
        inherited = os.environ.get("PYTHONPATH")  # no shell expands it
        python = _python(resources, folder, shlex.quote(f":{inherited}") if inherited else "")
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if resources.gpus and visible is not None:  # submitit counts from 0
            python = f"env CUDA_VISIBLE_DEVICES={shlex.quote(visible)} {python}"
        local = LocalExecutor(folder, python=python)
        local.update_parameters(
            tasks_per_node=resources.gpus_per_node,
            gpus_per_node=resources.gpus_per_node if resources.gpus else 0,
            timeout_min=resources.time,
            signal_delay_s=resources.signal_seconds,
            stderr_to_stdout=True,
        )
        return local
    return _slurm(SlurmExecutor, config, resources, folder, entry, after)


def batch_script(config: Config, resources: Resources, folder: Path, entry: str, after: str | None) -> str:
    """The batch script that `build_executor` would submit to SLURM."""
    writer = _slurm(_ScriptWriter, config, resources, folder, entry, after)
    return writer._make_submission_file_text(writer._submitit_command_str, uid="")


def _python(resources: Resources, folder: Path, inherited: str = _KEPT_PATH) -> str:
    """Python with the launch's own copy of the package before everything else: `python -m` alone would begin with the
    working directory, which may be a repository.

    Args:
        inherited: the rest of PYTHONPATH, as the command takes it.
    """
    python = resources.python or shlex.quote(sys.executable)
    return f"env PYTHONSAFEPATH=1 PYTHONPATH={shlex.quote(str(folder / CODE))}{inherited} {python}"


def _slurm(
    kind: type[SlurmExecutor], config: Config, resources: Resources, folder: Path, entry: str, after: str | None
) -> SlurmExecutor:
    cpus = resources.cpus_per_task or config.data.num_workers + 1
    name = Path(config.run.output_dir).absolute().name
    # sbatch takes either spelling, and submitit's own are these: a user's setting replaces ours
    more: dict[str, Any] = {option.replace("-", "_"): value for option, value in resources.sbatch.items()}
    if "open_mode" in more:  # the one that submitit writes with a hyphen
        more["open-mode"] = more.pop("open_mode")
    # a cluster's default may be that jobs are not requeued
    more = {"requeue": True} | more
    if after is not None:
        dependencies = [f"afterok:{after}", *([str(more["dependency"])] if "dependency" in more else [])]
        more = {"kill_on_invalid_dep": "yes"} | more | {"dependency": ",".join(dependencies)}
    # what a bucket has, a batch script cannot see
    saved = [os.path.abspath(place) for place in checkpoint_places(config.run) if not is_remote(place)]
    omitted = {option for option, value in more.items() if value is False}
    parameters = {
        "job_name": name if entry == "train" else f"{name}-{entry}",
        "nodes": resources.nodes,
        "ntasks_per_node": resources.gpus_per_node,
        "cpus_per_task": cpus,
        "time": resources.time,
        "signal_delay_s": resources.signal_seconds,
        "stderr_to_stdout": True,
        "setup": [*resources.setup, begin(folder)],
        "teardown": [end(saved)],
        # the first rank that fails ends the others, who would wait for it. srun does not inherit sbatch's CPUs
        "srun_args": [
            "--kill-on-bad-exit=1",
            f"--wait={_WAIT_SECONDS}",
            f"--cpus-per-task={cpus}",
            *resources.srun,
        ],
        "additional_parameters": {option: value for option, value in more.items() if option not in omitted},
        "gpus_per_node": resources.gpus_per_node if resources.gpus else None,
        **{key: getattr(resources, key) for key in ("partition", "account", "qos", "constraint", "mem")},
    }
    executor = kind(folder, python=_python(resources, folder))
    executor.update_parameters(
        **{key: value for key, value in parameters.items() if value is not None and key not in omitted}
    )
    return executor


_REACH = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT", "SLURM_CLUSTERS", "SBATCH_CLUSTERS", "SBATCH_EXPORT")
"""Variables by which the cluster is reached, or a site's environment is made."""
_PLACES = ("partition", "account", "qos", "constraint", "reservation")


@contextmanager
def own_environment(resources: Resources) -> Iterator[None]:
    """Without the variables of the job that launch.py may run in, such as SLURM_MEM_PER_CPU, which srun would take for
    the new job's, and without those of sbatch that override its script; a site's default partition and the like stay
    where the launch names none."""
    named = resources.sbatch.keys() | resources.model_dump(exclude_none=True).keys()
    kept = [*_REACH, *(f"SBATCH_{place.upper()}" for place in _PLACES if place not in named)]
    inside = "SLURM_JOB_ID" in os.environ
    if not inside:
        kept += [name for name in os.environ if name.startswith(("SLURM_", "SRUN_"))]
    others = [name for name in os.environ if inside and name.startswith(("PMI_", "PMIX_", "OMPI_COMM_WORLD_"))]
    values = {name: os.environ[name] for name in kept if name in os.environ}
    with clean_env(others):
        os.environ.update(values)
        yield


@contextmanager
def detached() -> Iterator[None]:
    """A process started inside outlives the terminal, and holds no pipe that somebody reads to its end. Ctrl-C, while
    launch.py waits, reaches the tasks alone, which save."""
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGHUP)}
    streams = [os.dup(stream) for stream in (0, 1, 2)]
    null = os.open(os.devnull, os.O_RDWR)
    try:
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        yield
    finally:
        for stream, kept in enumerate(streams):
            os.dup2(kept, stream)
            os.close(kept)
        os.close(null)
        for number, handler in handlers.items():
            signal.signal(number, handler)
