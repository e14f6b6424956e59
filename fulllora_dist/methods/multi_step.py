"""Multi-step attacks during training, with the modifications of Mo et al. (arXiv 2210.07540).

At the start of a ViT's training they weaken the attack: *attention random dropping* drops, block by block, the gradient
through attention, and *perturbation random masking* removes the perturbation from some patches. The fraction that is
kept grows linearly from 0 to 1 over the first batches, after which the attack is the plain one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fulllora_dist.attacks.pgd import Loss, ascend, attack_mode, cross_entropy, default_step_size
from fulllora_dist.attacks.threat import Threat, in_box
from fulllora_dist.core.errors import UserError
from fulllora_dist.core.rng import SampleRng, sample_rng
from fulllora_dist.methods.base import PerturbedStep
from fulllora_dist.methods.settings import MultiStepSettings
from fulllora_dist.methods.warmup import WarmupSchedule, ramp
from fulllora_dist.models.backbone import patch_size


class MultiStep(PerturbedStep):
    """Base class of methods with a multi-step attack."""

    _patch: int | None = None  # the backbone's

    def prepare(self, backbone: nn.Module, image_size: int, first: int) -> None:
        settings = self.settings
        for name in ("attention_drop", "perturbation_mask"):
            share = getattr(settings, name)
            if share and round(share * self.warmup.run) <= first:
                raise UserError(
                    f"method.{name}: {share:g} of the run is over before batch {first}, with which this phase of "
                    f"{settings.name} begins; give a larger share, or 0"
                )
        if settings.attention_drop and not attentions(backbone):
            raise UserError("method.attention_drop: this backbone has no modules named attn; set it to 0")
        if settings.perturbation_mask:
            self._patch = settings.mask_patch or _patch_of(backbone)
            if image_size % self._patch:
                raise UserError(
                    f"method.mask_patch: {self._patch} does not divide images of {image_size} pixels; give the "
                    "backbone's patch size, and a multiple of it for phases.image_size"
                )

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, step: int, ids: Tensor) -> Tensor:
        settings = self.settings
        size = default_step_size(self.threat.eps, settings.steps) if settings.step_size is None else settings.step_size
        weakened = settings.attention_drop > 0 or settings.perturbation_mask > 0
        patch = self._patch or settings.mask_patch
        rng = sample_rng(self.seed, f"train/{settings.name}/start/0", step, ids)
        with attack_mode(model):
            target, loss = self.objective(model, x, y)
            return ascend(
                model,
                x,
                in_box(x + self.start(threat, rng, x)),
                target,
                threat=threat,
                steps=settings.steps,
                step_size=self.step_size(size, step),
                loss=loss,
                hook=Weakened(settings, patch, self.warmup, self.seed, step, ids) if weakened else None,
            )

    def start(self, threat: Threat, rng: SampleRng, x: Tensor) -> Tensor:
        """The initial perturbation [B, 3, H, W] of the attack: uniform in the ball."""
        return threat.random_start(rng, x)

    def objective(self, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Loss]:
        """The target and the loss that the attack increases: the cross-entropy of the labels; inside `attack_mode`."""
        return y, cross_entropy

    def passes(self) -> tuple[int, int]:
        both = self.settings.steps + self.images_in_weight_step
        return both, both


def attentions(model: nn.Module) -> list[nn.Module]:
    """The attention module of each block, by its name in timm."""
    return [module for name, module in model.named_modules() if name.rpartition(".")[2] == "attn"]


def _patch_of(backbone: nn.Module) -> int:
    size = patch_size(backbone)
    if size is None:
        raise UserError("method.mask_patch: must be set, as the patch size of this backbone is unknown")
    return size[0]


class Weakened:
    """Attention random dropping and perturbation random masking of one batch (a `StepHook`).

    Each sample has its own draws, keyed by (seed, step, attack step, block, id): Mo et al. draw once for the whole
    batch of a GPU, which would depend on how the batch is spread over ranks.

    Args:
        patch: side of the patches in pixels, a divisor of the images'; None where none are masked.
        warmup: with the batches of the whole run.
        step: number of this batch.
        ids: int64 [B].
    """

    def __init__(
        self, settings: MultiStepSettings, patch: int | None, warmup: WarmupSchedule, seed: int, step: int, ids: Tensor
    ):
        self._patch = patch
        self._seed, self._step, self._ids = seed, step, ids
        self._attention_kept = ramp(warmup.at(step), round(settings.attention_drop * warmup.run))
        self._patches_kept = ramp(warmup.at(step), round(settings.perturbation_mask * warmup.run))

    def _draw(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        return sample_rng(self._seed, f"train/{purpose}", self._step, self._ids).uniform(shape)

    def perturbation(self, delta: Tensor, k: int) -> Tensor:
        """Zero a random fraction of the patches of `delta` [B, C, H, W], the same number in each sample."""
        if self._patches_kept == 1:
            return delta
        assert self._patch is not None, "`prepare` was not called"
        if delta.shape[-2] % self._patch or delta.shape[-1] % self._patch:
            size = " x ".join(map(str, delta.shape[-2:]))
            raise UserError(f"mask_patch: {self._patch} does not divide images of {size} pixels")
        rows, columns = delta.shape[-2] // self._patch, delta.shape[-1] // self._patch
        count = rows * columns
        taken = int(count * (1 - self._patches_kept))
        order = self._draw(f"perturbation_mask/{k}", (count,)).argsort(dim=1).argsort(dim=1)
        kept = (order >= taken).to(delta.dtype).view(-1, 1, rows, columns)
        return delta * F.interpolate(kept, scale_factor=self._patch, mode="nearest")

    @contextmanager
    def passing(self, model: nn.Module, k: int) -> Iterator[None]:
        """Within the context, drop the gradient through each block's attention for a random fraction of samples."""
        if self._attention_kept == 1:
            yield
            return
        if not (blocks := attentions(model)):
            raise UserError("attention_drop: the model has no modules named attn; set it to 0")
        handles = [block.register_forward_hook(self._without_gradient(i, k)) for i, block in enumerate(blocks)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _without_gradient(self, block: int, k: int) -> Any:
        kept = self._draw(f"attention_drop/{k}/{block}", (1,)) < self._attention_kept

        def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            # window attention has several consecutive rows per sample
            rows = kept.repeat_interleave(len(output) // len(kept)).view(-1, *[1] * (output.ndim - 1))
            # not a gradient hook: with activation checkpointing this runs again in backward and must act the same
            return torch.where(rows, output, output.detach())

        return hook
