"""Runs what a study has not yet: tries first, then the chosen values with every seed, each run resumable by itself."""

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from fulllora_dist.core.atomic import write_text
from fulllora_dist.core.errors import UserError
from fulllora_dist.data.index import Index
from fulllora_dist.storage.folder_lock import FolderLock
from fulllora_dist.studies.choice import choice, is_done, pending
from fulllora_dist.studies.content import inputs_of, read_by
from fulllora_dist.studies.finished import adapter_of, check_folder, missing, save_result
from fulllora_dist.studies.plan import Evaluation, Run, Study
from fulllora_dist.studies.processes import Job, environment_of, evaluate_command, start, stop, train_command
from fulllora_dist.studies.results import Result, Results
from fulllora_dist.training.inputs import check_evaluated, check_inputs
from fulllora_dist.training.resume import LOCK

_POLL = 0.5  # seconds
_KILLS = 2  # of one run by others, as by a machine that is short of memory, until it is given up
_SAVING = 600.0  # seconds that a run which an earlier study left may take to save and end
TRAIN = "train"


@dataclass(frozen=True)
class Options:
    """How the runs are run; no result depends on it beyond rounding.

    Attributes:
        parallel: how many at a time.
        ranks: of each.
    """

    parallel: int = 1
    ranks: int = 1

    @property
    def threads(self) -> int:
        """Of each rank, unless OMP_NUM_THREADS is set."""
        ours = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max(1, ours // (self.parallel * self.ranks))


class Runner:
    """Runs a study.

    Args:
        say: prints a line for people.
        report: called after each finished run.
        launch: starts a step of a run.
    """

    def __init__(
        self,
        study: Study,
        options: Options,
        say: Callable[[str], None],
        report: Callable[[], None],
        launch: Callable[..., Job] = start,
    ):
        self._study, self._options, self._say, self._report, self._launch = study, options, say, report, launch
        self._environment = environment_of(study.settings.environment, options.threads)
        self._times = _Times(Path(study.settings.output_dir, "times.json"))
        self._inputs: dict[tuple[tuple[str, str], ...], Mapping[str, str]] = {}
        self._jobs: list[Job] = []
        self._failed: dict[str, str] = {}  # {name of a run: why}
        self._kills: dict[str, int] = {}

    def check(self) -> None:
        """Refuse what a start of any run would refuse, a result that another run has the name of, and what other data
        left in the folder of a run.

        Raises:
            UserError: naming the setting.
        """
        if not (threads := self._environment["OMP_NUM_THREADS"]).isdecimal():
            raise UserError(f"OMP_NUM_THREADS must be a number, got {threads!r}")
        results = Results(self._study.settings.results_dir)
        for arm, tries in self._study.tries.items():
            for run in tries:
                data = run.config.data.model_copy(update={"held_out": self._study.settings.choose.data})
                check_inputs(run.config.model_copy(update={"data": data}), self._options.ranks)
            for run in (tries[0], self._study.seeds(arm, tries[0].values)[0]):
                for evaluation in run.evaluations:
                    self._check_evaluation(run, evaluation)
            values = choice(self._study, arm, results, self._inputs_of)
            for run in [*tries, *([] if values is None else self._study.seeds(arm, values))]:
                if not is_done(results, run, self._inputs_of(run)):
                    self._adapter_of(run, results)

    def _check_evaluation(self, run: Run, evaluation: Evaluation) -> None:
        chosen = {"attacks": evaluation.attacks, "num_samples": evaluation.num_samples}
        settings = run.config.evaluation.model_copy(update=chosen)
        config = run.config.model_copy(update={"evaluation": settings})
        try:
            check_evaluated(config, Index.load(evaluation.data))
        except UserError as error:
            raise UserError(f"{self._study.path}: {evaluation.data}: {error}") from None

    def plan(self) -> list[str]:
        """What is left, a line each, and the time that it takes as far as that is known."""
        return [*(str(run) for run in self._planned()), self._time_left()]

    def run(self) -> int:
        """Run all that is not done. The exit code is 1 if a run failed; what is done stays done."""
        lock = FolderLock(Path(self._study.settings.output_dir, "study.lock"), "output_dir", self._say)
        Path(self._study.settings.output_dir).mkdir(parents=True, exist_ok=True)
        lock.acquire()
        before = signal.signal(signal.SIGTERM, _exit)
        try:
            self._start_some()
            while self._jobs:
                time.sleep(_POLL)
                for job in [job for job in self._jobs if job.process.poll() is not None]:
                    self._jobs.remove(job)
                    self._end(job)
                    self._start_some()
        finally:
            stop(self._jobs)
            signal.signal(signal.SIGTERM, before)
            lock.release()
        for name, reason in self._failed.items():
            self._say(f"failed: {name}: {reason}")
        return int(bool(self._failed))

    def _left(self) -> list[Run]:
        """The runs that can start, in order."""
        results = Results(self._study.settings.results_dir)
        return [run for run in pending(self._study, results, self._inputs_of) if run.name not in self._failed]

    def _inputs_of(self, run: Run) -> Mapping[str, str]:
        if (key := read_by(run.config)) not in self._inputs:  # the same for most runs
            self._inputs[key] = inputs_of(run.config)
        return self._inputs[key]

    def _adapter_of(self, run: Run, results: Results) -> tuple[Result | None, Path | None]:
        """The result that there is, and the folder of the adapter, which is checked."""
        inputs = self._inputs_of(run)
        known = results.find(run, inputs)
        adapter = adapter_of(run, known, results.folder)
        check_folder(run, inputs, adapter)
        return known, adapter

    def _steps(self, run: Run, known: Result | None, adapter: Path | None) -> list[str]:
        return [TRAIN] * (adapter is None) + [e.file for e in missing(run, known, adapter)]

    def _start_some(self) -> None:
        while len(self._jobs) < self._options.parallel:
            under_way = {job.run.name for job in self._jobs}
            run = next((run for run in self._left() if run.name not in under_way), None)
            if run is None:
                return
            self._advance(run)

    def _advance(self, run: Run) -> None:
        """Start the run's next step; after the last one there is its result."""
        try:
            self._next_step(run)
        except UserError as error:
            self._fail(run, str(error))

    def _fail(self, run: Run, reason: str) -> None:
        self._failed[run.name] = reason
        self._say(f"failed: {run}: {reason}")

    def _next_step(self, run: Run) -> None:
        known, adapter = self._adapter_of(run, Results(self._study.settings.results_dir))
        step = next(iter(self._steps(run, known, adapter)), None)
        if step is None and adapter is not None:
            threads = int(self._environment["OMP_NUM_THREADS"])
            place = {"ranks": self._options.ranks, "threads": threads, "parallel": self._options.parallel}
            save_result(self._study, run, self._inputs_of(run), place, known, adapter)
            try:
                self._report()
            except (UserError, OSError) as error:  # the results are there; the runs need no tables
                self._say(f"warning: no tables: {error}")
            self._say(f"done: {run}; {self._time_left()}")
            return
        if adapter is None:
            self._wait_for_an_earlier_one(run)
            command = train_command(self._study.config, run)
        else:
            evaluation = next(e for e in run.evaluations if e.file == step)
            command = evaluate_command(self._study.config, run, evaluation, str(adapter))
        self._jobs.append(self._launch(run, step, command, self._options.ranks, self._environment))
        what = "training" if step == TRAIN else f"evaluating under {', '.join(evaluation.attacks)}"
        self._say(f"{run}: {what}; it prints to {self._jobs[-1].log}")

    def _wait_for_an_earlier_one(self, run: Run) -> None:
        """After `kill -9` of a study its run saves and ends by itself."""
        lock, deadline = FolderLock(Path(run.output_dir, LOCK), "output_dir", self._say), time.monotonic() + _SAVING
        while True:
            try:
                return lock.check()
            except UserError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(_POLL)

    def _end(self, job: Job) -> None:
        """A job has ended: the run's next step, its result, or why there is none."""
        run, code = job.run, job.process.returncode
        if code:
            self._kills[run.name] = self._kills.get(run.name, 0) + (code < 0 or code > 128)
            if (code < 0 or code > 128) and self._kills[run.name] <= _KILLS:
                self._say(f"{run}: killed by another process (exit code {code}); resuming it")
            else:
                self._fail(run, f"{job.last_line()} ({job.log})")
            return
        self._times.add(run.arm, job.step, job.seconds)
        self._advance(run)

    def _time_left(self) -> str:
        runs, results = list(self._planned()), Results(self._study.settings.results_dir)
        if not runs:
            return "nothing left"
        try:
            steps = [(run, step) for run in runs for step in self._steps(run, *self._adapter_of(run, results))]
        except UserError:  # its own turn will say so
            return f"{len(runs)} runs left"
        known = [self._times.of(run.arm, step) for run, step in steps]
        if None in known:
            return f"{len(runs)} runs left"
        hours = sum(filter(None, known)) / self._options.parallel / 3600
        return f"{len(runs)} runs left, about {hours:.1f} h"

    def _planned(self) -> Iterator[Run]:
        """Every run that is left; those whose values are not chosen yet have none."""
        results = Results(self._study.settings.results_dir)
        yield from {run.name: run for run in pending(self._study, results, self._inputs_of)}.values()
        for arm, tries in self._study.tries.items():
            if choice(self._study, arm, results, self._inputs_of) is None:
                yield from (replace(run, values={}) for run in self._study.seeds(arm, tries[0].values))


class _Times:
    """What the steps of each arm took so far, kept in a file; of one that was interrupted the last part."""

    def __init__(self, path: Path):
        self._path = path
        self._seconds: dict[str, dict[str, float]] = {}
        with contextlib.suppress(FileNotFoundError, ValueError):  # a full disk may have cut it
            self._seconds = json.loads(path.read_text())

    def add(self, arm: str, step: str, seconds: float) -> None:
        self._seconds.setdefault(step, {})[arm] = seconds
        write_text(self._path, json.dumps(self._seconds))

    def of(self, arm: str, step: str) -> float | None:
        """The arm's last one, else the mean of the others'; None where there is none."""
        known = self._seconds.get(step, {})
        return known.get(arm, sum(known.values()) / len(known) if known else None)


def _exit(number: int, _: object) -> None:
    sys.exit(128 + number)
