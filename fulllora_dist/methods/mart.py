"""MART (Wang et al., ICLR 2020, "Improving adversarial robustness requires revisiting misclassified examples").

    BCE(f(x'), y) + lambda KL(f(x) || f(x')) (1 - p_y(x)),    BCE = -log p_y(x') - log(1 - max_{k != y} p_k(x'))

The margin is the authors' log(1.0001 - p), which saturates: an image that a backbone without robustness gets wrong with
certainty pulls less. Images that are misclassified without a perturbation have more weight. Clean and perturbed images
share a forward pass.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fulllora_dist.attacks.threat import Threat
from fulllora_dist.core.rng import SampleRng
from fulllora_dist.methods.base import WeightStep, register_method
from fulllora_dist.methods.multi_step import MultiStep
from fulllora_dist.methods.settings import MARTSettings
from fulllora_dist.methods.trades import gaussian_start


@register_method
class MART(MultiStep):
    Settings = MARTSettings
    images_in_weight_step = 2

    def start(self, threat: Threat, rng: SampleRng, x: Tensor) -> Tensor:
        return gaussian_start(self.settings.start, threat, rng, x)

    def loss(self, engine: WeightStep, x: Tensor, x_adv: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        clean, perturbed = engine(torch.cat([x, x_adv])).chunk(2)  # logits, [B, K] each
        log_clean, log_perturbed = F.log_softmax(clean, dim=1), F.log_softmax(perturbed, dim=1)
        runner_up = perturbed.scatter(1, y[:, None], float("-inf")).argmax(dim=1, keepdim=True)  # [B, 1]
        margin = (1.0001 - log_perturbed.gather(1, runner_up).exp()).log()
        boosted = self.cross_entropy(perturbed, y) - margin.mean()
        divergence = F.kl_div(log_perturbed, log_clean, reduction="none", log_target=True).sum(dim=1)
        doubt = 1 - log_clean.gather(1, y[:, None]).squeeze(1).exp()
        return boosted + self.settings.weight * (divergence * doubt).mean(), perturbed
