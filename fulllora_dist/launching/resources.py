"""Resources of a launch: a site's settings in a YAML profile, those of the launch on the command line."""

import math
import os
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BeforeValidator, Field, ValidationError
from yaml import YAMLError

from fulllora_dist.core.errors import UserError
from fulllora_dist.core.settings import Settings

ExecutorName = Literal["slurm", "local", "debug"]
EXECUTORS: tuple[str, ...] = get_args(ExecutorName)


def minutes(text: object) -> object:
    """A time as SLURM takes it (minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]]) in
    whole minutes, rounded up. YAML's own numbers are minutes; anything else is returned for the type to refuse."""
    if not isinstance(text, str) or text.isdigit():
        return text
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match is None:
        raise ValueError("must be a time such as 240, 4:00:00 or 1-12:00:00")
    days, first, second, third = (int(part or 0) for part in match.groups())
    if match[1] is None and match[4] is None:  # minutes:seconds
        return first + math.ceil(second / 60)
    return days * 1440 + first * 60 + second + math.ceil(third / 60)


class Resources(Settings):
    nodes: int = Field(1, ge=1)
    """Number of nodes."""
    gpus_per_node: int = Field(1, ge=1)
    """GPUs of each node; every GPU gets one task."""
    gpus: bool = True
    """false requests none, and gpus_per_node only counts tasks: for clusters without GPUs, and for sites that name
    theirs differently (sbatch: {gres: "gpu:a100:8"})."""
    cpus_per_task: int | None = Field(None, ge=1)
    """CPUs of a task; null takes data.num_workers + 1."""
    mem: str | None = None
    """Memory of a node, e.g. 400G; null takes the cluster's default."""
    time: Annotated[int, BeforeValidator(minutes), Field(ge=1)] = 240
    """Time limit of one start, as SLURM writes it (4:00:00, 1-12:00:00, or minutes). A run is restarted as often as it
    needs, and short jobs start sooner."""
    signal_seconds: int = Field(120, ge=1)
    """Time before the limit at which the run is told to save, to be requeued; SLURM may signal up to 60 s earlier. It
    should cover a training step, writing the checkpoint and the end of the processes."""
    partition: str | None = None
    """Partition."""
    account: str | None = None
    """Account to charge."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features that nodes must have."""
    python: str | None = None
    """Command that starts Python in the job, e.g. `apptainer exec --nv image.sif python`; null takes this one."""
    setup: tuple[str, ...] = ()
    """Shell lines of the batch script before the tasks start, e.g. `module load cuda`."""
    sbatch: Mapping[str, str | int | bool] = {}
    """Further arguments of sbatch: {reservation: mine, exclusive: true}."""
    srun: tuple[str, ...] = ()
    """Further arguments of srun: [--container-image=image.sqsh]."""


def read_profile(name: str, folder: str) -> dict[str, Any]:
    """The settings of a site, from a YAML file or from NAME.yaml in `folder`.

    Raises:
        UserError: there is none, or it is not a mapping.
    """
    path = name if name.endswith((".yaml", ".yml")) else os.path.join(folder, f"{name}.yaml")
    if not os.path.isfile(path):
        known = sorted(file.removesuffix(".yaml") for file in os.listdir(folder) if file.endswith(".yaml"))
        raise UserError(f"--profile: {path} does not exist; known: {', '.join(known)}, or the path of a YAML file")
    try:
        values: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
        if isinstance(values, dict) and isinstance(values.get("time"), int):  # YAML takes 4:00:00 for one of base 60
            with open(path) as file:
                written: Any = yaml.compose(file, yaml.SafeLoader)
            values["time"] = next((value.value for key, value in written.value if key.value == "time"), values["time"])
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise UserError(f"--profile: {path} is not valid YAML: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(values, dict):
        raise UserError(f"--profile: {path} is empty or a list; it should hold settings such as partition: gpu")
    return values


def resources(profile: Mapping[str, Any], given: Mapping[str, Any]) -> Resources:
    """Settings of the command line override those of a profile; sbatch options are merged by name, srun's appended.

    Raises:
        UserError: one line that names the setting.
    """
    merged = {**profile, **{name: value for name, value in given.items() if value is not None}}
    below, above = profile.get("sbatch"), given.get("sbatch")
    if isinstance(below, Mapping) and above is not None:
        merged["sbatch"] = {**below, **above}
    below, above = profile.get("srun"), given.get("srun")
    if isinstance(below, list) and above is not None:
        merged["srun"] = [*below, *above]
    try:
        return Resources.model_validate(merged)
    except ValidationError as error:
        details = error.errors()[0]
        name = ".".join(str(part) for part in details["loc"])
        option = "--" + name.replace("_", "-")
        source = option if given.get(name) is not None else f"--profile: {name}"
        if details["type"] == "extra_forbidden":
            raise UserError(f"{source} is not a setting; known: {', '.join(Resources.model_fields)}") from None
        raise UserError(
            f"{source}: {details['msg'].removeprefix('Value error, ')} (got {details['input']!r})"
        ) from None
