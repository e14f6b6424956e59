"""Runs as child processes: the scripts that people start, so that each resumes as theirs do."""

import ctypes
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from fulllora_dist.core.errors import UserError
from fulllora_dist.data.index import INDEX_NAME
from fulllora_dist.distributed.comm import local_launcher
from fulllora_dist.studies.plan import Evaluation, Run
from fulllora_dist.tracking.provenance import PACKAGE

EVALUATION_SEED = 0
_SIGNAL_WITH_PARENT = 1  # prctl's PR_SET_PDEATHSIG
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded here: a fork must not wait for a lock


def train_command(config: str, run: Run) -> list[str]:
    """train.py of a run, which ends with its adapter."""
    own = (f"run.seed={run.seed}", f"run.output_dir={run.output_dir}", "data.validation=null")
    return [str(PACKAGE / "train.py"), "--config", config, *run.overrides, *own]


def evaluate_command(config: str, run: Run, evaluation: Evaluation, adapter: str) -> list[str]:
    """evaluate.py of a run's adapter. The attacks' random starts are the same for all runs."""
    own = [f"run.seed={EVALUATION_SEED}", f"run.output_dir={run.output_dir}", f"data.validation={evaluation.data}"]
    own += [] if evaluation.num_samples is None else ["--num-samples", str(evaluation.num_samples)]
    output = Path(run.output_dir, evaluation.file)
    return evaluation_of(config, adapter, evaluation.attacks, output, [*run.overrides, *own])


def evaluation_of(config: str, adapter: str, attacks: Sequence[str], output: Path, further: Sequence[str]) -> list[str]:
    """evaluate.py of an adapter; `further` are its settings and options."""
    command = [str(PACKAGE / "evaluate.py"), "--config", config, "--adapter", adapter, *further]
    return [*command, "--attacks", ",".join(attacks), "--output", str(output)]


def last_line(printed: str) -> str:
    """The end of what a program printed: the one line of a mistake."""
    lines = [line for line in printed.splitlines() if line.strip()]
    return lines[-1] if lines else "it printed nothing"


def environment_of(settings: Mapping[str, str], threads: int) -> dict[str, str]:
    """The environment of a run: what is set already, then what the study sets, then so many threads a rank."""
    found = {**settings, **os.environ}
    return found | {"OMP_NUM_THREADS": found.get("OMP_NUM_THREADS") or str(threads)}


def _end_with_parent() -> None:
    """Have the kernel send this child SIGTERM when its parent is gone, as after `kill -9`: it saves a checkpoint, and
    does not hold its folder against the next start."""
    if _LIBC is not None:
        _LIBC.prctl(_SIGNAL_WITH_PARENT, signal.SIGTERM)


class Process(Protocol):
    """What is used of a child."""

    @property
    def returncode(self) -> int | None: ...

    def poll(self) -> int | None: ...

    def send_signal(self, sig: int, /) -> None: ...

    def wait(self) -> int: ...


@dataclass
class Job:
    """A step of a run that is under way.

    Attributes:
        run, step: which one, "train" or an evaluation's file.
        process: of the script, or of the launcher of its ranks.
        log: what it prints.
    """

    run: Run
    step: str
    process: Process
    log: Path
    began: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def last_line(self) -> str:
        return last_line(self.log.read_text(errors="replace"))


def _as_nice(pid: int) -> None:
    """Give a new session this process's nice value: where Linux schedules by session (autogroup), that of a process
    counts within its session alone."""
    for _ in range(20):
        try:
            Path(f"/proc/{pid}/autogroup").write_text(str(os.nice(0)))
            return
        except BlockingIOError:  # without privileges it takes one in 0.1 s
            time.sleep(0.05)
        except OSError:  # it does not, or the process has ended
            return


def start(run: Run, step: str, command: Sequence[str], ranks: int, environment: Mapping[str, str]) -> Job:
    """Start a script with what it prints in `NAME.log` beside the folder of the run.

    Args:
        environment: all of it.
    """
    log = Path(f"{run.output_dir}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as file:
        process = subprocess.Popen(
            [*local_launcher(ranks), *command],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # a Ctrl-C in the terminal is passed on once, by `stop`
            preexec_fn=_end_with_parent,
        )
    if os.nice(0) > 0:
        _as_nice(process.pid)
    return Job(run, step, process, log)


def stop(jobs: Sequence[Job]) -> None:
    """Ask the jobs to save and end, and wait for them."""
    for job in jobs:
        if job.process.poll() is None:
            job.process.send_signal(signal.SIGTERM)
    for job in jobs:
        job.process.wait()


def make_shards(lines: Iterable[str], of: str, *, dry_run: bool = False) -> None:
    """The data of a study, where it is not there: what is finished is not made again.

    Args:
        lines: arguments of `fulllora shards`, a command each.
        of: whose they are, for messages.
        dry_run: make nothing, but see that nothing is to be made.

    Raises:
        UserError: they could not be made, or, in a dry run, are not there.
    """
    for line in lines:
        source, destination, *_ = [*shlex.split(line), "", ""]
        if dry_run:
            if not os.path.exists(os.path.join(destination, INDEX_NAME)):
                raise UserError(f"{of}: shards: {destination} is not there yet; without --dry-run the study makes it")
            continue
        if not os.path.exists(source) and os.path.exists(os.path.join(destination, INDEX_NAME)):
            continue  # made from what has gone since
        command = [sys.executable, "-m", "fulllora_dist.commands.cli", "shards", *shlex.split(line)]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise UserError(f"{of}: shards: {last_line(done.stderr)}")
