"""Free adversarial training (Shafahi et al., arXiv 1904.12843).

Each batch is replayed m times. One backward pass gives the gradients of both the adapter and the input, and the latter
updates the perturbation before the next replay; label smoothing thus enters both. The perturbation persists over
replays *and* over batches: it belongs to the slot in the global batch, not to the image. Epochs count optimizer
updates, so a run draws 1 / m as many batches.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fulllora_dist.attacks.threat import Linf, in_box
from fulllora_dist.core.errors import UserError
from fulllora_dist.data.batch import Batch
from fulllora_dist.methods.base import Method, MetricAverager, WeightStep, check_step, register_method
from fulllora_dist.methods.settings import FreeSettings


@register_method
class Free(Method):
    Settings = FreeSettings
    moves_pixels = True
    _delta: Tensor | None = None

    @property
    def updates_per_batch(self) -> int:
        return self.settings.replays

    def passes(self) -> tuple[int, int]:
        return self.updates_per_batch, self.updates_per_batch

    def step(self, engine: WeightStep, batch: Batch, step: int) -> dict[str, Tensor]:
        check_step(engine, batch)
        delta = self._delta_for(batch)
        threat = self.threat_at(step)
        full_size = self.threat.eps if self.settings.step_size is None else self.settings.step_size
        step_size = self.step_size(full_size, step)
        for _ in range(self.updates_per_batch):
            means = MetricAverager()
            for micro in engine.accumulate(batch):
                part = delta[micro.slot - batch.slot :][: len(micro)]  # [B, C, H, W] of the micro-batch's slots
                x, y = self.mix(micro, step, engine.classes)
                # the clamped image is the leaf: a clamp after it would zero the gradient of saturated pixels
                x = in_box(x + part).requires_grad_()
                logits = engine(x)
                loss = self.cross_entropy(logits, y)
                engine.backward(loss)
                assert x.grad is not None
                part.copy_(threat.project(part + step_size * threat.steepest(x.grad)))
                means.add(loss, logits, y)
        return means.result()

    def _delta_for(self, batch: Batch) -> Tensor:
        """The perturbation [B, C, H, W] of the batch's slots; a shorter batch has the first of them."""
        pixels = batch.pixels()
        if self._delta is None:
            self._delta = torch.zeros_like(pixels)
        if self._delta.shape[1:] != pixels.shape[1:] or len(self._delta) < len(pixels):
            raise UserError(
                f"method free: batches must keep the shape of the first one, {list(self._delta.shape)}, or be shorter, "
                f"got {list(pixels.shape)}"
            )
        self._delta = self._delta.to(pixels.device)
        return self._delta[: len(pixels)]

    def slot_state(self) -> dict[str, Tensor]:
        if self._delta is None:
            return {}
        if (
            self.settings.step_size is None
            and self.warmup.eps == self.warmup.step_size == 0
            and isinstance(self.threat, Linf)
        ):
            # every value is -eps, 0 or eps, so that one byte per value is exact
            signs = self._delta.sign()
            assert torch.equal(signs * self.threat.eps, self._delta)
            return {"delta_sign": signs.to(torch.int8)}
        return {"delta": self._delta}

    def load_slot_state(self, state: Mapping[str, Tensor]) -> None:
        if "delta_sign" in state:
            self._delta = state["delta_sign"].float() * self.threat.eps
        elif "delta" in state:
            self._delta = state["delta"].clone()
