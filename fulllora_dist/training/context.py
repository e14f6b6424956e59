"""Setup and teardown of a training run: ranks, output folder, signals, tracker and progress output."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from omegaconf import OmegaConf
from tqdm import tqdm

from fulllora_dist.checkpoints.format import Checkpoint
from fulllora_dist.checkpoints.manager import CheckpointManager
from fulllora_dist.config.schema import Config
from fulllora_dist.distributed.comm import Comm, hosts, start_comm, stop_comm
from fulllora_dist.distributed.signals import GracefulStop
from fulllora_dist.storage import store, urls
from fulllora_dist.tracking.run import Tracker
from fulllora_dist.tracking.system import SystemSampler
from fulllora_dist.training.resume import check_same_run


class RunContext:
    """A training run, which may span several restarts.

    Attributes:
        config: the config of the current process.
        settings: the config as YAML, with URL signatures redacted.
        comm: communication with the other ranks.
        saved: tensors and metadata of the checkpoint to resume from; None for a new run.
        stop: whether a stop was requested.
        checkpoints: checkpoints on disk or in a bucket, used on rank 0.
        tracker: metrics and artifacts, logged on rank 0.
    """

    def __init__(self, config: Config, comm: Comm, stop: GracefulStop):
        self.config = config
        self.comm = comm
        self.stop = stop
        self.checkpoints = CheckpointManager(config.run, self.say)
        self.saved = self.on_every_rank(self._find_checkpoint, "run.output_dir: cannot read its checkpoints")
        resolved = OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json")))
        self.settings = urls.redacted(resolved)
        comm.run_on_rank0(
            lambda: self._open_output(resolved), f"run.output_dir: cannot write to {config.run.output_dir}"
        )
        own = self.saved[1] if self.saved and self.checkpoints.newest is not None else None  # not of run.resume_from
        resumed = own["mlflow_run_id"] if own else None, own["step"] if own else 0, hosts()
        tracker = comm.run_on_rank0(
            lambda: Tracker(config.tracked_run(), True, *resumed),
            f"run.output_dir: cannot write metrics in {config.run.output_dir}",
        )
        self.tracker = tracker or Tracker(config.tracked_run(), False)
        self.tracker.text(self.settings, "config.yaml")
        self._sampler = self._sample_node()

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
            check_same_run(self.config, checkpoint[1]["config"], its_own=self.checkpoints.newest is not None)
        return checkpoint

    def _open_output(self, resolved: str) -> None:
        """Write the config to the output and checkpoint folders, which also shows that both are writable. URL
        signatures are kept in the output folder only."""
        output, checkpoint_dir = self.config.run.output_dir, self.config.run.checkpoint_dir
        os.makedirs(output, exist_ok=True)
        if checkpoint_dir is not None:
            store.write(urls.join(store.writable_folder(checkpoint_dir), "config.yaml"), self.settings.encode())
        store.write(urls.join(output, "config.yaml"), resolved.encode())
        self.say(self.settings)

    def _sample_node(self) -> SystemSampler | None:
        """Start sampling system metrics on the first rank of each node."""
        settings, all_hosts = self.config.tracking, hosts()
        first = all_hosts.index(all_hosts[self.comm.rank]) == self.comm.rank
        if not settings.enabled or settings.system_metrics_interval_s is None or not first:
            return None
        return SystemSampler(all_hosts[self.comm.rank], settings.system_metrics_interval_s)

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
    """Set up ranks, output folder, tracker and signal handlers; on exit, set the MLflow run's status and leave the
    process group.

    Raises:
        UserError: the output folder holds another run, or a checkpoint that cannot be read.
    """
    comm = start_comm(config.distributed.timeout_minutes)
    with GracefulStop() as stop:
        run = RunContext(config, comm, stop)
        status = "FAILED"
        try:
            yield run
            status = "FINISHED"
        finally:
            try:
                run.settle()
            finally:
                run.tracker.finish(status if stop.signal is None else "KILLED")
    stop_comm()
