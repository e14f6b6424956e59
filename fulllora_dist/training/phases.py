"""Phases of a run, each with its own method, threat model and image size.

Each phase takes a fraction of the optimizer updates. Optimizer, learning rate schedule and data stream do not know
about phases: updates and batches are numbered across them, so that a run with phases resumes like any other.
"""

import math
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from fulllora_dist.attacks.threat import threat_model
from fulllora_dist.config.schema import PIXELS, Config
from fulllora_dist.config.training import PhaseSettings
from fulllora_dist.core.errors import UserError
from fulllora_dist.data.batch import Batch
from fulllora_dist.methods import METHODS, Method
from fulllora_dist.methods.base import WeightStep
from fulllora_dist.methods.multi_step import MultiStep
from fulllora_dist.methods.settings import PGDSettings
from fulllora_dist.methods.standard import Standard
from fulllora_dist.methods.warmup import WarmupSchedule


@dataclass(frozen=True)
class Phase:
    """A phase: batches `first` to `end` - 1 of the run.

    Attributes:
        image_size: side in pixels; None for the model's own.
        after_rollback: the method after a rollback, which may be `method` itself.
    """

    first: int
    end: int
    image_size: int | None
    method: Method
    after_rollback: Method

    @property
    def updates(self) -> int:
        """Number of optimizer updates in the phase."""
        return (self.end - self.first) * self.method.updates_per_batch


class Phases:
    """The phases of a run, which the training loop uses like a single method."""

    def __init__(self, phases: Sequence[Phase]):
        self.phases = tuple(phases)
        self.total_steps = self.phases[-1].end
        self.total_updates = sum(phase.updates for phase in self.phases)

    def prepare(self, backbone: nn.Module, image_size: int) -> None:
        """Call `Method.prepare` of each phase, before the first batch; `image_size` is the model's own."""
        for phase in self.phases:
            for method in {phase.method, phase.after_rollback}:
                method.prepare(backbone, phase.image_size or image_size, phase.first)

    def at(self, step: int) -> Phase:
        """The phase of batch `step`; at the end of the run, the last phase."""
        return next((phase for phase in self.phases if step < phase.end), self.phases[-1])

    def made(self, step: int) -> list[dict[str, Any]]:
        """How the first `step` batches were trained, JSON-able: first and end batch, method, eps (None for standard
        training) and image size (None for the model's own) of each part."""
        parts: list[dict[str, Any]] = []
        for phase in self.phases:
            if phase.first >= step:
                break
            eps = None if isinstance(phase.method, Standard) else phase.method.threat.eps
            settings = phase.method.settings.model_dump(mode="json")
            part = {"end": min(phase.end, step), "method": settings, "eps": eps, "image_size": phase.image_size}
            if parts and all(parts[-1][key] == part[key] for key in ("method", "eps", "image_size")):
                parts[-1]["end"] = part["end"]  # a rollback split this phase
            else:
                parts.append({"first": phase.first, **part})
        return parts

    def rollback_from(self, step: int) -> "Phases":
        """The same run with the safer methods from batch `step` on.

        The number of updates stays the same, and so does the number of batches unless the safer method makes a
        different number of updates per batch. Warm-ups continue as planned, measured in updates."""
        phases = [phase for phase in self.phases if phase.end <= step]
        for phase in self.phases[len(phases) :]:
            if phase.first < step:
                phases.append(replace(phase, end=step))
            first, start = phases[-1].end if phases else 0, max(step, phase.first)
            updates = (phase.end - start) * phase.method.updates_per_batch
            batches = math.ceil(updates / phase.after_rollback.updates_per_batch)
            rate = phase.after_rollback.updates_per_batch / phase.method.updates_per_batch
            method, before = copy(phase.after_rollback), phase.method.warmup
            method.warmup = replace(method.warmup, since=first, planned=before.at(start), rate=before.rate * rate)
            phases.append(replace(phase, first=first, end=first + batches, method=method))
        return Phases(phases)

    def step(self, engine: WeightStep, batch: Batch, step: int) -> dict[str, Tensor]:
        """Call `Method.step` of the batch's phase."""
        return self.at(step).method.step(engine, batch, step)

    def slot_state(self, step: int) -> dict[str, Tensor]:
        """`Method.slot_state` of the phase of batch `step`; that of a finished phase is no longer needed."""
        return self.at(step).method.slot_state()

    def load_slot_state(self, state: Mapping[str, Tensor], step: int) -> None:
        """Call `Method.load_slot_state` of the phase of batch `step`."""
        self.at(step).method.load_slot_state(state)


def build_phases(config: Config, steps_per_epoch: int) -> Phases:
    """Build the phases of a config; without any, the whole run is one phase.

    The run has epochs x steps_per_epoch optimizer updates. A phase ends with the first whole batch that reaches its
    share and those of all earlier phases.

    Raises:
        UserError: a phase would have no batch, or a rollback would change nothing.
    """
    updates = config.optim.epochs * steps_per_epoch
    phases: list[Phase] = []
    share, planned, first = 0.0, 0, 0
    for i, settings in enumerate(config.phases or (PhaseSettings(fraction=1),)):
        choice = settings.method or config.method
        threat = threat_model(config.threat.norm, config.threat.eps if settings.eps is None else settings.eps)
        method = METHODS[choice.name](choice, threat, config.run.seed, targets=config.targets)
        share += settings.fraction
        # a rounding error of the shares must not add a batch
        batches = math.ceil((share * updates - planned) / method.updates_per_batch - 1e-9)
        if batches < 1:
            raise UserError(
                f"phases.{i}.fraction: {settings.fraction:g} of {updates:g} updates leaves no batch for this phase, as "
                "earlier phases end with whole batches; use a larger fraction or more optim.epochs"
            )
        after_rollback = _method_after_rollback(method, config)
        phases.append(Phase(first, first + batches, settings.image_size, method, after_rollback))
        first, planned = phases[-1].end, planned + phases[-1].updates
    warmup = WarmupSchedule(
        round(config.threat.eps_warmup_ratio * first), round(config.threat.step_size_warmup_ratio * first), first
    )
    for phase in phases:
        phase.method.warmup = warmup
        share = phase.after_rollback.threat.eps / phase.method.threat.eps if phase.method.threat.eps else 1.0
        # a smaller eps is reached sooner, so that a rollback during the warm-up does not shrink it any further
        phase.after_rollback.warmup = replace(warmup, eps=max(0, round((warmup.eps + 1) * share) - 1))
    guard = config.guard
    if (
        guard.on_collapse == "rollback"
        and guard.rollback_lr_factor == 1
        and all(p.after_rollback is p.method for p in phases)
    ):
        raise UserError(
            f"guard.rollback_lr_factor: must be below 1 if the method stays {config.method.name} after a rollback, "
            "got 1; set a smaller factor, guard.rollback_method or guard.rollback_eps"
        )
    return Phases(phases)


def _method_after_rollback(method: Method, config: Config) -> Method:
    """The method that a phase uses after a rollback.

    Raises:
        UserError: that method keeps state for each batch slot, which a checkpoint of another method does not have.
    """
    choice, threat, smaller = config.guard.rollback_method, method.threat, 1.0
    if config.guard.rollback_eps is not None and config.guard.rollback_eps < threat.eps:
        smaller = config.guard.rollback_eps / threat.eps
        threat = replace(threat, eps=config.guard.rollback_eps)
    if choice is None and isinstance(method, MultiStep):  # its sizes in pixels were chosen for the larger eps
        sizes = {key: getattr(method.settings, key, None) for key in PIXELS}
        scaled = {key: size * smaller for key, size in sizes.items() if size is not None}
        choice = method.settings.model_copy(update=scaled)
    choice = choice or PGDSettings()
    if choice == method.settings and threat == method.threat:
        return method
    if METHODS[choice.name].slot_state is not Method.slot_state:
        raise UserError(
            f"guard.rollback_method: must not keep a perturbation for each image, got {choice.name}; use pgd"
        )
    return METHODS[choice.name](choice, threat, config.run.seed, targets=config.targets)
