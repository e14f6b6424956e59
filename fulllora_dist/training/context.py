"""Setup and teardown of a training run: ranks, output folder, signals, tracker and progress output."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta

from omegaconf import OmegaConf
from tqdm import tqdm

from fulllora_dist.checkpoints.format import Checkpoint
from fulllora_dist.checkpoints.manager import CheckpointManager
from fulllora_dist.config.schema import Config
from fulllora_dist.core.messages import redacted
from fulllora_dist.distributed.comm import Comm, hosts, start_comm, stop_comm
from fulllora_dist.distributed.signals import GracefulStop
from fulllora_dist.distributed.watchdog import Watchdog
from fulllora_dist.storage import store, urls
from fulllora_dist.tracking.run import Tracker
from fulllora_dist.tracking.system import SystemSampler
from fulllora_dist.training.resume import check_resumable, run_locks

APART = timedelta(minutes=30)
"""How long ranks wait for each other before and after the training, where one has work of its own: weights to fetch, an
adapter to publish."""
Progress = Callable[[], tuple[int, int]]
"""Batches trained on, and those of the whole run."""


class RunContext:
    """A training run, which may span several restarts.

    Attributes:
        config: the config of the current process.
        settings: the config as YAML, with URL signatures redacted.
        comm: communication with the other ranks.
        saved: tensors and metadata of the checkpoint to resume from; None for a new run.
        stop: whether a stop was requested.
        checkpoints: checkpoints on disk or in a bucket, used on rank 0.
        tracker: metrics and artifacts, logged on rank 0; does nothing before `open`.
        progress: how far the training is; None before and after it.
        watchdog: knows the phase of this rank.
    """

    def __init__(self, config: Config, comm: Comm, stop: GracefulStop, watchdog: Watchdog | None = None):
        self.config = config
        self.comm = comm
        self.stop = stop
        self.progress: Progress | None = None
        self.watchdog = watchdog or Watchdog(comm)
        self.watchdog.step = lambda: progress()[0] if (progress := self.progress) else -1  # of another thread
        self.checkpoints = CheckpointManager(config.run, self.say)
        self.saved = self.on_every_rank(self._find_checkpoint, "run.output_dir: cannot read its checkpoints")
        # the checkpoint's own run, not that of run.resume_from
        own = self.saved[1] if self.saved and self.checkpoints.newest is not None else None
        self._resumed = (own["mlflow_run_id"], own["step"]) if own else (None, 0)
        self._resolved = OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json")))
        self.settings = redacted(self._resolved)
        self.tracker = Tracker(config.tracked_run(), False)
        self._locks = run_locks(config, self.say)
        self._sampler: SystemSampler | None = None
        stop.announce = self._announce

    def open(self) -> None:
        """Lock the output folder and begin to write: the run has passed all checks. A collective.

        Raises:
            SharedUserError: another process has the folder, or had it since its checkpoint was read; or the folder
                cannot be written. Nothing was changed.
        """
        output, run = self.config.run.output_dir, self.config.tracked_run()
        self.comm.run_on_rank0(self._open_output, f"run.output_dir: cannot write to {output}")
        tracker = self.comm.run_on_rank0(
            lambda: Tracker(run, True, *self._resumed, hosts()), f"run.output_dir: cannot write metrics in {output}"
        )
        self.tracker = tracker or self.tracker
        self.tracker.text(self.settings, "config.yaml")
        self._sampler = self._sample_node()

    def close(self, status: str) -> None:
        """Set the tracked run's status, stop sampling and watching, and give the output folder back."""
        self.watchdog.end()
        if self._sampler is not None:
            self._sampler.stop()
        self.tracker.finish(status)
        for lock in self._locks:
            lock.release()

    def say(self, text: str) -> None:
        """Print a line to stderr on rank 0; stdout is reserved for results."""
        if self.comm.is_main:
            tqdm.write(text, file=sys.stderr)

    def progress_bar(self, total: int, initial: int) -> tqdm:
        """A bar over images, shown on rank 0."""
        return tqdm(
            total=total,
            initial=initial,
            unit="img",
            unit_scale=True,
            file=sys.stderr,
            disable=not self.comm.is_main,
            dynamic_ncols=True,
            mininterval=1.0,
        )

    def on_every_rank(self, read: Callable[[], Checkpoint | None], failing: str) -> Checkpoint | None:
        """Read a checkpoint on rank 0 and broadcast it, as other ranks may not see its disk. A collective.

        Raises:
            SharedUserError: see `Comm.run_on_rank0`.
        """
        checkpoint = self.comm.run_on_rank0(read, failing)
        metadata = self.comm.broadcast(checkpoint and checkpoint[1])
        if metadata is None:
            return None
        return self.comm.broadcast_tensors(checkpoint and checkpoint[0]), metadata

    def _find_checkpoint(self) -> Checkpoint | None:
        checkpoint = self.checkpoints.find()
        if checkpoint is not None:
            check_resumable(self.config, checkpoint[1], its_own=self.checkpoints.newest is not None)
        return checkpoint

    def _open_output(self) -> None:
        """Lock the output and checkpoint folders and write the config there, which also shows that both are writable.
        URL signatures are kept in the output folder only."""
        output, checkpoint_dir = self.config.run.output_dir, self.config.run.checkpoint_dir
        os.makedirs(output, exist_ok=True)
        if checkpoint_dir is not None:
            checkpoint_dir = store.writable_folder(checkpoint_dir)
        for lock in self._locks:
            lock.acquire()
        self.checkpoints.check_unchanged()
        if checkpoint_dir is not None:
            store.write(urls.join(checkpoint_dir, "config.yaml"), self.settings.encode())
        store.write(urls.join(output, "config.yaml"), self._resolved.encode())
        self.say(self.settings)

    def _announce(self, number: int, deferred: bool, again: bool) -> None:
        """Say what a signal does, and what the same one would do again. Called at once, from another thread: the main
        one may be in the middle of a step."""
        if not self.comm.is_main:
            return
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        saved = f"the checkpoint of batch {self.checkpoints.newest}" if self.checkpoints.newest else "the start"
        if again:
            line = f"{name} again: ending without saving; re-run the same command to resume from {saved}"
        elif deferred and self.progress is not None:
            step, total = self.progress()
            lost = step - (self.checkpoints.newest or 0)
            # several ranks ask each other before a batch, so that this one may be too far
            after = "this batch" if self.comm.world == 1 else "this batch or the next"
            line = (
                f"{name}: stopping after {after} ({step + 1} of {total}), then saving a checkpoint; {name} again "
                f"ends at once and loses the {lost} batches since {saved}"
            )
        else:
            line = f"{name}: stopping at once; re-run the same command to resume from {saved}"
        os.write(2, f"\n{line}\n".encode())
        if not again:
            self.tracker.interrupted()

    def _sample_node(self) -> SystemSampler | None:
        """Start sampling system metrics on the first rank of each node."""
        settings, all_hosts = self.config.tracking, hosts()
        first = all_hosts.index(all_hosts[self.comm.rank]) == self.comm.rank
        if not settings.enabled or settings.system_metrics_interval_s is None or not first:
            return None
        return SystemSampler(all_hosts[self.comm.rank], settings.system_metrics_interval_s)

    def samples(self) -> int:
        """Number of system metrics of this node that are not logged yet."""
        return len(self._sampler) if self._sampler else 0

    def gather_samples(self) -> None:
        """Log the system metrics of all nodes to the tracker. A collective."""
        if self.config.tracking.enabled and self.config.tracking.system_metrics_interval_s is not None:
            self.tracker.system(self.comm.all_gather_list(self._sampler.take() if self._sampler else []))

    def settle(self) -> None:
        """Wait for the checkpoint being written, then let the tracker send the metrics that it covers."""
        if self.checkpoints.settle() and self.checkpoints.newest is not None:
            self.tracker.commit(self.checkpoints.newest)


@contextmanager
def start_run(config: Config) -> Iterator[RunContext]:
    """Set up ranks and signal handlers and read the checkpoint to resume from; nothing is written before
    `RunContext.open`. On exit, set the MLflow run's status, unlock the output folder and leave the process group.

    Raises:
        UserError: the output folder holds another run, or a checkpoint that cannot be read.
    """
    patience = timedelta(minutes=config.timeout_minutes())
    records = os.path.join(config.run.output_dir, "collectives_rank_")
    comm = replace(start_comm(max(patience, APART).total_seconds() / 60, records), patience=patience)
    with GracefulStop() as stop, Watchdog(comm) as watchdog:
        run = RunContext(config, comm, stop, watchdog)
        status = "FAILED"
        try:
            yield run
            status = "FINISHED"
        finally:
            try:
                run.settle()
            finally:
                run.close(status if stop.signal is None else "KILLED")
                if status == "FINISHED" or comm.world == 1:  # after an error, other ranks may be in a collective
                    stop_comm()
