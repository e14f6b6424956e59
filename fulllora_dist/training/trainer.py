"""Everything a run has to remember, and the only place that counts, logs and saves."""

import math
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fulllora_dist.core.errors import SharedUserError, UserError
from fulllora_dist.data.batch import Batch
from fulllora_dist.data.loader import TrainStream
from fulllora_dist.distributed.engine import Engine, TrainableState
from fulllora_dist.evaluation import size_in
from fulllora_dist.models.finetune import AdaptedModel
from fulllora_dist.training.context import RunContext
from fulllora_dist.training.guard import Check, Guard
from fulllora_dist.training.phases import Phases
from fulllora_dist.training.resume import _rollback_settings, _start_from, check_rollback_settings
from fulllora_dist.training.run_plots import show_check


class Collapsed(SharedUserError):
    """The run ends because it has collapsed."""


class Trainer:
    """The run's position, engine, stream and method, resumed where there is something to resume.

    It begins from, in this order: its own newest state, `run.resume_from`, `adapter.init_from`, the bare backbone.

    Attributes:
        step: batches trained on since the beginning of the run.
        engine: the model under DeepSpeed.
        shown: last loss and accuracy, for the progress bar.
        stopped: a stop was asked for and the state is saved.
        stream: the training batches.
        phases: how it trains when.
        guard: looks at held-out images, where there are some.
        rollbacks: {"at", "to", "rollback_method", "rollback_lr_factor", "rollback_eps", "method"} of each time that it
            went back after a collapse: batches, and how it went on.
    """

    def __init__(
        self, run: RunContext, model: AdaptedModel, stream: TrainStream, phases: Phases, guard: Guard | None = None
    ):
        config = run.config
        self._run, self.stream, self.phases, self.guard = run, stream, phases, guard
        self.rollbacks: list[dict[str, Any]] = []
        self.step = 0
        self.shown: dict[str, str] = {}
        self.stopped = False
        self._saved_step: int | None = None
        trainable: TrainableState | None = None
        if run.saved is not None:
            trainable = self._resume(model, *run.saved)
        elif config.adapter.init_from:
            _start_from(model, config.adapter.init_from)
        self.engine = Engine(
            model,
            config.optim,
            config.distributed,
            config.deepspeed,
            run.ranks,
            self.phases.total_updates,
            trainable,
        )
        self.engine.lr_scale = self._lr_scale()
        self._skipped = self.engine.skipped
        self._due = False
        self._saved_at = time.monotonic()
        run.saved = None  # not needed again; with every slot of Free it is large

    def _resume(self, model: AdaptedModel, tensors: dict[str, Tensor], metadata: dict) -> TrainableState:
        if metadata["backbone_sha256"] != model.info.sha256:
            raise UserError(
                f"model.checkpoint_path: the run began with weights {metadata['backbone_sha256'][:12]}, "
                f"these have {str(model.info.sha256)[:12]}; give the same backbone to resume"
            )
        self.rollbacks = metadata.get("rollbacks", [])
        if self.rollbacks:
            check_rollback_settings(self.rollbacks[-1], self._run.config.guard)
            self.phases = self.phases.rollback_from(min(rollback["to"] for rollback in self.rollbacks))
        trainable, slots = self._go_to(tensors, metadata)
        if slots:
            size = len(next(iter(slots.values()))) // self._run.ranks.world
            first = size * self._run.ranks.rank
            self.phases.load_slot_state({name: t[first : first + size] for name, t in slots.items()}, self.step)
        self._run.say(f"resuming at batch {self.step} of {self.total_steps}")
        return trainable

    def _go_to(self, tensors: dict[str, Tensor], metadata: dict) -> tuple[TrainableState, dict[str, Tensor]]:
        """Take over a state's position; its trainable part, and what its method kept for each slot."""
        self.stream.load_state_dict(metadata["stream"])
        if self.guard is not None:
            self.guard.resume(metadata.get("best"), metadata.get("guard", {}))
        self.step = self._saved_step = metadata["step"]
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition("/")
            parts.setdefault(kind, {})[rest] = tensor
        slots = parts.pop("slots", {})
        return TrainableState(metadata["updates"], parts, metadata.get("skipped", 0)), slots

    @property
    def total_steps(self) -> int:
        """Batches of the whole run."""
        return self.phases.total_steps

    def _lr_scale(self) -> float:
        return math.prod(rollback["rollback_lr_factor"] for rollback in self.rollbacks)

    def train(self) -> None:
        """Train on the batches that are left, or until a stop is asked for.

        Raises:
            Collapsed: the run ends after a collapse.
        """
        for batch in self.batches():
            self.advance(batch)

    def batches(self) -> Iterator[Batch]:
        """The batches that are left, on the device; rank 0 shows loss, accuracy, images a second and time left."""
        run, size = self._run, self._run.config.optim.batch_size
        bar = tqdm(
            total=self.total_steps * size,
            initial=self.step * size,
            unit="img",
            unit_scale=True,
            file=sys.stderr,
            disable=not run.ranks.is_main,
            dynamic_ncols=True,
            mininterval=1.0,
        )
        with bar, run.stop.deferred():
            while self.step < self.total_steps:
                phase = self.phases.at(self.step)
                self.stream.resize(phase.image_size or self.engine.model.info.image_size)
                for batch in self.stream:
                    before = self.step
                    yield batch.to(run.ranks.device)
                    bar.set_postfix(self.shown, refresh=False)
                    bar.update((self.step - before) * size)
                    if self.stopped:
                        return
                    if self.step >= phase.end or self.step <= before:  # the next phase, or back in an earlier one
                        break
                bar.total = self.total_steps * size

    def advance(self, batch: Batch) -> None:
        """Train on a batch, as its phase does now, and count it; log, save, stop and go back where it is time."""
        metrics = self.phases.step(self.engine, batch, self.step)
        self.step += 1
        self.stream.commit(self.step)
        self.stream.count_bad(self._run.ranks.all_gather_list)
        self._count_skipped()
        last = self.step == self.total_steps
        if last or self.step % self._run.config.run.log_every == 0:
            self._log(metrics)
        check = self._check(last)
        if check is not None and check.collapsed and self._answer_collapse():
            return
        # one vote for both: a signal, and rank 0's word on saving
        vote = self._run.ranks.max((self._run.stop.signal or 0) << 1 | self._wants_state())
        if stop := vote >> 1:
            self._run.stop.hear(stop)  # a scheduler may signal one node alone: every rank leaves in the same way
            self._run.states.hurry()
            self.stopped = True
        if last or self.stopped or (check is not None and check.keep) or vote & 1:
            self.save()
        if last or self.stopped:
            self._run.settle()
            self._run.ranks.barrier()  # a rank that leaves now leaves a whole state behind

    def _check(self, last: bool) -> Check | None:
        """What the guard has found, where it has looked."""
        if self.guard is None or not (self.guard.due(self.step, bool(self.engine.skipped_in_a_row)) or last):
            return None
        check = self.guard.check(self.engine, self.step)
        points = self.guard.points(last)
        if self._run.config.guard.on_collapse == "rollback":
            points["rollbacks"] = len(self.rollbacks)
        self._run.tracker.log({f"guard/{name}": value for name, value in points.items()}, self.step)
        show_check(self._run.tracker, self._run.config, self.guard, last)
        return check

    def _answer_collapse(self) -> bool:
        """As `guard.on_collapse` says; whether the run went back.

        Raises:
            Collapsed: the run ends here, or cannot go back.
        """
        assert self.guard is not None
        run, settings = self._run, self._run.config.guard
        good = self.guard.good_steps
        what = f"collapse at batch {self.step}: {self.guard.described_fall()}"
        if settings.on_collapse == "warn":
            run.say(f"warning: {what}; guard.on_collapse=stop would end the run here, rollback go back to a good state")
            return False
        if settings.on_collapse == "rollback" and len(self.rollbacks) < settings.max_rollbacks:
            self._go_back(what, good)
            return True
        run.settle()
        name, advice = "max_rollbacks", "a smaller guard.rollback_eps or optim.lr in another folder is right"
        if settings.on_collapse == "stop":
            name, advice = (
                "on_collapse",
                "with guard.on_collapse=rollback the same command goes on from there",
            )
        newest = f"the newest good state is that of batch {good[0]}" if good else "no good state was kept"
        raise Collapsed(f"guard.{name}: {getattr(settings, name)}: {what}; {newest}; {advice}")

    def _go_back(self, what: str, good: list[int]) -> None:
        """To the first of the states `good` that is whole, and on from there with the safer setting.

        Neither that state nor an older one is touched: killed before the next state is written, the run finds the same
        collapse and goes back again."""
        run, guard = self._run, self._run.config.guard
        number = len(self.rollbacks) + 1

        def read() -> tuple[dict[str, Tensor], dict[str, Any]]:
            tensors, metadata = run.states.go_back(good)
            run.tracker.go_back(metadata["step"], f"metrics_before_rollback_{number}.jsonl")
            return tensors, metadata

        try:
            found = run.ranks.run_on_rank0(read, f"a state or metrics.jsonl in {run.config.run.output_dir}")
        except SharedUserError as error:
            raise Collapsed(f"guard.on_collapse: rollback: {what}; cannot go back: {error}") from None
        tensors = run.ranks.broadcast_tensors(found and found[0])
        metadata = run.ranks.broadcast(found and found[1])
        self.phases = self.phases.rollback_from(metadata["step"])
        method = self.phases.at(metadata["step"]).method
        rollback = {"at": self.step, "to": metadata["step"], **_rollback_settings(guard)}
        rollback["method"] = method.settings.name  # where rollback_method leaves it open
        self.rollbacks = [*self.rollbacks, rollback]
        trainable, _ = self._go_to(tensors, metadata)  # a safer method keeps nothing for the slots
        self.engine.restore(trainable)
        self.engine.total_updates, self.engine.lr_scale = self.phases.total_updates, self._lr_scale()
        self._skipped = self.engine.skipped
        self._due = True  # what happened is to be in a state soon
        run.say(
            f"warning: {what}; back to batch {self.step}, on with {method.settings.name} at "
            f"{size_in(run.config.threat.norm, method.threat.eps)} and {self._lr_scale():g} of the "
            f"learning rate (rollback {number} of {guard.max_rollbacks})"
        )

    def _wants_state(self) -> bool:
        """Whether a state is due on rank 0. It waits until the one before is written, and while updates are skipped:
        where the run diverges, the newest state is from before."""
        run, settings = self._run, self._run.config.run
        if not run.ranks.is_main:
            return False
        minutes = (time.monotonic() - self._saved_at) / 60
        self._due |= self.step % settings.checkpoint_every == 0 or minutes >= (settings.checkpoint_minutes or math.inf)
        if run.states.idle:
            run.settle()
        return self._due and run.states.idle and not self.engine.skipped_in_a_row

    def _count_skipped(self) -> None:
        skipped = self.engine.skipped - self._skipped
        if not skipped:
            return
        self._skipped = self.engine.skipped
        in_a_row, most = self.engine.skipped_in_a_row, self._run.config.run.max_nonfinite_steps
        if in_a_row > most:
            self._run.settle()
            newest = self._run.ranks.broadcast(self._run.states.described())
            raise SharedUserError(
                f"run.max_nonfinite_steps: loss or gradient was not finite in the last {in_a_row} updates, {most} may "
                f"be; at batch {self.step}, the newest state is {newest}. Start with a lower optim.lr in another folder"
            )
        self._run.say(
            f"warning: batch {self.step - 1}: loss or gradient is not finite; {skipped} of its updates skipped, "
            f"{self._skipped} since the run began"
        )

    def _log(self, metrics: dict[str, Tensor]) -> None:
        names = list(metrics)
        total = self._run.ranks.sum(torch.stack([metrics[name].double() for name in names]))
        means = dict(zip(names, (total / self._run.ranks.world).tolist(), strict=True))
        # a skipped update has no loss
        self.shown = {name: f"{value:.3f}" for name, value in means.items() if math.isfinite(value)}
        means |= {"learning_rate": self.engine.learning_rate, "skipped": self.engine.skipped}
        if (norm := self.engine.gradient_norm()) is not None:
            means["gradient_norm"] = norm
        self._run.tracker.log({f"train/{name}": value for name, value in means.items()}, self.step)
        self._run.gather_samples()

    def save(self) -> None:
        """Begin to write the state, once a step. A collective."""
        if self._saved_step == self.step:
            return
        run = self._run
        trainable = self.engine.state()
        if not all(t.isfinite().all() for t in trainable.tensors["master"].values()):
            raise SharedUserError(
                f"the adapter is not finite at batch {self.step}; start with a lower optim.lr in another output folder"
            )
        slots = {name: run.ranks.gather(tensor) for name, tensor in self.phases.slot_state(self.step).items()}
        if run.ranks.is_main:
            tensors = {f"{kind}/{name}": t for kind, named in trainable.tensors.items() for name, t in named.items()}
            tensors |= {f"slots/{name}": torch.cat(parts) for name, parts in slots.items() if parts is not None}
            best = None if self.guard is None else self.guard.best
            metadata = {
                "best": best,
                "guard": {} if self.guard is None else self.guard.state_dict(),
                "rollbacks": self.rollbacks,
                "updates": trainable.updates,
                "skipped": trainable.skipped,
                "stream": self.stream.state_dict(),
                "mlflow_run_id": run.tracker.run_id,
                "config": run.config.model_dump(mode="json"),
                "backbone_sha256": self.engine.model.info.sha256,
            }
            run.states.write(self.step, tensors, metadata)
        self._saved_step, self._saved_at, self._due = self.step, time.monotonic(), False
