"""Launching from inside an allocation, options that contradict the launch, a port in use, and SLURM's own reasons."""

import json
import os
import re
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from fulllora_dist.commands.launch import given, launch_arguments
from fulllora_dist.core.errors import UserError
from fulllora_dist.distributed.comm import free_port
from fulllora_dist.launching.executors import own_environment
from fulllora_dist.launching.jobs import RunJob
from fulllora_dist.launching.report import status
from fulllora_dist.launching.resources import Resources, resources
from tests.door.conftest import ROOT
from tests.ranks import RankServer

LAUNCH = ROOT / "jobs" / "launch.py"
CONFIG = """
model: {backbone: vit_tiny_patch16_224, pretrained: false, num_classes: 2, image_size: 16}
threat: {eps: 8/255}
method: pgd
data: {train: shards, num_workers: 0}
run: {output_dir: run}
tracking: none
"""
# what sbatch and srun set in a job of 4 tasks with --mem-per-cpu, as SLURM 22.05 does
INSIDE = {
    "SLURM_JOB_ID": "77", "SLURM_JOBID": "77", "SLURM_MEM_PER_CPU": "4000", "SLURM_NTASKS": "4", "SLURM_NPROCS": "4",
    "SLURM_NNODES": "1", "SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS_PER_NODE": "4", "SLURM_CPUS_PER_TASK": "8",
    "SLURM_TRES_PER_TASK": "cpu:8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4", "SLURM_ARRAY_TASK_ID": "3", "SLURMD_NODENAME": "n1", "SRUN_DEBUG": "3",
    "SLURM_CPU_BIND": "quiet,mask_cpu:0x1", "SLURM_GPUS_PER_NODE": "4", "SLURM_EXPORT_ENV": "NONE", "PMI_RANK": "0",
    "PMI_SIZE": "4", "SUBMITIT_EXECUTOR": "slurm", "RANK": "0", "WORLD_SIZE": "4", "MASTER_PORT": "29500",
}  # fmt: skip
SITE = {"SLURM_CONF": "/etc/slurm/slurm.conf", "SBATCH_ACCOUNT": "mine", "SBATCH_EXPORT": "ALL"}
OVERRIDES = {"SBATCH_TIMELIMIT": "1", "SBATCH_ARRAY_INX": "0-9", "SBATCH_MEM_PER_CPU": "1G", "SBATCH_GPUS": "1"}
SCHEDULER = {"SLURM_", "SLURMD_", "SRUN_", "SBATCH_", "PMI_", "SUBMITIT_", "RANK", "WORLD_SIZE", "MASTER_"}


def of_scheduler(environment: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(tuple(SCHEDULER))}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """run.yaml, shards/, and programs `sbatch`, which keeps script and environment of what is submitted, and `srun`."""
    import numpy as np
    from PIL import Image

    from fulllora_dist.data.shards.make import make_shards

    folder = tmp_path_factory.mktemp("site")
    for i in range(16):
        path = folder / "images" / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((16, 16, 3), i, np.uint8)).save(path)
    make_shards(folder / "images", folder / "shards", workers=1, progress=False)
    (folder / "run.yaml").write_text(CONFIG.replace("shards", f"{folder}/shards") + "optim: {batch_size: 8}\n")
    (folder / "bin").mkdir()
    for name, text in {
        "sbatch": f'env -0 > {folder}/environment; cp "$1" {folder}/script; echo Submitted batch job 4711',
        "srun": "exit 1",
    }.items():
        program = folder / "bin" / name
        program.write_text(f"#!/bin/sh\n{text}\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return folder


def submitted(site: Path, server: RankServer, environment: dict[str, str], run: str, *arguments: str) -> dict[str, str]:
    """What sbatch sees of the scheduler's variables."""
    clean = {name: value for name, value in os.environ.items() if name not in of_scheduler(dict(os.environ))}
    clean["PATH"] = f"{site}/bin:{clean['PATH']}"
    command = ["--config", "run.yaml", f"run.output_dir={run}", "--no-gpus", *arguments]
    done = server.launch(LAUNCH, *command, cwd=site, env=clean | environment).wait()
    assert done.returncode == 0, done.stderr
    assert done.stderr.endswith(": job 4711\n")
    pairs = (site / "environment").read_text().split("\0")
    return of_scheduler(dict(pair.split("=", 1) for pair in pairs if "=" in pair))


def test_a_job_inherits_nothing_of_the_job_it_is_launched_in(site: Path, rank_server: RankServer) -> None:
    assert submitted(site, rank_server, INSIDE | SITE | OVERRIDES, "inside") == SITE


def test_on_a_login_node_only_what_overrides_the_script_goes(site: Path, rank_server: RankServer) -> None:
    login = {"SLURM_CONF": "/etc/slurm/slurm.conf", "SLURM_MPI_TYPE": "pmix", "SBATCH_PARTITION": "old"}
    found = submitted(site, rank_server, login | OVERRIDES, "login", "--partition", "gpu")
    assert found == {"SLURM_CONF": "/etc/slurm/slurm.conf", "SLURM_MPI_TYPE": "pmix"}
    assert "#SBATCH --partition=gpu" in (site / "script").read_text()


def test_the_shell_keeps_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (INSIDE | OVERRIDES).items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    with own_environment(Resources()):
        assert of_scheduler(dict(os.environ)) == {}
    assert dict(os.environ) == before


@pytest.mark.parametrize("variable", ["account", "partition", "qos", "constraint", "reservation"])
def test_a_site_s_default_stays_where_the_launch_names_none(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    name = f"SBATCH_{variable.upper()}"
    monkeypatch.setenv(name, "site")
    ours = Resources(sbatch={variable: "ours"}) if variable == "reservation" else Resources(**{variable: "ours"})
    with own_environment(Resources()):
        assert os.environ[name] == "site"
    with own_environment(ours):
        assert name not in os.environ


CONTRADICTIONS = [
    ("--sbatch", "array=0-3", "array would contradict the launch; a run is one job; launch each run with a run."),
    ("--sbatch", "--array=0-3", "array would contradict the launch; a run is one job"),
    ("--sbatch", "nodes=2", "nodes would contradict the launch; use --nodes"),
    ("--sbatch", "N=2", "N would contradict the launch; use --nodes"),
    ("--sbatch", "ntasks=8", "ntasks would contradict the launch; every GPU gets one task: use --nodes and"),
    ("--sbatch", "ntasks_per_node=8", "ntasks-per-node would contradict the launch; every GPU gets one task"),
    ("--sbatch", "gpus=8", "gpus would contradict the launch; use --gpus-per-node, or --no-gpus for none"),
    ("--sbatch", "gpus-per-task=1", "gpus-per-task would contradict the launch; use --gpus-per-node"),
    ("--sbatch", "gres=gpu:4", "gres asks for GPUs, as --gpus-per-node does; add --no-gpus"),
    ("--sbatch", "cpus-per-task=7", "cpus-per-task would contradict the launch; use --cpus-per-task"),
    ("--sbatch", "time=10", "time would contradict the launch; use --time"),
    ("--sbatch", "signal=USR1", "signal would contradict the launch; use --signal-seconds"),
    ("--sbatch", "output=x", "output would contradict the launch; the logs are in RUN/launches"),
    ("--sbatch", "chdir=/x", "chdir would contradict the launch; launch from that folder"),
    ("--srun", "--ntasks=2", "ntasks would contradict the launch; every GPU gets one task"),
    ("--srun", "-n 2", "n would contradict the launch; every GPU gets one task"),
    ("--srun", "-N2", "N would contradict the launch; use --nodes"),
]


@pytest.mark.parametrize(("option", "value", "words"), CONTRADICTIONS)
def test_options_that_contradict_the_launch_are_refused(
    site: Path, refused: Callable[..., str], option: str, value: str, words: str
) -> None:
    """By command line, and from a profile."""
    given = [f"{option}={value}"]
    line = refused(LAUNCH, "--config", "run.yaml", "--dry-run", *given, cwd=site, keep=(site,))
    assert line.startswith(f"error: {option}: {words}"), line
    name, _, text = value.removeprefix("--").partition("=")
    with pytest.raises(UserError) as caught:
        resources({"sbatch": {name: text}} if option == "--sbatch" else {"srun": [value]}, {})
    assert str(caught.value).startswith(f"--profile: {option[2:]}: {words}"), str(caught.value)


@pytest.mark.parametrize(
    ("option", "value", "example"),
    [
        ("--sbatch", "{reservation: mine, exclusive: true}", "--sbatch exclusive"),
        ("--srun", "[--container-image=image.sqsh]", "--srun=--mpi=none"),
        ("--srun", " {a: b}", "--srun=--mpi=none"),
    ],
)
def test_what_profiles_write_is_no_option(option: str, value: str, example: str) -> None:
    args = launch_arguments().parse_args(["--config", "x", option, value])
    with pytest.raises(UserError) as caught:
        given(args)
    assert str(caught.value) == f"{option}: {value!r} is as profiles have it; repeat the option, e.g. {example}"


def test_options_beside_ours_are_passed_on() -> None:
    asked = {"reservation": "mine", "exclusive": "true", "requeue": "false", "gres": "gpu:a100:8", "nice": 3}
    found = resources({"sbatch": asked, "srun": ["--cpu-bind=cores", "--mpi none"], "gpus": False}, {})
    assert found.sbatch == asked | {"exclusive": True, "requeue": False}
    assert found.srun == ("--cpu-bind=cores", "--mpi none")
    with pytest.raises(UserError, match=r"^--profile: sbatch: mem-per-cpu contradicts --mem 4G; remove one"):
        resources({"sbatch": {"mem-per-cpu": "1G"}, "mem": "4G"}, {})


@pytest.fixture
def taken() -> socket.socket:
    """A port that somebody listens on."""
    with socket.socket() as listener:
        listener.bind(("0.0.0.0", free_port()))
        listener.listen()
        yield listener  # type: ignore[misc]


@pytest.mark.parametrize(
    ("environment", "advice"),
    [
        ({}, "choose another one: deepspeed --master_port N, torchrun --master-port N"),
        ({"SUBMITIT_EXECUTOR": "slurm"}, "it follows from the job's number, so launch again for another one"),
    ],
)
def test_a_port_in_use_is_named(
    site: Path, rank_server: RankServer, taken: socket.socket, environment: dict[str, str], advice: str
) -> None:
    """Rank 0, which serves the port; the launcher ends the others."""
    port = taken.getsockname()[1]
    rank = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    done = rank_server.launch(
        ROOT / "fulllora_dist" / "train.py", "--config", "run.yaml", "run.output_dir=port", cwd=site,
        env=dict(os.environ) | rank | environment, timeout=60,
    ).wait()  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"error: MASTER_PORT: port {port} of {socket.gethostname()} is in use by another program, such as another run; "
        f"{advice}\n"
    )
    assert not (site / "port").exists()


@pytest.mark.parametrize("port", ["http", "0x10", "-1", "70000", ""])
def test_a_port_that_is_none_is_named(site: Path, rank_server: RankServer, port: str) -> None:
    rank = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    done = rank_server.launch(
        ROOT / "fulllora_dist" / "train.py", "--config", "run.yaml", "run.output_dir=port", cwd=site,
        env=dict(os.environ) | rank, timeout=60,
    ).wait()  # fmt: skip
    assert done.returncode == 2
    assert re.fullmatch(r"error: MASTER_(PORT: must be a port such as 29500, got '.*'|ADDR and .*)\n", done.stderr)


STARTED = "submitit INFO (2026-11-30 10:00:00,000) - Starting with JobEnvironment(job_id=7, hostname=n1)\nepoch 1\n"
CANCELLED = "slurmstepd: error: *** STEP 7.0 ON n1 CANCELLED AT 2026-11-30T10:05:00 ***\n"
OOM = "slurmstepd: error: Detected 1 oom_kill event in StepId=7.0. Some of the step tasks have been OOM Killed."
LOST = (
    "slurmstepd: error: *** STEP 7.0 ON n1 CANCELLED AT 2026-11-30T10:05:00 DUE TO NODE FAILURE, SEE SLURMCTLD LOG FOR "
    "DETAILS ***"
)
REASONS = [
    (
        "srun: error: Unable to create step for job 7: Memory required by task is not available\n",
        "srun: error: Unable to create step for job 7: Memory required by task is not available",
    ),
    (
        "srun: fatal: SLURM_MEM_PER_CPU, SLURM_MEM_PER_GPU, and SLURM_MEM_PER_NODE are mutually exclusive.\n",
        "srun: fatal: SLURM_MEM_PER_CPU, SLURM_MEM_PER_GPU, and SLURM_MEM_PER_NODE are mutually exclusive.",
    ),
    (
        f"{STARTED}srun: error: n1: task 0: Exited with exit code 140\n{CANCELLED}"
        "srun: error: Unable to create step for job 7: Invalid generic resource (gres) specification\n",
        "srun: error: Unable to create step for job 7: Invalid generic resource (gres) specification",
    ),
    (
        f"{STARTED} 50%|#| {OOM}\nsrun: error: n1: task 1: Out Of Memory\nsrun: Terminating StepId=7.0\n{CANCELLED}",
        f"task 1: Out Of Memory on n1 ({OOM})",
    ),
    (
        f"{STARTED}slurmstepd: error: *** STEP 7.0 ON n1 CANCELLED AT 2026-11-30T10:05:00 DUE TO TIME LIMIT ***\n"
        "srun: Job step aborted: Waiting up to 32 seconds for job step to finish.\n",
        "slurmstepd: error: *** STEP 7.0 ON n1 CANCELLED AT 2026-11-30T10:05:00 DUE TO TIME LIMIT ***",
    ),
    (f"{STARTED}{LOST}\n", LOST),
    (
        "slurmstepd: error: execve(): python3.99: No such file or directory\nsrun: error: n1: task 0: Exited with exit "
        "code 2\n",
        "task 0: Exited with exit code 2 on n1 (slurmstepd: error: execve(): python3.99: No such file or directory)",
    ),
    (
        "srun: error: CPU binding outside of job step allocation, allocated CPUs are: 0x1.\n"
        "srun: error: Task launch for StepId=7.0 failed on node n1: Unable to satisfy cpu bind request\n"
        "srun: error: Application launch failed: Unable to satisfy cpu bind request\nsrun: Job step aborted\n",
        "srun: error: Application launch failed: Unable to satisfy cpu bind request",
    ),
    (f"{STARTED}srun: error: n2: task 1: Killed\n{CANCELLED}", "task 1: Killed on n2"),
    (STARTED, None),
]  # fmt: skip


@pytest.mark.parametrize(("log", "reason"), REASONS)
def test_slurm_s_own_reason_is_in_status(tmp_path: Path, log: str, reason: str | None) -> None:
    """The scheduler has forgotten the job, or is not there: its logs know."""
    folder = tmp_path / "launches" / "001"
    folder.mkdir(parents=True)
    job = {"id": "7", "entry": "train", "tasks": 2}
    (folder / "launch.json").write_text(json.dumps({"executor": "local", "host": os.uname().nodename, "jobs": [job]}))
    (folder / "config.yaml").write_text(
        json.dumps({"run": {"output_dir": str(tmp_path)}, "tracking": {"enabled": False}})
    )
    known = RunJob(folder, "7", "train", 2, "slurm", "FAILED")
    known.log().write_text(log)
    assert known.failure() == reason
    assert status(str(tmp_path)).splitlines()[-1] == f"job 7: {reason or f'FAILED; its log is {known.log()}'}"
