"""Which of several tasks this process is, before torch is imported: from the launcher's variables in the environment.

`deepspeed`, `torchrun` and our own jobs set RANK and WORLD_SIZE. Where another launcher started several tasks, each
would take itself for the only one: their ranks come from the launcher's own variables.
"""

import os
import subprocess
import sys

from fulllora_dist.core.errors import UserError

FIRST_PORT, PORTS = 20_000, 12_000  # below 32,768, where ports of outgoing connections begin

# (number of tasks, rank, rank on the node); those of an MPI first: it may have started its daemons with srun.
# SLURM_NTASKS says nothing: sbatch sets it for its script, too, which runs once
_LAUNCHERS = {
    "mpirun": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "mpiexec": ("PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID"),
    "srun": ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID"),
}


def is_main_process() -> bool:
    """Whether this is rank 0."""
    return int(os.environ.get("RANK", "0")) == 0


def world_size() -> int:
    """Number of ranks."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def say(line: str) -> None:
    """Print a line to stderr on rank 0."""
    if is_main_process():
        print(line, file=sys.stderr, flush=True)


def ranks() -> tuple[int, int, int]:
    """RANK, WORLD_SIZE and LOCAL_RANK; those of a single process where they are not set.

    Raises:
        UserError: one of them is no such number.
    """
    found = {}
    for variable, least in {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}.items():
        value = os.environ.get(variable, str(least))
        if not (value.isdecimal() and int(value) >= least):
            os.environ.pop("RANK", None)  # it says who prints the line
            raise UserError(f"{variable} must be an integer >= {least}, as set by a launcher, got {value!r}")
        found[variable] = int(value)
    return found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"]


def join_launcher() -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT if srun or an MPI started several tasks without
    them. Nothing if RANK or WORLD_SIZE is set: WORLD_SIZE=1 makes a task one of its own.

    Raises:
        UserError: it is not known where rank 0 listens, or the variables are no integers.
    """
    ranks()
    if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
        return
    name = next((name for name, (size, *_) in _LAUNCHERS.items() if _number(size, 1) > 1), None)
    if name is None:
        return
    size, rank, local = _LAUNCHERS[name]
    if name == "mpiexec" and os.environ.get("SLURM_STEP_NUM_TASKS") == os.environ[size]:  # srun --mpi=pmi2
        name = "srun"
        size, rank, local = _LAUNCHERS[name]
    world = _number(size, 1)
    os.environ |= {"RANK": str(_number(rank, 0)), "WORLD_SIZE": str(world)}  # one of them alone reports an error
    if os.environ.get("MASTER_ADDR") and os.environ.get("MASTER_PORT"):
        os.environ["LOCAL_RANK"] = str(_number(local, 0))
        return
    if name != "srun":
        raise UserError(
            f"{name} started {world} tasks ({size}), but MASTER_ADDR and MASTER_PORT are not set; set them to the host "
            "of rank 0 and a free port, or start with `deepspeed` or `torchrun` instead"
        )
    port = FIRST_PORT + (_number("SLURM_JOB_ID", 0) + 97 * _number("SLURM_STEP_ID", 0)) % PORTS
    os.environ |= {
        "LOCAL_RANK": str(_number(local, 0)),
        "MASTER_ADDR": os.environ.get("MASTER_ADDR") or _first_node(),
        "MASTER_PORT": os.environ.get("MASTER_PORT") or str(port),
    }


def _first_node() -> str:
    """Where rank 0 of a step of srun is."""
    if _number("SLURM_STEP_NUM_NODES", 1) == 1:
        return "127.0.0.1"
    nodes = os.environ.get("SLURM_STEP_NODELIST", "")
    try:
        shown = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
        return shown.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        raise UserError(
            f"srun started tasks on {nodes or 'several nodes'}, and scontrol does not say on which is the first; set "
            "MASTER_ADDR to it and MASTER_PORT to a free port there"
        ) from None


def _number(name: str, default: int) -> int:
    text = os.environ.get(name) or str(default)
    if not text.isdecimal():
        raise UserError(f"{name} must be an integer, as set by a launcher, got {text!r}")
    return int(text)
