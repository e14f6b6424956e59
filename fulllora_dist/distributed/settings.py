"""Settings of the optimizer and of DeepSpeed."""

from typing import Literal

from pydantic import Field

from fulllora_dist.core.settings import Decay, Settings


class OptimSettings(Settings):
    """AdamW, linear warm-up, then a cosine; one value an optimizer update."""

    lr: float = Field(1e-3, gt=0)
    """Peak learning rate."""
    min_lr: float = Field(0.0, ge=0)
    """Learning rate at the end of the cosine."""
    warmup_ratio: float = Field(0.05, ge=0, lt=1)
    """Share of the updates in which the learning rate rises linearly."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """AdamW's averaging of gradient and squared gradient."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled, on matrices; norms and biases are left out."""
    grad_clip: float = Field(1.0, ge=0)
    """Largest norm of the whole gradient; 0 does not clip."""
    ema_decay: float = Field(0.0, ge=0, lt=1)
    """Decay of an average of the adapter, which is then what is saved and evaluated; 0 keeps none."""
    batch_size: int = Field(256, ge=1)
    """Images an optimizer update, over all ranks and micro-batches."""
    epochs: float = Field(10, gt=0)
    """Passes over the data in optimizer updates: Free with m replays draws 1 / m as many batches."""


class DistributedSettings(Settings):
    zero_stage: Literal[0, 1, 2, 3] = 1
    """ZeRO stage: 1 shards the optimizer, 2 the gradients, 3 the weights too (gathered in each attack pass)."""
    gradient_accumulation_steps: int = Field(1, ge=1)
    """Micro-batches an optimizer update and rank."""
    activation_checkpointing: Literal["off", "weight_step", "all"] = "off"
    """Recompute the blocks in backward: in the weight step alone, or in the attack's passes too."""
    timeout_minutes: float = Field(30.0, gt=0)
    """Until a rank gives up that waits for another one, and ends the run; longer than data.retry_timeout_s."""
