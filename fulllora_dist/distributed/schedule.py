"""The learning rate of an update and the batch size of a rank, from the optimizer's settings."""

import math

from fulllora_dist.core.errors import UserError
from fulllora_dist.distributed.settings import OptimSettings


def learning_rate(update: int, total: int, settings: OptimSettings) -> float:
    """Learning rate at optimizer update 0 .. total - 1: linear warm-up to `lr`, then cosine decay to `min_lr`."""
    warmup = int(settings.warmup_ratio * total)
    if update < warmup:
        return settings.lr * (update + 1) / warmup
    progress = (update - warmup) / max(1, total - warmup)
    return settings.min_lr + (settings.lr - settings.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def check_batch(settings: OptimSettings, accumulation: int, world: int) -> int:
    """Number of images per micro-batch and rank.

    Raises:
        UserError: the batch size is not divisible by ranks x accumulation steps.
    """
    parts = world * accumulation
    if settings.batch_size % parts:
        raise UserError(
            f"optim.batch_size must be a multiple of {parts} ({world} ranks x distributed.gradient_accumulation_steps="
            f"{accumulation}), got {settings.batch_size}"
        )
    return settings.batch_size // parts
