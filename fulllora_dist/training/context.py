"""The frame of a training run: ranks, output folder, signals, tracker, progress; and how it begins and ends."""

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
    """One training run over all its attempts.

    Attributes:
        config: of this attempt.
        settings: the config as YAML for others to see, without what signs a URL.
        comm: this process among the others.
        saved: (tensors, facts) of the state to go on from, None at a run's beginning.
        stop: whether somebody asked for an end.
        states: on disk or in a bucket, for rank 0.
        tracker: metrics and artifacts, on rank 0.
    """

    def __init__(self, config: Config, comm: Comm, stop: GracefulStop):
        self.config = config
        self.comm = comm
        self.stop = stop
        self.checkpoints = CheckpointManager(config.run, self.say)
        self.saved = self.on_every_rank(self._find_checkpoint, "run.output_dir: its states cannot be read")
        resolved = OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json")))
        self.settings = urls.redacted(resolved)
        comm.run_on_rank0(
            lambda: self._open_output(resolved), f"run.output_dir: {config.run.output_dir} cannot be written"
        )
        own = self.saved[1] if self.saved and self.checkpoints.newest is not None else None  # not of run.resume_from
        begun = own["mlflow_run_id"] if own else None, own["step"] if own else 0, hosts()
        tracker = comm.run_on_rank0(
            lambda: Tracker(config.tracked_run(), True, *begun), f"run.output_dir: metrics in {config.run.output_dir}"
        )
        self.tracker = tracker or Tracker(config.tracked_run(), False)
        self.tracker.text(self.settings, "config.yaml")
        self._sampler = self._sample_node()

    def say(self, text: str) -> None:
        """A line for people, from rank 0, on stderr (stdout belongs to results)."""
        if self.comm.is_main:
            tqdm.write(text, file=sys.stderr)

    def on_every_rank(self, read: Callable[[], Checkpoint | None], failing: str) -> Checkpoint | None:
        """The checkpoint that rank 0 reads: the others need not see its disk. A collective.

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
            check_same_run(self.config, checkpoint[1]["config"], self.config.run.output_dir)
        return checkpoint

    def _open_output(self, resolved: str) -> None:
        """The config goes where results and states go, which shows that they can be written there; whole only on one's
        own disk."""
        output, states = self.config.run.output_dir, self.config.run.checkpoint_dir
        os.makedirs(output, exist_ok=True)
        if states is not None:
            store.write(urls.join(store.writable_folder(states), "config.yaml"), self.settings.encode())
        store.write(urls.join(output, "config.yaml"), resolved.encode())
        self.say(self.settings)

    def _sample_node(self) -> SystemSampler | None:
        """On the first rank of each node."""
        settings, all_hosts = self.config.tracking, hosts()
        first = all_hosts.index(all_hosts[self.comm.rank]) == self.comm.rank
        if not settings.enabled or settings.system_metrics_interval_s is None or not first:
            return None
        return SystemSampler(all_hosts[self.comm.rank], settings.system_metrics_interval_s)

    def gather_samples(self) -> None:
        """The nodes' samples go to the tracker. A collective."""
        if self.config.tracking.enabled and self.config.tracking.system_metrics_interval_s is not None:
            self.tracker.system(self.comm.all_gather_list(self._sampler.take() if self._sampler else []))

    def settle(self) -> None:
        """Wait for the state that is being written; what it covers may go to the tracker."""
        if self.checkpoints.settle() and self.checkpoints.newest is not None:
            self.tracker.commit(self.checkpoints.newest)


@contextmanager
def start_run(config: Config) -> Iterator[RunContext]:
    """Ranks, output folder, tracker and signal handlers; on leaving, the MLflow run's status and the ranks' farewell.

    Raises:
        UserError: the output folder holds another run, or a state that cannot be read.
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
