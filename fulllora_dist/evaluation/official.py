"""pyautoattack's attacks, on models whose logits may be NaN or infinite too.

The official code takes NaN for class 0, and Square fails on it. A model whose logits are all finite is handed to it as
it is. At the first one that is not, the attack begins anew on the model with one more class, which gets all images
whose logits are not finite: for the attack they are misclassified, and to the others that class is out of reach.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fulllora_dist.attacks.threat import Threat

T = TypeVar("T")
_OUT_OF_REACH = 1000.0  # below the lowest logit: its share of a softmax is 0 in fp32


class NotFiniteError(Exception):
    """A logit is NaN or infinite."""


class _Watched(nn.Module):
    """The model itself. Raises NotFiniteError at the first logit that is not finite."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits = self.model(x)
        if not logits.isfinite().all():
            raise NotFiniteError
        return logits


class _OneMoreClass(nn.Module):
    """pixels [B, C, H, W] -> logits [B, classes + 1], always finite. The input's gradient is finite, too."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            x = x.view_as(x)  # a hook on the attack's own leaf would stay there
            x.register_hook(torch.nan_to_num)
        logits = self.model(x)
        finite = logits.isfinite().all(dim=1, keepdim=True)
        safe = torch.where(finite, logits, 0.0)
        rest = torch.where(finite, safe.detach().amin(dim=1, keepdim=True) - _OUT_OF_REACH, 1.0)
        return torch.cat([safe, rest], dim=1)


def _on_finite_logits(model: nn.Module, device: torch.device, attack: Callable[[nn.Module], T]) -> T:
    """What `attack` returns of the model; where logits are not finite, of the model with one more class for these.
    Seeds and draws of torch's generators inside are forgotten afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            return attack(_Watched(model))
        except NotFiniteError:
            return attack(_OneMoreClass(model))


def run_part(model: nn.Module, x: Tensor, y: Tensor, *, threat: Threat, seed: int, part: str) -> tuple[Tensor, Tensor]:
    """One of the standard version's parts on a batch of images that the model classifies correctly, inside
    `attack_mode`: (examples [B, C, H, W], bool [B]: whether each image survives).

    It does what `run_standard_evaluation` does with each batch of survivors, which seeds the part anew every time. So
    the parts in their order, each on the survivors of the one before in batches of one size, are that evaluation.
    """

    def run(finite: nn.Module) -> tuple[Tensor, Tensor]:
        adversary = _official(finite, x, threat, seed)
        with torch.no_grad():
            wrong = model(x[:1]).shape[1] - 1
            for targeted in (adversary.apgd_targeted, adversary.fab):  # of few classes all wrong ones
                targeted.n_target_classes = min(targeted.n_target_classes, wrong)
            adversary.apgd.loss = part.removeprefix("apgd-")
            adversary.fab.targeted = part == "fab-t"
            attack = {"apgd-t": adversary.apgd_targeted, "square": adversary.square}.get(
                part, adversary.fab if part.startswith("fab") else adversary.apgd
            )
            examples = attack.perturb(x.clone(), y.clone())
            return examples, finite(examples).argmax(dim=1) == y

    return _on_finite_logits(model, x.device, run)


def square(model: nn.Module, x: Tensor, y: Tensor, *, threat: Threat, seed: int, queries: int) -> Tensor:
    """Square's examples [B, C, H, W] after so many queries, inside `attack_mode`."""

    def run(finite: nn.Module) -> Tensor:
        adversary = _official(finite, x, threat, seed).square
        adversary.n_queries = queries
        return adversary.perturb(x, y)

    return _on_finite_logits(model, x.device, run)


def _official(model: nn.Module, x: Tensor, threat: Threat, seed: int) -> Any:
    """pyautoattack's `AutoAttack`, standard version. In L1 APGD begins with larger balls, apgd-ce has five restarts
    and apgd-t five targets (Croce and Hein, arXiv 2103.01208)."""
    from pyautoattack import AutoAttack

    norm = {"linf": "Linf", "l2": "L2", "l1": "L1"}[threat.norm]
    return AutoAttack(model, norm=norm, eps=threat.eps, version="standard", device=x.device, seed=seed)
