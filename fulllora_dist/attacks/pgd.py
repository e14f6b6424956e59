"""Projected gradient descent (Madry et al., arXiv 1706.06083), and functions shared by all gradient attacks.

Attacks are independent of training: they take any `nn.Module` from pixels in [0, 1] to logits. They compute only the
gradient of the input, so that parameter gradients stay untouched and DeepSpeed does not communicate.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fulllora_dist.attacks.settings import Norm
from fulllora_dist.attacks.threat import Threat, in_box, threat_model
from fulllora_dist.core.rng import sample_rng

Loss = Callable[[Tensor, Tensor], Tensor]
"""(logits [B, classes], target: labels [B] or probabilities [B, classes]) -> the sum over samples."""


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy, summed so that a sample's gradient does not depend on its batch."""
    return F.cross_entropy(logits, labels, reduction="sum")


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """max_{j != y} z_j - z_y, summed: the loss of Carlini and Wagner (arXiv 1608.04644), eq. 6 with kappa = inf."""
    own = logits.gather(1, labels[:, None]).squeeze(1)
    others = logits.scatter(1, labels[:, None], float("-inf"))
    return (others.amax(dim=1) - own).sum()


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """-(z_y - max_{j != y} z_j) / (z_(1) - z_(3)), summed, with z_(k) the k-th largest: the difference of logits ratio
    (Croce and Hein, arXiv 2003.01690, eq. 6), invariant to scale and shift of the logits. Needs at least 3 classes."""
    first, _, third = logits.topk(3, dim=1).values.unbind(dim=1)
    own = logits.gather(1, labels[:, None]).squeeze(1)
    others = logits.scatter(1, labels[:, None], float("-inf"))
    return ((others.amax(dim=1) - own) / (first - third + 1e-12)).sum()


def kl_divergence(logits: Tensor, clean: Tensor) -> Tensor:
    """KL(softmax(clean) || softmax(logits)), summed: the loss of TRADES' attack."""
    return F.kl_div(F.log_softmax(logits, dim=1), F.log_softmax(clean, dim=1), reduction="sum", log_target=True)


LossName = Literal["ce", "margin", "dlr"]
LOSSES: dict[LossName, Loss] = {"ce": cross_entropy, "margin": margin, "dlr": dlr}


@contextmanager
def attack_mode(model: nn.Module) -> Iterator[None]:
    """Set evaluation mode and disable parameter gradients; on exit all modes and flags are restored."""
    training = [(module, module.training) for module in model.modules()]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module, mode in training:
            module.training = mode


def is_correct(logits: Tensor, y: Tensor) -> Tensor:
    """bool [B]: the largest logit is the label's, and all are finite: of NaN alone, argmax is the first class."""
    return (logits.argmax(dim=1) == y) & logits.isfinite().all(dim=1)


def input_gradient(model: nn.Module, pixels: Tensor, target: Tensor, loss: Loss) -> Tensor:
    """The gradient of the loss with respect to the pixels, both [B, C, H, W]; inside `attack_mode`. One forward and one
    backward pass."""
    leaf = pixels.detach().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(loss(model(leaf), target), leaf)
    return gradient


def default_step_size(eps: float, steps: int) -> float:
    """2.5 eps / steps as in Madry et al., but at most eps; in the units of eps."""
    return min(2.5 * eps / steps, eps)


class StepHook(Protocol):
    """Hooks with which a training method modifies the steps of an attack."""

    def perturbation(self, delta: Tensor, k: int) -> Tensor:
        """The perturbation [B, C, H, W] at the start of attack step k."""

    def passing(self, model: nn.Module, k: int) -> AbstractContextManager[None]:
        """Context manager around the forward and backward pass of attack step k."""


def ascend(
    model: nn.Module,
    x: Tensor,
    x_adv: Tensor,
    target: Tensor,
    *,
    threat: Threat,
    steps: int,
    step_size: float,
    loss: Loss,
    hook: StepHook | None = None,
) -> Tensor:
    """Take `steps` projected steps that increase the loss, from `x_adv` in the ball around `x`, both [B, C, H, W];
    inside `attack_mode`."""
    for k in range(steps):
        if hook is None:
            gradient = input_gradient(model, x_adv, target, loss)
        else:
            x_adv = x + hook.perturbation(x_adv - x, k)
            with hook.passing(model, k):
                gradient = input_gradient(model, x_adv, target, loss)
        x_adv = in_box(x + threat.project(x_adv + step_size * threat.steepest(gradient) - x))
    return x_adv


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    steps: int,
    step_size: float,
    norm: Norm = "linf",
    restarts: int = 1,
    loss: LossName = "ce",
    random_start: bool = True,
    seed: int = 0,
    step: int = 0,
    ids: Tensor | None = None,
    purpose: str = "pgd",
) -> Tensor:
    """Compute adversarial examples in the ball around `x`.

    Args:
        model: pixels in [0, 1] -> logits. Attacked in evaluation mode; modes and `requires_grad` are restored.
        x: [B, 3, H, W] in [0, 1], fp32 or fp64.
        y: int64 [B], or with loss "ce" probabilities [B, classes], of which the largest is the label.
        eps, step_size: in pixel units of [0, 1], e.g. 4 / 255; lengths in the norm of the ball.
        norm: "linf" or "l2" (over all pixels and channels of an image).
        steps: forward and backward passes a restart.
        restarts: random starts; a sample keeps the first example that fools the model, else the last.
            More than one costs one more forward pass each.
        loss: "ce", "margin" for the loss of Carlini and Wagner, or "dlr" for the difference of logits ratio.
        random_start: uniform in the ball, else `x` itself.
        seed, step, ids, purpose: key the start (`sample_rng`); ids defaults to 0..B-1.

    Returns:
        [B, 3, H, W] of x's dtype, in [0, 1] and within eps of x, no part of a graph.
    """
    threat = threat_model(norm, eps)
    ids = torch.arange(len(x), device=x.device) if ids is None else ids
    x = x.detach()
    kept: Tensor | None = None
    label = y if y.ndim == 1 else y.argmax(dim=1)
    fooled = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    with attack_mode(model):
        for restart in range(restarts):
            x_adv = x
            if random_start:
                rng = sample_rng(seed, f"{purpose}/start/{restart}", step, ids)
                x_adv = in_box(x + threat.random_start(rng, x))
            x_adv = ascend(model, x, x_adv, y, threat=threat, steps=steps, step_size=step_size, loss=LOSSES[loss])
            kept = x_adv if kept is None else torch.where(fooled.view(-1, 1, 1, 1), kept, x_adv)
            if restarts > 1:
                with torch.no_grad():
                    fooled |= ~is_correct(model(x_adv), label)
    assert kept is not None
    return kept
