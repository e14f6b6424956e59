"""PGD adversarial training (Madry et al., arXiv 1706.06083)."""

import torch
from torch import Tensor

from fulllora_dist.attacks.threat import Threat
from fulllora_dist.core.rng import SampleRng
from fulllora_dist.methods.base import register_method
from fulllora_dist.methods.multi_step import MultiStep
from fulllora_dist.methods.settings import PGDSettings


@register_method
class PGD(MultiStep):
    Settings = PGDSettings

    def start(self, threat: Threat, rng: SampleRng, x: Tensor) -> Tensor:
        return super().start(threat, rng, x) if self.settings.random_start else torch.zeros_like(x)
