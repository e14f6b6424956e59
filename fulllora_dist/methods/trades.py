"""TRADES (Zhang et al., arXiv 1901.08573).

    CE(f(x), y) + beta KL(f(x) || f(x')),    x' = argmax KL(f(x) || f(x')) in the ball

The attack starts uniformly in the ball, where the paper's code starts at Gaussian noise of 1e-3 (`method.start`): so
near to the image the divergence is flat, and in bf16 its gradient is rounding noise (docs/how_it_works.md).

The weight step passes clean and perturbed images as one batch of twice the size, so that the engine is called once.
"""

import torch
from torch import Tensor, nn

from fulllora_dist.attacks.pgd import Loss, kl_divergence
from fulllora_dist.attacks.threat import Threat
from fulllora_dist.core.rng import SampleRng
from fulllora_dist.methods.base import WeightStep, register_method
from fulllora_dist.methods.multi_step import MultiStep
from fulllora_dist.methods.settings import TRADESSettings


def gaussian_start(deviation: float, threat: Threat, rng: SampleRng, x: Tensor) -> Tensor:
    """Gaussian noise with standard deviation `deviation`, projected to the ball."""
    return threat.project((deviation * rng.normal(x.shape[1:])).to(x.dtype))


@register_method
class TRADES(MultiStep):
    Settings = TRADESSettings
    images_in_weight_step = 2

    def passes(self) -> tuple[int, int]:
        forward, backward = super().passes()
        return forward + 1, backward  # clean logits for the attack

    def start(self, threat: Threat, rng: SampleRng, x: Tensor) -> Tensor:
        deviation = self.settings.start
        return super().start(threat, rng, x) if deviation is None else gaussian_start(deviation, threat, rng, x)

    def objective(self, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Loss]:
        with torch.no_grad():
            return model(x), kl_divergence

    def loss(self, engine: WeightStep, x: Tensor, x_adv: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        clean, perturbed = engine(torch.cat([x, x_adv])).chunk(2)  # logits, [B, K] each
        divergence = kl_divergence(perturbed, clean) / len(x)
        return self.cross_entropy(clean, y) + self.settings.beta * divergence, perturbed
