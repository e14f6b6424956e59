"""Settings of the optimizer and of DeepSpeed."""

from typing import Literal

from pydantic import Field

from fulllora_dist.core.settings import Decay, Settings


class OptimSettings(Settings):
    """AdamW with linear warmup and cosine decay, per optimizer update."""

    lr: float = Field(1e-3, gt=0)
    """Peak learning rate."""
    min_lr: float = Field(0.0, ge=0)
    """Learning rate at the end of the cosine."""
    warmup_ratio: float = Field(0.05, ge=0, lt=1)
    """Fraction of the updates over which the learning rate warms up linearly."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """AdamW betas."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay of matrices; norms, biases, class token and position embedding are not decayed."""
    grad_clip: float = Field(1.0, ge=0)
    """Maximum global gradient norm; 0 disables clipping."""
    ema_decay: float = Field(0.0, ge=0, lt=1)
    """Decay of the exponential moving average of the adapter, which is then saved and evaluated; 0 disables it."""
    batch_size: int = Field(256, ge=1)
    """Global batch size per optimizer update, over all ranks and micro-batches."""
    epochs: float = Field(10, gt=0)
    """Epochs, counted in optimizer updates: Free with m replays draws 1 / m as many batches."""


class DistributedSettings(Settings):
    zero_stage: Literal[0, 1, 2, 3] = 1
    """ZeRO stage: 1 shards optimizer states, 2 also gradients, 3 also weights (gathered in every attack pass)."""
    gradient_accumulation_steps: int = Field(1, ge=1)
    """Micro-batches per optimizer update."""
    activation_checkpointing: Literal["off", "weight_step", "all"] = "off"
    """Recompute blocks in the backward pass: off, in the weight step only, or in attack passes too."""
    timeout_minutes: float | None = Field(None, gt=0)
    """Minutes that ranks wait for another in training until the run ends; null: data.retry_timeout_s and five times
    data.request_timeout_s, at least 15 minutes."""
