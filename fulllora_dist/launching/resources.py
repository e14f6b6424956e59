"""Resources of a launch: a site's settings in a YAML profile, those of the launch on the command line."""

import math
import os
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from fulllora_dist.config.yaml_text import read_yaml
from fulllora_dist.core.errors import UserError
from fulllora_dist.core.settings import Settings, explain, first_error
from fulllora_dist.core.suggest import suggestion

ExecutorName = Literal["slurm", "local", "debug"]
EXECUTORS: tuple[str, ...] = get_args(ExecutorName)


def minutes(text: object) -> object:
    """A time as SLURM takes it (minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]]) in
    whole minutes, rounded up. A number is minutes; anything else is returned for the type to refuse."""
    if not isinstance(text, str) or text.isdigit():
        return text
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match is None:
        raise ValueError("must be a time such as 240, 4:00:00 or 1-12:00:00")
    days, first, second, third = (int(part or 0) for part in match.groups())
    if match[1] is None and match[4] is None:  # minutes:seconds
        return first + math.ceil(second / 60)
    return days * 1440 + first * 60 + second + math.ceil(third / 60)


_TASKS = "every GPU gets one task: use --nodes and --gpus-per-node"
_OURS = {
    "array": "a run is one job; launch each run with a run.output_dir of its own",
    "nodes N": "use --nodes",
    "ntasks n ntasks-per-node tasks-per-node ntasks-per-gpu ntasks-per-core ntasks-per-socket": _TASKS,
    "gpus G gpus-per-node gpus-per-task gpus-per-socket": "use --gpus-per-node, or --no-gpus for none",
    "cpus-per-task c cpus-per-gpu": "use --cpus-per-task",
    "mem": "use --mem",
    "time t": "use --time",
    "signal": "use --signal-seconds",
    "partition p": "use --partition",
    "account A": "use --account",
    "qos q": "use --qos",
    "constraint C": "use --constraint",
    "output o error e input i": "the logs are in RUN/launches, where `fulllora launch logs` finds them",
    "chdir D": "launch from that folder: paths are relative to it",
    "wrap test-only parsable wait W": "a batch script is submitted, see --dry-run and --wait",
}
OURS = {option: remedy for options, remedy in _OURS.items() for option in options.split()}
"""Options of sbatch and srun that would contradict ours."""


def _refuse_ours(option: str) -> None:
    name = option.lstrip("-").partition("=")[0]
    short = not option.startswith("--") and len(name) > 1 and option.startswith("-")  # -N2
    name = name[0] if short else name.replace("_", "-")
    if name in OURS:
        raise ValueError(f"{name} would contradict the launch; {OURS[name]}")


class Resources(Settings):
    nodes: int = Field(1, ge=1)
    """Number of nodes."""
    gpus_per_node: int = Field(1, ge=1)
    """GPUs of each node; every GPU gets one task."""
    gpus: bool = True
    """false requests none, and gpus_per_node only counts tasks: for clusters without GPUs, and for sites that name
    theirs differently (sbatch: {gres: "gpu:a100:8"})."""
    cpus_per_task: int | None = Field(None, ge=1)
    """CPUs of a task; without it, data.num_workers + 1."""
    mem: str | None = None
    """Memory of a node, e.g. 400G; without it, the cluster's default."""
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
    """Command that starts Python in the job, e.g. `apptainer exec --nv image.sif python`; without it, this one."""
    setup: tuple[str, ...] = ()
    """Shell lines of the batch script before the tasks start, e.g. `module load cuda`."""
    sbatch: Mapping[str, str | int | bool] = {}
    """Further arguments of sbatch: {reservation: mine, exclusive: true}."""
    srun: tuple[str, ...] = ()
    """Further arguments of srun: [--container-image=image.sqsh]."""

    @model_validator(mode="after")
    def _one_spelling(self) -> "Resources":
        asked = {option.replace("_", "-"): str(value) for option, value in self.sbatch.items()}
        if self.gpus and "gpu" in asked.get("gres", ""):
            raise ValueError("gres asks for GPUs, as --gpus-per-node does; add --no-gpus")
        if self.mem is not None and (both := asked.keys() & {"mem-per-cpu", "mem-per-gpu"}):
            raise ValueError(f"{min(both)} contradicts --mem {self.mem}; remove one")
        return self

    @field_validator("sbatch")
    @classmethod
    def _no_other_size(cls, sbatch: Mapping[str, str | int | bool]) -> Mapping[str, str | int | bool]:
        for option in sbatch:
            _refuse_ours(option)
        truth = {"true": True, "false": False}
        return {option: truth.get(str(value).lower(), value) for option, value in sbatch.items()}

    @field_validator("srun")
    @classmethod
    def _no_other_step(cls, srun: tuple[str, ...]) -> tuple[str, ...]:
        for option in " ".join(srun).split():
            if option.startswith("-"):
                _refuse_ours(option)
        return srun


def read_profile(name: str, folder: str) -> dict[str, Any]:
    """The settings of a site, from a YAML file or from NAME.yaml in `folder`.

    Raises:
        UserError: there is none, or it is not YAML with settings.
    """
    path = name if name.endswith((".yaml", ".yml")) else os.path.join(folder, f"{name}.yaml")
    if not os.path.isfile(path):
        files = os.listdir(folder) if os.path.isdir(folder) else []  # a wheel has none
        known = ", ".join(sorted(file.removesuffix(".yaml") for file in files if file.endswith(".yaml")))
        choices = f"known: {known}, or the path of a YAML file" if known else "give the path of a YAML file"
        raise UserError(f"--profile: {path} does not exist; {choices}")
    return read_yaml(path, "--profile")


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
        details = first_error(error)
        section, *_ = details["loc"] or ("sbatch",)  # which _one_spelling is about
        name = ".".join(str(part) for part in details["loc"] or (section,))
        option = "--" + name.replace("_", "-")
        source = option if given.get(section) is not None else f"--profile: {name}"
        if details["type"] == "extra_forbidden":
            raise UserError(f"{source} is not a setting; {suggestion(name, Resources.model_fields)}") from None
        raise UserError(f"{source}: {explain(error).removeprefix(f'{name}: ')}") from None
