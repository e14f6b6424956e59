"""Two runs in one folder: exactly one trains, the other is told who does; a run that is gone is taken over at once."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from fulllora_dist.core.errors import UserError
from fulllora_dist.distributed.comm import free_port
from fulllora_dist.storage import folder_lock
from fulllora_dist.storage.folder_lock import FolderLock, Holder
from tests.door.runs import EVALUATE, TRAIN, make_config, reached
from tests.ranks import RankServer

ENDLESS = ["optim.epochs=100000", "run.checkpoint_every=20"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_config(tmp_path_factory.mktemp("lock"))


def lock(folder: Path, said: list[str] | None = None) -> FolderLock:
    return FolderLock(folder / "run.lock", "run.output_dir", (said if said is not None else []).append)


def held_by(folder: Path, holder: Holder, age: float = 0) -> Path:
    """A lock file that another process left, renewed so many seconds ago."""
    file = folder / "run.lock.3"
    file.write_text(json.dumps(asdict(holder)))
    os.utime(file, (time.time() - age,) * 2)
    return file


def ended_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


ELSEWHERE = {"host": "node7", "machine": "node7 other", "pid": 77}


# -- who is gone, and who is not ---------------------------------------------------------------------------------------


def test_one_that_is_held_is_refused_by_name_and_given_back(tmp_path: Path) -> None:
    first, second = lock(tmp_path), lock(tmp_path)
    first.acquire()
    for attempt in (second.check, second.acquire):
        with pytest.raises(UserError) as refused:
            attempt()
        assert re.fullmatch(
            rf"run.output_dir: {tmp_path} is in use by process {os.getpid()} on {socket.gethostname()}, since "
            rf"\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d; wait until it ends, stop it \(kill {os.getpid()} on "
            rf"{socket.gethostname()}\), or choose another folder",
            str(refused.value),
        )
    assert [path.name for path in tmp_path.iterdir()] == ["run.lock.1"]
    first.release()
    assert not list(tmp_path.iterdir())
    second.acquire()
    second.release()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "age", "environment", "reason"),
    [
        (lambda: {"pid": ended_process()}, 0, {}, "the process is gone"),
        (lambda: {"started": "1"}, 0, {}, "the process is gone"),  # its number is another's by now
        (lambda: {**ELSEWHERE, "job": "12"}, 0, {"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "1"}, "SLURM has"),
        (lambda: ELSEWHERE, 1000, {}, r"no heartbeat for 100\d s"),
    ],
)
def test_one_whose_holder_is_gone_is_taken_over_with_a_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[], dict[str, Any]],
    age: float,
    environment: dict[str, str],
    reason: str,
) -> None:
    held_by(tmp_path, replace(Holder.here(), **change()), age)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    said: list[str] = []
    mine = lock(tmp_path, said)
    began = time.monotonic()
    mine.check()
    assert not said
    mine.acquire()
    assert time.monotonic() - began < 1, "at once"
    assert len(said) == 1
    assert re.match(rf"taking over {tmp_path} from process \d+ on \S+, .*since .*: {reason}", said[0])
    assert [path.name for path in tmp_path.iterdir()] == ["run.lock.4"]
    mine.release()


@pytest.mark.parametrize("restart", [{}, {"SLURM_RESTART_COUNT": "0"}])
def test_the_same_slurm_job_on_another_node_is_alive_unless_it_was_requeued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restart: dict[str, str]
) -> None:
    """`srun -N2` of a script that finds no ranks: same job, other host."""
    for name, value in {"SLURM_JOB_ID": "12", **restart}.items():
        monkeypatch.setenv(name, value)
    file = held_by(tmp_path, replace(Holder.here(), **ELSEWHERE))
    renewal = subprocess.Popen([sys.executable, "-c", f"import os, time; time.sleep(1.5); os.utime({str(file)!r})"])
    said: list[str] = []
    with pytest.raises(UserError, match=r"is in use by process 77 on node7, SLURM job 12, since .*scancel 12"):
        lock(tmp_path, said).check()
    renewal.wait()
    assert len(said) == 1
    assert said[0].endswith("; waiting for a sign of life")
    assert [path.name for path in tmp_path.iterdir()] == ["run.lock.3"]


def test_a_holder_that_stops_to_give_signs_of_life_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host that died a moment ago: the same command still resumes, only later."""
    monkeypatch.setattr(folder_lock, "STALE_SECONDS", 2.0)
    held_by(tmp_path, replace(Holder.here(), **ELSEWHERE))
    said: list[str] = []
    mine = lock(tmp_path, said)
    mine.acquire()
    assert [line.partition(";")[2] or line.rpartition(": ")[2] for line in said] == [
        " waiting for a sign of life",
        "no heartbeat for 2 s",
    ]
    mine.release()


def test_half_a_file_is_judged_by_its_heartbeat(tmp_path: Path) -> None:
    file = tmp_path / "run.lock.1"
    file.write_text('{"host": "no')
    os.utime(file, (time.time() - 500,) * 2)
    mine = lock(tmp_path)
    mine.acquire()
    mine.release()


def test_who_was_taken_over_ends_without_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that slept: its process finds another's lock, and must not go on."""
    monkeypatch.setattr(folder_lock, "HEARTBEAT_SECONDS", 0.1)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(write, 2)
        lock(tmp_path).acquire()
        time.sleep(30)
        os._exit(0)
    os.close(write)
    while not (tmp_path / "run.lock.1").exists():
        time.sleep(0.01)
    (tmp_path / "run.lock.1").rename(tmp_path / "elsewhere")
    (tmp_path / "run.lock.2").write_text(json.dumps(asdict(replace(Holder.here(), **ELSEWHERE))))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
    line = os.read(read, 1000).decode()
    assert line.startswith(f"error: {tmp_path}: taken over by process 77 on node7, since ")
    assert line.endswith("; this process ends without saving\n")


@pytest.mark.parametrize("stale", [False, True])
def test_of_many_that_start_at_one_moment_one_wins(tmp_path: Path, stale: bool) -> None:
    for _ in range(2):
        if stale:
            held_by(tmp_path, replace(Holder.here(), pid=ended_process()))
        go, told, over = os.pipe(), os.pipe(), os.pipe()
        pids = []
        for _ in range(16):
            pid = os.fork()
            if pid == 0:
                os.close(go[1])
                os.close(over[1])
                mine = lock(tmp_path)
                os.read(go[0], 1)  # all at once, when the parent closes it
                try:
                    mine.acquire()
                    os.write(told[1], b"0")
                except UserError:
                    os.write(told[1], b"2")
                os.read(over[0], 1)  # the winner holds it while the others try
                mine.release()
                os._exit(0)
            pids.append(pid)
        os.close(go[1])
        codes = b"".join(os.read(told[0], 1) for _ in pids)
        os.close(over[1])
        for pid in pids:
            os.waitpid(pid, 0)
        for end in (go[0], *told, over[0]):
            os.close(end)
        assert bytes(sorted(codes)) == b"0" + 15 * b"2"
        assert not list(tmp_path.iterdir()), "nothing is left over"


# -- train.py and evaluate.py ------------------------------------------------------------------------------------------


def test_a_second_run_is_refused_and_a_killed_one_resumes_by_the_same_command(
    rank_server: RankServer, config: Path, refused: Callable[..., str], tmp_path: Path
) -> None:
    output, states = tmp_path / "out", tmp_path / "states"
    command = ["--config", config, f"run.output_dir={output}", f"run.checkpoint_dir={states}", *ENDLESS]
    first = rank_server.launch(TRAIN, *command, cwd=config.parent)
    reached(states, 20)
    holder = json.loads((output / "run.lock.1").read_text())
    os.kill(holder["pid"], signal.SIGSTOP)  # so that the folder stays as it is
    line = refused(TRAIN, *command, keep=(output, states), cwd=config.parent)
    assert line.startswith(f"error: run.output_dir: {output} is in use by process {holder['pid']} on ")
    # another output folder, but the same checkpoints
    other = [*command[:2], f"run.output_dir={tmp_path}/other", *command[3:]]
    line = refused(TRAIN, *other, keep=(output, states, tmp_path / "other"), cwd=config.parent)
    assert line.startswith(f"error: run.checkpoint_dir: {states} is in use by process {holder['pid']} on ")
    line = refused(TRAIN, *command, keep=(output, states), cwd=config.parent, ranks=2)
    assert line.startswith(f"error: run.output_dir: {output} is in use by process {holder['pid']} on ")
    first.kill()
    again = rank_server.launch(TRAIN, *command, cwd=config.parent)
    while "resuming at batch" not in again.stderr():
        assert again.poll() is None, again.stderr()
        time.sleep(0.02)
    assert again.stderr().count("taking over") == 2
    assert f"taking over {output} from process {holder['pid']} on " in again.stderr()
    again.rank(0).send_signal(signal.SIGTERM)
    assert again.wait().returncode == 128 + signal.SIGTERM
    assert not list(output.glob("run.lock*"))
    assert not list(states.glob("run.lock*"))


def test_of_two_runs_that_start_together_one_trains(rank_server: RankServer, config: Path, tmp_path: Path) -> None:
    command = ["--config", config, f"run.output_dir={tmp_path}/out", "optim.epochs=60", "tracking.enabled=false"]
    runs = [rank_server.launch(TRAIN, *command, cwd=config.parent) for _ in range(2)]
    ends = sorted((run.wait() for run in runs), key=lambda end: end.returncode)
    assert [end.returncode for end in ends] == [0, 2]
    assert re.fullmatch(r"error: run.output_dir: \S+/out is in use by process \d+ on .*\n", ends[1].stderr)
    steps = [json.loads(line)["step"] for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    trained = [step for step in steps if step <= 360][: steps.count(360) and steps.index(360) + 1]
    assert trained == sorted(set(trained)), "no step twice"


def test_a_second_evaluation_of_one_output_is_refused(
    refused: Callable[..., str], config: Path, tmp_path: Path
) -> None:
    mine = FolderLock(tmp_path / "evaluation.json.lock", "--output", print)
    mine.acquire()
    line = refused(EVALUATE, "--config", config, "run.output_dir=x", "--output", tmp_path / "evaluation.json",
                   keep=(tmp_path,), cwd=config.parent)  # fmt: skip
    mine.release()
    assert line.startswith(f"error: --output: {tmp_path} is in use by process {os.getpid()} on ")


# -- several tasks that find no RANK -----------------------------------------------------------------------------------

SRUN = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1"}


def tasks(server: RankServer, config: Path, variables: list[dict[str, str]], *settings: str) -> list[tuple[int, str]]:
    command = ["--config", config, "optim.epochs=4", "tracking.enabled=false", *settings]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    runs = [server.launch(TRAIN, *command, cwd=config.parent, env=environment | own) for own in variables]
    ends = [run.wait() for run in runs]
    return [(end.returncode, end.stdout + end.stderr) for end in ends]


def test_tasks_of_srun_take_its_ranks(rank_server: RankServer, config: Path, tmp_path: Path) -> None:
    own = [{**SRUN, "SLURM_JOB_ID": str(free_port()), "SLURM_PROCID": rank, "SLURM_LOCALID": rank} for rank in "01"]
    own[1]["SLURM_JOB_ID"] = own[0]["SLURM_JOB_ID"]
    ends = tasks(rank_server, config, own, f"run.output_dir={tmp_path}/srun")
    assert [code for code, _ in ends] == [0, 0], ends
    assert "6 batches per epoch" in ends[0][1]
    assert "batches per epoch" not in ends[1][1], "rank 0 speaks for all"
    launched = rank_server.launch(
        TRAIN, "--config", config, "optim.epochs=4", "tracking.enabled=false", f"run.output_dir={tmp_path}/ranks",
        ranks=2, cwd=config.parent,
    ).wait()  # fmt: skip
    assert launched.returncode == 0
    ours, theirs = (load_file(tmp_path / name / "adapter" / "adapter.safetensors") for name in ("srun", "ranks"))
    assert all((ours[name] == theirs[name]).all() for name in theirs), "bit for bit"


@pytest.mark.parametrize(
    ("size", "rank", "line"),
    [
        ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "mpirun started 2 tasks (OMPI_COMM_WORLD_SIZE), but "),
        ("PMI_SIZE", "PMI_RANK", "mpiexec started 2 tasks (PMI_SIZE), but "),
    ],
)
def test_tasks_of_an_mpi_are_refused_once(
    rank_server: RankServer, config: Path, tmp_path: Path, size: str, rank: str, line: str
) -> None:
    own = [{size: "2", rank: number} for number in "01"]
    ends = tasks(rank_server, config, own, f"run.output_dir={tmp_path}/out")
    told = (
        f"error: {line}MASTER_ADDR and MASTER_PORT are not set; set them to the host of rank 0 and a free port, or "
        "start with `deepspeed` or `torchrun` instead\n"
    )
    assert ends == [(2, told), (2, "")]
    assert not list(tmp_path.iterdir())


def test_tasks_of_an_mpi_with_a_master_take_its_ranks(rank_server: RankServer, config: Path, tmp_path: Path) -> None:
    master = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMPI_COMM_WORLD_SIZE": "2"}
    own = [{**master, "OMPI_COMM_WORLD_RANK": r, "OMPI_COMM_WORLD_LOCAL_RANK": r} for r in "01"]
    ends = tasks(rank_server, config, own, f"run.output_dir={tmp_path}/out")
    assert [code for code, _ in ends] == [0, 0], ends
    assert "batches per epoch" not in ends[1][1]


@pytest.mark.parametrize(
    "own",
    [
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"},  # the shell of sbatch, or of salloc
        {**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"},  # srun --pty bash
        {**SRUN, "SLURM_PROCID": "1", "WORLD_SIZE": "1"},  # each task a run of its own, on purpose
    ],
)
def test_one_task_is_one(rank_server: RankServer, config: Path, tmp_path: Path, own: dict[str, str]) -> None:
    ((code, said),) = tasks(rank_server, config, [own], f"run.output_dir={tmp_path}/out", "optim.epochs=1")
    assert code == 0, said
    assert "6 batches per epoch" in said


@pytest.mark.parametrize(
    ("own", "line"),
    [
        ({**SRUN, "SLURM_PROCID": "x"}, "SLURM_PROCID must be an integer, as set by a launcher, got 'x'"),
        (
            {**SRUN, "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "0", "PATH": "/"},
            "srun started tasks on n[1-2], and scontrol does not say on which is the first; set MASTER_ADDR to it and "
            "MASTER_PORT to a free port there",
        ),
        ({"RANK": "3", "WORLD_SIZE": "1"}, ""),
        ({"RANK": "x", "WORLD_SIZE": "1"}, "RANK must be an integer >= 0, as set by a launcher, got 'x'"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE must be an integer >= 1, as set by a launcher, got 'two'"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE must be an integer >= 1, as set by a launcher, got '0'"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE must be an integer >= 1, as set by a launcher, got ''"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR and MASTER_PORT are not set, but WORLD_SIZE is over 1"),
    ],
)
def test_variables_that_make_no_sense_are_named(
    rank_server: RankServer, config: Path, tmp_path: Path, own: dict[str, str], line: str
) -> None:
    ((code, said),) = tasks(rank_server, config, [own], f"run.output_dir={tmp_path}/out")
    assert code == 2
    assert said.startswith(f"error: {line}") or not line
    assert said.count("\n") == bool(line)
    assert not list(tmp_path.iterdir())
