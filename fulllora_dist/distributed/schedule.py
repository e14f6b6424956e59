"""How the optimizer's settings unfold over a run: the learning rate of an update, the batch of a rank."""

import math

from fulllora_dist.core.errors import UserError
from fulllora_dist.distributed.settings import OptimSettings


def learning_rate(update: int, total: int, settings: OptimSettings) -> float:
    """Linear warm-up to `lr`, then half a cosine down to `min_lr`, at optimizer update 0 .. total - 1."""
    warmup = int(settings.warmup_ratio * total)
    if update < warmup:
        return settings.lr * (update + 1) / warmup
    progress = (update - warmup) / max(1, total - warmup)
    return settings.min_lr + (settings.lr - settings.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def check_batch(settings: OptimSettings, accumulation: int, world: int) -> int:
    """Images a micro-batch and rank.

    Raises:
        UserError: the batch does not divide.
    """
    parts = world * accumulation
    if settings.batch_size % parts:
        raise UserError(
            f"optim.batch_size must be a multiple of {parts} ({world} ranks x distributed.gradient_accumulation_steps="
            f"{accumulation}), got {settings.batch_size}"
        )
    return settings.batch_size // parts
