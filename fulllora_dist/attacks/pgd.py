"""Projected gradient descent (Madry et al., arXiv 1706.06083), and functions shared by all gradient attacks.

Attacks are independent of training: they take any `nn.Module` from pixels in [0, 1] to logits. They compute only the
gradient of the input, so that parameter gradients stay untouched and DeepSpeed does not communicate.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fulllora_dist.attacks import arguments
from fulllora_dist.attacks.settings import Norm
from fulllora_dist.attacks.threat import Threat, in_box, threat_model
from fulllora_dist.attacks.victim import Victim
from fulllora_dist.core.errors import UserError
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


@runtime_checkable
class HoldsWeights(Protocol):
    """A module that may keep what it computes from its weights alone, while they do not change."""

    def hold(self) -> bool:
        """Start to keep it; False if it is kept already."""

    def release(self) -> None: ...


@contextmanager
def without_autocast() -> Iterator[None]:
    """Disable autocast within the context: what a model computes in is said by the model, not by who calls it."""
    with ExitStack() as stack:
        for device_type in ("cpu", "cuda", "mps", "xpu"):
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within the context; then each module has its own mode back."""
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in training:
            module.training = mode


@contextmanager
def attack_mode(model: nn.Module) -> Iterator[None]:
    """Set evaluation mode and disable parameter gradients, autocast and inference mode; on exit all modes and flags are
    restored. The weights must not change within, see `HoldsWeights`."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with evaluating(model):
        for parameter in trainable:
            parameter.requires_grad_(False)
        held = [module for module in model.modules() if isinstance(module, HoldsWeights) and module.hold()]
        try:
            with torch.inference_mode(False), without_autocast():
                yield
        finally:
            for holder in held:
                holder.release()
            for parameter in trainable:
                parameter.requires_grad_(True)


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
        x_adv = threat.ascend(x, x_adv, gradient, step_size)
    return x_adv


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor | Sequence[int],
    *,
    eps: float | str,
    steps: int,
    step_size: float | str,
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

    The result is the same under `no_grad`, `inference_mode` and `autocast`, which are off inside: a model that is to
    compute in bf16 says so in its own forward.

    Args:
        model: pixels in [0, 1] -> logits [B, classes], or an object or dict with `logits`. Attacked in evaluation mode;
            modes and `requires_grad` are restored. DistributedDataParallel is taken off.
        x: [B, C, H, W] in [0, 1], fp32 or fp64, on the device of the model; rounding may take a pixel 1e-6 out.
        y: integers [B], or with loss "ce" probabilities [B, classes], of which the largest is the label.
        eps, step_size: in pixel units of [0, 1], e.g. 4 / 255 or "4/255"; lengths in the norm of the ball.
        norm: "linf", "l2" or "l1" (the latter two over all pixels and channels of an image).
        steps: forward and backward passes a restart; 0 returns the start.
        restarts: random starts; a sample keeps the first example that fools the model, else the last.
            All but the last cost one more forward pass each.
        loss: "ce", "margin" for the loss of Carlini and Wagner, or "dlr" for the difference of logits ratio.
        random_start: uniform in the ball, else `x` itself.
        seed, step, ids, purpose: key the start (`sample_rng`); ids defaults to 0..B-1.

    Returns:
        [B, C, H, W] of x's dtype, in [0, 1] and within eps of x, no part of a graph.

    Raises:
        UserError: an argument that is none of these, e.g. images of 0..255 or normalised ones, eps=4, labels that the
            model has no logits for, a model that returns something else; or a gradient that is not finite. Where it is
            zero at all images, there is a warning.

    Example:
        x_adv = fd.pgd(model, x, y, eps="4/255", steps=10, step_size="1/255")
        robust = (model(x_adv).argmax(dim=1) == y).float().mean()
    """
    if not isinstance(loss, str) or loss not in LOSSES:
        raise UserError(f"loss: {loss!r} is unknown; known: {', '.join(LOSSES)}")
    if not isinstance(random_start, bool):
        raise UserError(f"random_start must be True or False, got {random_start!r}")
    radius, size = (
        arguments.checked_size(name, value, norm) for name, value in (("eps", eps), ("step_size", step_size))
    )
    threat = threat_model(norm, radius)
    steps, restarts = arguments.checked_count("steps", steps, 0), arguments.checked_count("restarts", restarts, 1)
    if radius and steps and not size:
        raise UserError("step_size must be > 0, got 0, with which no step moves")
    arguments.check_images(x)
    arguments.check_precision(x)
    with torch.inference_mode(False):
        target = arguments.checked_target(y, x, instead=None if loss == "ce" else "write y.argmax(1), or loss='ce'")
        if not x.numel():
            return x.detach().clone()
        classes = arguments.check_batch(x, target)
        soft = target.ndim == 2
        least = 3 if loss == "dlr" else 2
        victim = Victim(model, least, exactly=classes if soft else None, needed=0 if soft else classes)
        x_adv = projected_gradient(
            victim,
            in_box(x.detach()),
            target,
            threat=threat,
            steps=steps,
            step_size=size,
            restarts=restarts,
            loss=loss,
            random_start=random_start,
            seed=seed,
            step=step,
            ids=arguments.checked_ids(ids, x),
            purpose=purpose,
        )
        victim.check_gradient(x_adv)
    return x_adv


def projected_gradient(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    threat: Threat,
    steps: int,
    step_size: float,
    restarts: int,
    loss: LossName,
    seed: int,
    ids: Tensor,
    purpose: str,
    random_start: bool = True,
    step: int = 0,
) -> Tensor:
    """`pgd` with a threat model instead of eps and norm, and arguments that are known to be right."""
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
            if restart + 1 < restarts:
                with torch.no_grad():
                    fooled |= ~is_correct(model(x_adv), label)
    assert kept is not None
    return kept
