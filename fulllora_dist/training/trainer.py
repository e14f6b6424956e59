"""The training loop, the only place that counts batches, logs, saves and rolls back."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fulllora_dist.checkpoints.format import Checkpoint, CheckpointMetadata
from fulllora_dist.core.errors import SharedUserError
from fulllora_dist.core.units import size_in
from fulllora_dist.data.batch import Batch
from fulllora_dist.data.loader import TrainStream
from fulllora_dist.distributed.engine import Engine
from fulllora_dist.distributed.zero_state import TrainableState
from fulllora_dist.models.adapted_model import AdaptedModel
from fulllora_dist.training import rollback
from fulllora_dist.training.context import RunContext
from fulllora_dist.training.guard import Check, Guard
from fulllora_dist.training.initial import initial_state
from fulllora_dist.training.phases import Phases
from fulllora_dist.training.profiling import profiled
from fulllora_dist.training.rank_averages import RankAverages
from fulllora_dist.training.requests import start_requests
from fulllora_dist.training.run_plots import show_check
from fulllora_dist.training.speed import Speed


class Trainer:
    """Trains a model on a stream of batches.

    Starts from the first available of: the run's newest checkpoint, `run.resume_from`, `adapter.init_from`, the bare
    backbone.

    Attributes:
        step: batches trained on since the start of the run.
        engine: the model under DeepSpeed.
        shown: last loss and accuracy, for the progress bar.
        stopped: whether training stopped on request, with a checkpoint saved.
        stream: the training batches.
        phases: method, threat model and image size of each batch.
        guard: checks robust accuracy on held-out images; None without them.
        rollbacks: rollbacks after a collapse so far (`rollback.py`).
    """

    def __init__(
        self, run: RunContext, model: AdaptedModel, stream: TrainStream, phases: Phases, guard: Guard | None = None
    ):
        config = run.config
        self._run, self.stream, self.phases, self.guard = run, stream, phases, guard
        self.rollbacks: list[rollback.Rollback] = []
        self.step = 0
        self.shown: dict[str, str] = {}
        self.stopped = False
        self._saved_step: int | None = None
        self._seen_skipped = 0
        initial = run.comm.run_on_all(lambda: initial_state(model, run.saved, config.adapter.init_from))
        self._speed = Speed(run, model, stream, phases)
        self._timer, self._averages = self._speed.timer, RankAverages(run, self._speed)
        self.engine = Engine(model, config.optim, config.distributed, config.deepspeed, run.comm, phases.total_updates)
        self.engine.on_part = self._timer.mark
        if run.saved is not None:
            self._resume(*run.saved)
            run.saved = None  # frees memory: large with the per-slot perturbations of Free
        elif initial is not None:
            self.engine.restore(initial)

    @property
    def total_steps(self) -> int:
        """Number of batches in the whole run."""
        return self.phases.total_steps

    def train(self, profile_steps: int = 0) -> None:
        """Train on the remaining batches, or until a stop is requested. `profile_steps` of them are `profiled`.

        Raises:
            Collapsed: the run ends after a collapse.
        """
        for batch in profiled(self.batches(), profile_steps, self._run):
            self.advance(batch)

    def batches(self) -> Iterator[Batch]:
        """The remaining batches, on the device. Rank 0 shows loss, accuracy, images per second and remaining time."""
        run, size = self._run, self._run.config.optim.batch_size
        run.progress = lambda: (self.step, self.total_steps)
        with run.progress_bar(self.total_steps * size, self.step * size) as bar, run.stop.deferred():
            while self.step < self.total_steps:
                phase = self.phases.at(self.step)
                self.stream.resize(phase.image_size or self.engine.model.info.image_size)
                self._timer.mark("data")
                for batch in self.stream:
                    before = self.step
                    yield batch.to(run.comm.device)
                    bar.set_postfix(self.shown, refresh=False)
                    bar.update((self.step - before) * size)
                    if self.stopped:
                        return
                    if self.step >= phase.end or self.step <= before:  # the next phase, or after a rollback
                        break
                    self._timer.mark("data")
                bar.total = self.total_steps * size

    def advance(self, batch: Batch) -> None:
        """Train on a batch and count it; then log, check, save, stop or roll back if due.

        With several ranks, a signal that arrives during the batch stops the run after the next one.
        """
        logs = self.step + 1 == self.total_steps or (self.step + 1) % self._run.config.run.log_every == 0
        requests = start_requests(self._run, self.stream, self.step + 1, logs=logs)
        self._timer.mark("attack")
        metrics, phase = self.phases.step(self.engine, batch, self.step), self.phases.at(self.step)
        self.step += 1
        self.stream.commit(self.step)
        self._timer.mark("communication")
        asked = requests()
        self._speed.end_batch(phase)
        if asked.bad_samples:
            self.stream.count_bad(self._run.comm.all_gather_list)
        self._count_skipped()
        last = self.step == self.total_steps
        if logs:
            self._log(metrics)
        if asked.system_metrics:
            self._run.gather_samples()
        check = self._check(last)
        if check is not None and check.collapsed and self._answer_collapse():
            return
        signal = asked.signal
        if last or check is not None or self._run.comm.world == 1:  # no next batch, a long check, nobody to ask
            signal = max(signal, *self._run.comm.max_each([self._run.stop.signal or 0]))
        self._stop(signal)
        # while updates are skipped none is saved, so that the newest is from before a run diverges
        due = asked.checkpoint and not self.engine.skipped_in_a_row
        if last or self.stopped or (check is not None and check.keep) or due:
            self.save()
        if last or self.stopped:
            self._run.settle()
            # no rank exits before the checkpoint is complete, and a signal may have come meanwhile
            self._stop(*self._run.comm.max_each([self._run.stop.signal or 0]))

    # -- after each batch ----------------------------------------------------------------------------------------------

    def _stop(self, signal: int) -> None:
        """Stop if any rank received a signal."""
        if signal:
            self._run.stop.hear(signal)
            self._run.checkpoints.hurry()
            self.stopped = True

    def _count_skipped(self) -> None:
        """Warn about updates skipped because the loss or gradient was not finite.

        Raises:
            SharedUserError: too many skipped updates in a row.
        """
        skipped = self.engine.skipped - self._seen_skipped
        if not skipped:
            return
        self._seen_skipped = self.engine.skipped
        in_a_row, most = self.engine.skipped_in_a_row, self._run.config.run.max_nonfinite_steps
        if in_a_row > most:
            self._run.settle()
            newest = self._run.comm.broadcast(self._run.checkpoints.describe())
            raise SharedUserError(
                f"run.max_nonfinite_steps: loss or gradient was not finite in the last {in_a_row} updates, at most "
                f"{most} allowed; at batch {self.step}, the newest checkpoint is {newest}; use a lower optim.lr in "
                "another output folder"
            )
        self._run.say(
            f"warning: batch {self.step - 1}: loss or gradient is not finite; {skipped} of its updates skipped, "
            f"{self._seen_skipped} since the start of the run"
        )

    def _log(self, metrics: dict[str, Tensor]) -> None:
        """Average the metrics over the ranks and log them to the tracker."""
        means, speed = self._averages.of(metrics)
        # the loss of a skipped update may be NaN or infinite
        self.shown = {name: f"{value:.3f}" for name, value in means.items() if math.isfinite(value)}
        means |= {"learning_rate": self.engine.learning_rate, "skipped": self.engine.skipped}
        means |= {} if (norm := self.engine.gradient_norm()) is None else {"gradient_norm": norm}
        named = [("train", means), ("speed", speed)]
        self._run.tracker.log({f"{kind}/{name}": v for kind, values in named for name, v in values.items()}, self.step)

    def _check(self, last: bool) -> Check | None:
        """Let the guard check if due, and log the result."""
        if self.guard is None or not (self.guard.due(self.step, bool(self.engine.skipped_in_a_row)) or last):
            return None
        self._timer.mark("guard")
        check = self.guard.check(self.engine, self.step)
        metrics = self.guard.metrics(last)
        if self._run.config.guard.on_collapse == "rollback":
            metrics["rollbacks"] = len(self.rollbacks)
        self._run.tracker.log({f"guard/{name}": value for name, value in metrics.items()}, self.step)
        show_check(self._run.tracker, self._run.config, self.guard, last)
        return check

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Start writing the checkpoint of this step, unless it is already saved. A collective."""
        if self._saved_step == self.step:
            return
        self._timer.mark("checkpoint")
        run = self._run
        if not self.engine.is_finite():
            raise SharedUserError(
                f"optim.lr: the adapter is not finite at batch {self.step}; use a lower one in another output folder"
            )
        trainable = self.engine.state()
        slots = {name: run.comm.gather(tensor) for name, tensor in self.phases.slot_state(self.step).items()}
        if trainable is not None:
            tensors = trainable.named()
            tensors |= {f"slots/{name}": torch.cat(parts) for name, parts in slots.items() if parts is not None}
            metadata: CheckpointMetadata = {
                "step": self.step,
                "best": None if self.guard is None else self.guard.best,
                "guard": {} if self.guard is None else self.guard.state_dict(),
                "rollbacks": self.rollbacks,
                "updates": trainable.updates,
                "skipped": trainable.skipped,
                "stream": self.stream.state_dict(),
                "mlflow_run_id": run.tracker.run_id,
                "config": run.config.model_dump(mode="json"),
                "backbone_sha256": self.engine.model.info.sha256,
            }
            run.checkpoints.write(self.step, tensors, metadata)
        self._saved_step = self.step

    def _resume(self, tensors: dict[str, Tensor], metadata: CheckpointMetadata) -> None:
        """Resume the run from a checkpoint."""
        self.rollbacks = metadata["rollbacks"]
        if self.rollbacks:
            self.phases = self.phases.rollback_from(min(past["to"] for past in self.rollbacks))
        if slots := self._restore(tensors, metadata):
            size = len(next(iter(slots.values()))) // self._run.comm.world
            first = size * self._run.comm.rank
            self.phases.load_slot_state({name: t[first : first + size] for name, t in slots.items()}, self.step)

    def _restore(self, tensors: dict[str, Tensor], metadata: CheckpointMetadata) -> dict[str, Tensor]:
        """Restore a checkpoint under the current phases and rollbacks. Returns the method's state of each slot."""
        self.stream.load_state_dict(metadata["stream"])
        if self.guard is not None:
            self.guard.resume(metadata["best"], metadata["guard"])
        self.step = self._saved_step = metadata["step"]
        state = TrainableState.of_named(tensors, metadata["updates"], metadata["skipped"])
        slots = state.tensors.pop("slots", {})
        self.engine.restore(state)
        self.engine.total_updates, self.engine.lr_scale = self.phases.total_updates, rollback.lr_scale(self.rollbacks)
        self._seen_skipped = self.engine.skipped
        return slots

    # -- after a collapse ----------------------------------------------------------------------------------------------

    def _answer_collapse(self) -> bool:
        """Act on a collapse according to `guard.on_collapse`. Returns whether the run rolled back.

        Raises:
            Collapsed: the run ends here, or cannot roll back.
        """
        assert self.guard is not None
        run, settings = self._run, self._run.config.guard
        collapse = f"collapse at batch {self.step}: {self.guard.describe_collapse()}"
        if settings.on_collapse == "warn":
            run.say(f"warning: {collapse}; set guard.on_collapse to stop or rollback to act on a collapse")
            return False
        if rollback.ends_run(settings, self.rollbacks):
            run.settle()
            raise rollback.why_it_ends(settings, collapse, self.guard.good_steps)
        self._roll_back(collapse, self.guard.good_steps)
        return True

    def _roll_back(self, collapse: str, good_steps: list[int]) -> None:
        """Roll back to the first intact checkpoint of `good_steps`, and continue as the guard's settings say. Neither
        that checkpoint nor an older one is deleted: if killed before the next one is written, the run detects the same
        collapse and rolls back again."""
        run, guard = self._run, self._run.config.guard
        number = len(self.rollbacks) + 1

        def read() -> Checkpoint:
            tensors, metadata = run.checkpoints.go_back(good_steps)
            run.tracker.go_back(metadata["step"], f"metrics_before_rollback_{number}.jsonl")
            return tensors, metadata

        try:
            checkpoint = run.on_every_rank(read, f"a checkpoint or metrics.jsonl in {run.config.run.output_dir}")
        except SharedUserError as error:
            raise rollback.Collapsed(f"guard.on_collapse: rollback: {collapse}; cannot roll back: {error}") from None
        assert checkpoint is not None
        tensors, metadata = checkpoint
        self.phases = self.phases.rollback_from(metadata["step"])
        method = self.phases.at(metadata["step"]).method
        entry = rollback.new_rollback(self.step, metadata["step"], guard, method.settings.name)
        self.rollbacks = [*self.rollbacks, entry]
        self._restore(tensors, metadata)  # the method after a rollback has no per-slot state
        run.checkpoints.ask()  # record the rollback in a checkpoint soon
        run.say(
            f"warning: {collapse}; rolled back to batch {self.step}, training with {method.settings.name} at "
            f"{size_in(run.config.threat.norm, method.threat.eps)} and {self.engine.lr_scale:g} of the "
            f"learning rate (rollback {number} of {guard.max_rollbacks})"
        )
