"""Single-step attacks: one forward and one backward pass."""

from torch import Tensor, nn

from fulllora_dist.attacks.pgd import attack_mode, cross_entropy, input_gradient
from fulllora_dist.attacks.settings import Norm
from fulllora_dist.attacks.threat import in_box, threat_model
from fulllora_dist.core.rng import sample_rng


def single_step(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    noise: float,
    step_size: float,
    project: bool,
    norm: Norm,
    ids: Tensor,
    seed: int = 0,
    step: int = 0,
    purpose: str = "single_step",
) -> Tensor:
    """Take a step of `step_size` along the steepest direction of the norm, from uniform noise around `x`.

    Training calls it in each step, so that it trusts its arguments: `pgd` with steps=1 checks them.

    FGSM-RS (Wong et al., arXiv 2001.03994): noise = eps, step_size = 1.25 eps, projected to the ball.
    N-FGSM (de Jorge et al., arXiv 2202.01181): noise = 2 eps, step_size = eps, not projected: |delta| may reach 3 eps.
    FGSM (Goodfellow et al., arXiv 1412.6572): noise = 0, step_size = eps.

    Args:
        model, x, y, norm, seed, step, ids, purpose: as for `pgd`; y may be probabilities [B, classes].
        eps, noise, step_size: in pixel units of [0, 1].
        project: whether to project the result to within eps of x.

    Returns:
        [B, 3, H, W] of x's dtype, in [0, 1], no part of a graph.
    """
    threat = threat_model(norm, eps)
    x = x.detach()
    start = in_box(x + threat.random_start(sample_rng(seed, f"{purpose}/start/0", step, ids), x, noise))
    with attack_mode(model):
        gradient = input_gradient(model, start, y, cross_entropy)
    moved = threat.step(start, gradient, step_size)
    return threat.within(x, moved) if project else in_box(moved)
