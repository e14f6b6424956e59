"""PGD in a few lines of plain PyTorch, which shares with the package the draws of the random start alone."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fulllora_dist.core.rng import sample_rng


def plain_pgd(model: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int, step_size: float) -> Tensor:
    """Linf, cross-entropy, from the start of seed 0; y: labels or probabilities. The model in evaluation mode."""
    uniform = sample_rng(0, "pgd/start/0", 0, torch.arange(len(x))).uniform(x.shape[1:])
    x_adv = (x + ((2 * uniform - 1) * eps).to(x.dtype)).clamp(0, 1)
    for _ in range(steps):
        x_adv = x_adv.clone().requires_grad_()
        F.cross_entropy(model(x_adv), y, reduction="sum").backward()
        x_adv = x_adv.detach() + step_size * x_adv.grad.sign()
        x_adv = torch.min(torch.max(x_adv, x - eps), x + eps).clamp(0, 1)
    return x_adv
