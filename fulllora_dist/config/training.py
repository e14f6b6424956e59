"""Settings of the guard and of the phases, which choose methods."""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny

from fulllora_dist.core.settings import Settings
from fulllora_dist.core.units import Size
from fulllora_dist.methods import METHODS, MethodSettings


def _method(value: object) -> object:
    """`pgd` or {name: pgd, ...} -> the settings of that method."""
    if isinstance(value, str):
        value = {"name": value}
    if isinstance(value, Mapping):
        name = value.get("name")
        if not isinstance(name, str) or name not in METHODS:
            raise ValueError(f"name: {name!r} is no method; known: {', '.join(METHODS)}")
        return METHODS[name].Settings.model_validate(dict(value))
    return value


MethodChoice = Annotated[SerializeAsAny[MethodSettings], BeforeValidator(_method)]


class GuardSettings(Settings):
    """Robust accuracy on data.held_out in the midst of training; the state that is best by it is kept, and a collapse
    (catastrophic overfitting) is noticed (docs/guards.md)."""

    every: int = Field(50, ge=1)
    """Batches between two looks, and until a collapse is noticed; the last batch is looked at too. With 10 steps on 256
    images a look costs as much as 2.6 batches of PGD-3 at batch size 256, and a quarter of that at 1,024; twice as
    much with optim.ema_decay, where the average and what it is of are looked at."""
    num_samples: int = Field(256, ge=1)
    """How many of the images, at most; drawn evenly over the classes, the same each time."""
    steps: int = Field(10, ge=1)
    """Steps of PGD, at threat.eps."""
    on_collapse: Literal["warn", "stop", "rollback"] = "warn"
    """After a collapse: say so; end the run; or go back to the newest state that was looked at and good, and on from
    there with rollback_method, rollback_lr_factor and rollback_eps."""
    collapse_below: float = Field(0.5, gt=0, lt=1)
    """A collapse is robust accuracy below this share of its best, once that is clearly above chance, and by more than
    two standard errors. With optim.ema_decay it is that of the parameters themselves: their average would show it
    late."""
    max_rollbacks: int = Field(2, ge=1)
    """How often a run may go back; one more collapse ends it."""
    rollback_method: MethodChoice | None = None
    """How batches after a rollback are trained; null keeps pgd, trades and mart, and takes pgd in place of the rest."""
    rollback_lr_factor: float = Field(0.5, gt=0, le=1)
    """Factor of the learning rate after each rollback."""
    rollback_eps: Annotated[Size, Field(gt=0)] | None = None
    """Size of the perturbation that is trained on after a rollback, in pixels of [0, 1]; null keeps that of each phase,
    and so does a phase with a smaller one."""


class PhaseSettings(Settings):
    """A part of the run with settings of its own; what is left out is the run's."""

    fraction: float = Field(gt=0, le=1)
    """Of the run's optimizer updates; the shares of all phases add up to 1."""
    image_size: int | None = Field(None, ge=1)
    """Side of the images in pixels, a multiple of the patch size; null takes the model's."""
    method: MethodChoice | None = None
    """How it trains; null takes the run's method."""
    eps: Size | None = None
    """Size of the perturbation in pixels of [0, 1]; null takes threat.eps."""
