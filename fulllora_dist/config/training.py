"""Settings of the guard and of the phases, which choose methods."""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny

from fulllora_dist.core.settings import Settings
from fulllora_dist.core.units import Size
from fulllora_dist.methods.settings import METHOD_SETTINGS, MethodSettings


def _method(value: object) -> object:
    """Turn `pgd` or {name: pgd, ...} into the settings of that method."""
    if isinstance(value, str):
        value = {"name": value}
    if isinstance(value, Mapping):
        name = value.get("name")
        if not isinstance(name, str) or name not in METHOD_SETTINGS:
            raise ValueError(f"name: unknown method {name!r}; known: {', '.join(METHOD_SETTINGS)}")
        return METHOD_SETTINGS[name].model_validate(dict(value))
    return value


MethodChoice = Annotated[SerializeAsAny[MethodSettings], BeforeValidator(_method)]


class GuardSettings(Settings):
    """Robust accuracy on data.held_out during training: the best checkpoint is kept, and a collapse (catastrophic
    overfitting) is detected (docs/guards.md)."""

    every: int = Field(50, ge=1)
    """Check every so many batches, and after the last one. With 10 steps on 256 images a check costs as much as 2.6
    batches of PGD-3 at batch size 256; twice as much with optim.ema_decay, where both the average and the parameters
    are checked."""
    num_samples: int = Field(256, ge=1)
    """Maximum number of images, drawn evenly over the classes, the same in every check."""
    steps: int = Field(10, ge=1)
    """PGD steps, at threat.eps."""
    on_collapse: Literal["warn", "stop", "rollback"] = "warn"
    """On a collapse: warn, stop the run, or roll back to the newest good checkpoint and resume from it with
    rollback_method, rollback_lr_factor and rollback_eps."""
    collapse_below: float = Field(0.5, gt=0, lt=1)
    """A collapse is a robust accuracy below this fraction of its best, by more than two standard errors, once the best
    is clearly above chance. With optim.ema_decay the parameters themselves are judged: their average lags behind."""
    max_rollbacks: int = Field(2, ge=1)
    """Maximum number of rollbacks; the next collapse ends the run."""
    rollback_method: MethodChoice | None = None
    """Method after a rollback; null keeps pgd, trades and mart, and replaces any other by pgd."""
    rollback_lr_factor: float = Field(0.5, gt=0, le=1)
    """Learning rate factor applied at each rollback."""
    rollback_eps: Annotated[Size, Field(gt=0)] | None = None
    """eps after a rollback, for pixels in [0, 1]; null keeps that of each phase, as does a phase with a smaller one."""


class PhaseSettings(Settings):
    """A part of the run that overrides the run's settings."""

    fraction: float = Field(gt=0, le=1)
    """Fraction of the run's optimizer updates; those of all phases must sum to 1."""
    image_size: int | None = Field(None, ge=1)
    """Input size in pixels, a multiple of the patch size; null takes the model's."""
    method: MethodChoice | None = None
    """Training method; null takes the run's."""
    eps: Size | None = None
    """eps, for pixels in [0, 1]; null takes threat.eps."""
