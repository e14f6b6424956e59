"""What a run does when its guard detects a collapse: warn, stop, or roll back to a good checkpoint.

Every later checkpoint and the adapter's description record a rollback as {"at", "to": batches, "rollback_method",
"rollback_lr_factor", "rollback_eps": the settings, "method": the method used from there on}.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fulllora_dist.config.training import GuardSettings
from fulllora_dist.core.errors import SharedUserError, UserError

Rollback = dict[str, Any]


class Collapsed(SharedUserError):
    """The run ends after a collapse."""


def new_rollback(at: int, to: int, settings: GuardSettings, method: str) -> Rollback:
    """The record of a rollback from batch `at` to batch `to`, after which `method` trains."""
    return {"at": at, "to": to, **_settings(settings), "method": method}


def lr_scale(rollbacks: Sequence[Rollback]) -> float:
    """The learning rate factor after these rollbacks."""
    return math.prod(rollback["rollback_lr_factor"] for rollback in rollbacks)


def ends_run(settings: GuardSettings, rollbacks: Sequence[Rollback]) -> bool:
    """Whether one more collapse ends the run."""
    if settings.on_collapse == "rollback":
        return len(rollbacks) >= settings.max_rollbacks
    return settings.on_collapse == "stop"


def why_it_ends(settings: GuardSettings, collapse: str, good_steps: Sequence[int]) -> Collapsed:
    """The error that ends the run after a `collapse`, with advice for the user."""
    name, advice = "max_rollbacks", "try a smaller guard.rollback_eps or optim.lr in another output folder"
    if settings.on_collapse == "stop":
        name, advice = "on_collapse", "with guard.on_collapse=rollback the same command resumes from there"
    newest = f"the newest good checkpoint is of batch {good_steps[0]}" if good_steps else "no good checkpoint was kept"
    return Collapsed(f"guard.{name}: {getattr(settings, name)}: {collapse}; {newest}; {advice}")


def _settings(settings: GuardSettings) -> dict[str, Any]:
    return settings.model_dump(mode="json", include={"rollback_method", "rollback_lr_factor", "rollback_eps"})


def check_settings(rollback: Mapping[str, Any], settings: GuardSettings) -> None:
    """Check that the run still has the settings of its last rollback.

    Raises:
        UserError: a setting differs from that in `rollback`.
    """
    for key, now in _settings(settings).items():
        then = rollback[key]
        if now != then:
            raise UserError(
                f"guard.{key}: the run rolled back to batch {rollback['to']} with {then}, got {now}; "
                "resume with the same setting"
            )
