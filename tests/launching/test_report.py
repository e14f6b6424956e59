"""What restarts leave behind, and what `status` and `cancel` make of it."""

import json
import os
import re
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from submitit import DebugExecutor

from fulllora_dist.commands.evaluation import kept
from fulllora_dist.core.errors import UserError
from fulllora_dist.evaluation.resume_log import ResumeLog, items_done
from fulllora_dist.launching import jobs, worker
from fulllora_dist.launching.executors import build_executor
from fulllora_dist.launching.folder import launch_folders, read_restarts
from fulllora_dist.launching.jobs import RunJob, newest_job, wait
from fulllora_dist.launching.report import find_runs, status
from fulllora_dist.launching.resources import Resources
from fulllora_dist.launching.submit import refuse_second
from fulllora_dist.launching.worker import Worker
from tests.launching.conftest import LAUNCH, ROOT

STOPPED = 128 + signal.SIGUSR2


def launched(run: Path, number: int = 1, host: str = os.uname().nodename, executor: str = "local") -> Path:
    """A launch of a run whose job's process is gone."""
    folder = run / "launches" / f"{number:03d}"
    folder.mkdir(parents=True)
    job = {"id": f"99999999{number}", "entry": "train", "tasks": 1}
    (folder / "launch.json").write_text(json.dumps({"executor": executor, "host": host, "jobs": [job]}))
    settings = {"run": {"output_dir": str(run)}, "tracking": {"enabled": False}, "plugins": ["/nowhere/method.py"]}
    (folder / "config.yaml").write_text(json.dumps(settings))
    return folder


def noted(folder: Path, *events: str, **more: Any) -> None:
    lines = [{"job": "999999991", "time": 0, "event": event, **more} for event in events]
    with open(folder / "restarts.jsonl", "a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


@pytest.fixture
def one_start(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run an entry point that ends in some way as the one task of a local job; the exit code."""

    def exit_by(code: int) -> None:
        raise SystemExit(code)

    def run(folder: Path, end: Callable[[], int], entry: str = "train") -> int:
        values = {"EXECUTOR": "local", "FOLDER": folder, "LOCAL_JOB_ID": "999999991", "LOCAL_NTASKS": 1}
        values |= {"LOCAL_JOB_NUM_NODES": 1, "LOCAL_NODEID": 0, "LOCAL_GLOBALID": 0, "LOCAL_LOCALID": 0}
        for name, value in values.items():
            monkeypatch.setenv(f"SUBMITIT_{name}", str(value))
        monkeypatch.setattr(worker, "join_ranks", lambda _: None)
        monkeypatch.setattr(worker, "entry_point", lambda _: {"main": lambda _: end()})
        monkeypatch.setattr(worker, "_exit", exit_by)
        monkeypatch.setattr(worker.store, "stop_retrying", lambda: None)
        with pytest.raises(SystemExit) as left:
            Worker(entry, [])()
        return left.value.code

    return run


def test_finished_batches_are_counted(tmp_path: Path) -> None:
    """Not the empty lines between them, nor what a kill truncated, nor those of a file whose name is like it."""
    for file, count in (("a[b].json", 3), ("ab.json", 5)):
        log = ResumeLog(tmp_path / f"{file}.partial", "of this model", 0)
        for i in range(count):
            log.keep(f"pgd20/{i}", {"correct": [1, 0]})
            if i == 1:
                (part,) = (tmp_path / f"{file}.partial").glob("*/rank-0.jsonl")
                part.write_bytes(part.read_bytes() + b'\n{"name": "pgd20/')
    assert items_done(tmp_path, "*.json") == 8
    assert kept(str(tmp_path / "a[b].json")).startswith("3 finished batches are kept in ")


def test_a_job_without_progress_gives_up(tmp_path: Path, one_start: Callable[..., int]) -> None:
    """A checkpoint each time, then none any more."""
    folder = launched(tmp_path)

    def saved(step: int) -> int:
        (tmp_path / "checkpoints" / f"{step:08d}").mkdir(parents=True, exist_ok=True)
        return STOPPED

    codes = [one_start(folder, lambda step=step: saved(step)) for step in (5, 9, 9, 12, 12, 12)]
    requeue = worker.LOCAL_REQUEUE_RETURN_CODE
    assert codes == [requeue] * 5 + [1]
    said = status(str(tmp_path))
    assert "FAILED" in said
    assert said.endswith("task 0: gave up: 3 restarts without progress; increase --time")


def test_an_evaluation_longer_than_its_time_limit_gives_up(tmp_path: Path, one_start: Callable[..., int]) -> None:
    folder = launched(tmp_path)
    codes = [one_start(folder, lambda: STOPPED, entry="evaluate") for _ in range(3)]
    assert codes[-1] == 1
    assert codes[1] != 1


def test_an_evaluation_that_gets_on_does_not(tmp_path: Path, one_start: Callable[..., int]) -> None:
    folder = launched(tmp_path)

    def a_batch_more() -> int:
        ResumeLog(tmp_path / "evaluation.json.partial", "of this model", 0).keep("pgd20", [1, 0])
        return STOPPED

    assert 1 not in [one_start(folder, a_batch_more, entry="evaluate") for _ in range(4)]


def test_a_bucket_that_does_not_answer_is_no_lack_of_progress(
    tmp_path: Path, one_start: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = launched(tmp_path)

    def silent(*_: str) -> list[str]:
        raise UserError("the bucket does not answer")

    monkeypatch.setattr(worker, "list_checkpoints", silent)
    assert 1 not in [one_start(folder, lambda: STOPPED) for _ in range(4)]


def test_a_mistake_inside_a_job_is_one_line_and_exit_code_2(
    tmp_path: Path, one_start: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = launched(tmp_path)

    def mistake() -> int:
        raise UserError("data.train: it is gone")

    assert one_start(folder, mistake) == 2
    assert capsys.readouterr().err == "error: data.train: it is gone\n"
    assert status(str(tmp_path)).endswith("job 999999991: task 0: error: data.train: it is gone")


def test_a_mistake_opens_no_debugger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def mistake(_: list[str]) -> int:
        raise UserError("data.train: it is gone")

    monkeypatch.setenv("SUBMITIT_FOLDER", str(tmp_path))
    monkeypatch.setattr(worker, "join_ranks", lambda _: None)
    monkeypatch.setattr(worker, "entry_point", lambda _: {"main": mistake})
    monkeypatch.setattr("pdb.post_mortem", lambda: pytest.fail("a debugger"))
    assert DebugExecutor(tmp_path).submit(Worker("train", [])).results() == [2]
    assert "error: data.train: it is gone\n" in capsys.readouterr().err


def test_a_full_disk_costs_a_note_and_not_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = SimpleNamespace(folder=tmp_path / "gone")
    note = worker._RestartLog(SimpleNamespace(paths=paths, global_rank=0, job_id="1"), "train")  # type: ignore[arg-type]
    note("finished")
    assert capsys.readouterr().err.count("'finished' is not recorded") == 1


def test_torn_files_are_passed_over(tmp_path: Path) -> None:
    folder = launched(tmp_path)
    with open(folder / "restarts.jsonl", "w") as file:
        file.write('{"job": "999999991", "ti\n17\n')
    noted(folder, "finished")
    assert [note["event"] for note in read_restarts(folder, "999999991")] == ["finished"]
    job = RunJob(folder, "999999991", "train", 1, "local", "FAILED")
    job.paths(0).result_pickle.write_bytes(b"\x80\x05\x95")
    assert job.failure() is None
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time": 0, "train/loss": 2.5}\n{"step": 2, "train/loss": \0\n')
    assert "loss 2.5000 at batch 1" in status(str(tmp_path)).splitlines()[0]


def test_a_copy_of_a_launch_is_none(tmp_path: Path) -> None:
    folder = launched(tmp_path)
    noted(folder, "finished")
    folder.rename(folder.with_name("002"))
    launched(tmp_path).rename(tmp_path / "launches" / "001.old")
    assert launch_folders(str(tmp_path)) == [tmp_path / "launches" / "002"]
    assert "COMPLETED" in status(str(tmp_path))


def test_status_needs_no_plugin_and_what_is_unreadable_costs_a_line(tmp_path: Path) -> None:
    """Plugins of one name are other code in each launch."""
    for run in ("one", "two"):
        noted(launched(tmp_path / run), "finished")
    (tmp_path / "two" / "launches" / "001" / "config.yaml").write_text("run: [")
    one, two = map(status, find_runs(str(tmp_path)))
    assert one.splitlines()[0] == f"{tmp_path}/one: no checkpoint yet"
    assert "config.yaml cannot be read" in two.splitlines()[0]
    assert "COMPLETED" in two


@pytest.mark.parametrize("store", ["http://127.0.0.1:9", "sqlite:///{}/mlflow.db"])
def test_a_store_that_is_not_there_costs_at_most_a_line(tmp_path: Path, store: str) -> None:
    folder = launched(tmp_path)
    noted(folder, "finished")
    tracking = {"enabled": True, "uri": store.format(tmp_path)}
    (folder / "config.yaml").write_text(json.dumps({"run": {"output_dir": str(tmp_path)}, "tracking": tracking}))
    last = status(str(tmp_path)).splitlines()[-1]
    if store.startswith("http"):
        assert re.fullmatch(r"whether MLflow says RUNNING is not known \(.+\)", last)
    else:
        assert "finished" in last, "the table"
        assert not list(tmp_path.glob("mlflow.db*"))


def test_a_cancelled_job_is_nothing_amiss(tmp_path: Path) -> None:
    folder = launched(tmp_path)
    log = RunJob(folder, "999999991", "train", 1, "local", "").log()
    log.write_text("Starting with JobEnvironment\nsrun: error: n1: task 0: Exited with exit code 143\n")
    noted(folder, "started")
    assert "Exited with exit code 143" in status(str(tmp_path))
    noted(folder, "stopped by SIGTERM")
    assert "CANCELLED" in status(str(tmp_path))
    assert "exit code" not in status(str(tmp_path))


def test_cancel_says_what_it_does_not_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder of several runs; none alive; a local run of another machine, which is not launched twice either."""
    noted(launched(tmp_path / "done"), "finished")
    launched(tmp_path / "away", host="elsewhere")
    main = runpy.run_path(LAUNCH)["main"]
    monkeypatch.setattr("sys.argv", ["launch.py", "cancel", str(tmp_path)])
    with pytest.raises(UserError, match=f"{tmp_path} holds 2 runs; give the one to cancel, e.g. {tmp_path}/away"):
        main()
    monkeypatch.setattr("sys.argv", ["launch.py", "cancel", str(tmp_path / "done")])
    main()
    assert capsys.readouterr().out == f"no job of {tmp_path}/done is alive\n"
    monkeypatch.setattr("sys.argv", ["launch.py", "cancel", str(tmp_path / "away")])
    with pytest.raises(UserError, match=r"job 999999991 of .* may be alive on another machine; it was not cancelled"):
        main()
    with pytest.raises(UserError, match=r"only elsewhere knows whether job 999999991 of .* is alive; launch there"):
        refuse_second(str(tmp_path / "away"))
    refuse_second(str(tmp_path / "done"))


def test_only_the_launch_in_question_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (launched(tmp_path, number, executor="slurm") for number in (1, 2))
    asked = []

    def metadata(job: str) -> dict[str, str]:
        asked.append(job)
        return {"state": "COMPLETED"}

    monkeypatch.setattr(jobs, "_slurm_state", metadata)
    assert newest_job(str(tmp_path), "train").folder == second
    assert [job.folder for job in wait(first)] == [first]
    assert asked == ["999999992", "999999991"]


def test_a_local_run_has_the_gpus_of_the_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """submitit would count from 0."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    for gpus in (True, False):
        runner = build_executor(None, Resources(gpus=gpus), "local", tmp_path, "train", None)  # type: ignore[arg-type]
        assert ("env CUDA_VISIBLE_DEVICES=2,3 " in runner.python) is gpus


def test_the_cluster_for_tests_needs_plain_python_to_install(tmp_path: Path) -> None:
    script = [sys.executable, "-S", str(ROOT / "tests" / "services" / "slurm.py")]
    said = subprocess.run([*script, "--help"], capture_output=True, text=True, check=False)
    assert "A SLURM cluster on loopback" in said.stdout + said.stderr
    assert "Traceback" not in said.stderr
    without = {"PATH": str(tmp_path)}  # sbatch is in none of the folders that are searched besides
    said = subprocess.run([*script, "true"], capture_output=True, text=True, check=False, env=without)
    assert said.stderr.startswith("error: ")
    assert len(said.stderr.splitlines()) == 1
