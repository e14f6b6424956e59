"""The attacks of an evaluation, by their names in the settings."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fulllora_dist.attacks.fgsm import single_step
from fulllora_dist.attacks.pgd import attack_mode, default_step_size, is_correct, projected_gradient
from fulllora_dist.attacks.threat import Threat
from fulllora_dist.evaluation.attack_names import AttackName
from fulllora_dist.evaluation.official import run_part


class Outcome(NamedTuple):
    """What an attack did to a batch.

    Attributes:
        correct: bool [B], whether the model classifies the image and its adversarial example correctly.
        not_finite: int64 [B], how many logits of the example are NaN or infinite.
    """

    correct: Tensor
    not_finite: Tensor


class EvalAttack(AttackName):
    """An attack by its name."""

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, threat: Threat, seed: int, ids: Tensor) -> Tensor:
        """Adversarial examples for `x` (`pgd` says the shapes). PGD takes steps of 2.5 eps / K as Madry et al. do, at
        most eps; its random start is keyed by (seed, attack, id). AutoAttack is the official evaluation of this one
        batch with this seed. torch's own generator is as it was."""
        return self._examples(model, x, y, threat, seed, ids)[0]

    def correct(self, model: nn.Module, x: Tensor, y: Tensor, *, threat: Threat, seed: int, ids: Tensor) -> Tensor:
        """bool [B]: whether the model classifies the image and its adversarial example correctly: the image is in the
        ball, too. For AutoAttack that is its own verdict: it may end at the very boundary, where another batch would
        round to the other side. Logits that are not finite are a wrong prediction."""
        return self.outcome(model, x, y, threat=threat, seed=seed, ids=ids).correct

    def outcome(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        threat: Threat,
        seed: int,
        ids: Tensor,
        source: nn.Module | None = None,
    ) -> Outcome:
        """`correct`, and the logits that are not finite. `source` is a model that is attacked instead; its outputs are
        in the order of the model's."""
        examples, correct = self._examples(source or model, x, y, threat, seed, ids)
        with torch.no_grad(), attack_mode(model):
            if correct is not None and correct.all():
                return Outcome(correct, torch.zeros_like(y))
            logits = model(examples)
            if correct is None:
                correct = is_correct(logits, y)
                if examples is not x:
                    correct &= is_correct(model(x), y)
        return Outcome(correct, (~logits.isfinite()).sum(dim=1))

    def _examples(
        self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, seed: int, ids: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The examples, and AutoAttack's own verdict."""
        if self.kind == "clean" or threat.eps == 0:
            return x, None
        if self.kind == "fgsm":
            eps, norm = threat.eps, threat.norm
            return single_step(model, x, y, eps=eps, noise=0, step_size=eps, project=True, norm=norm, ids=ids), None
        if self.kind == "autoattack":
            return _autoattack(self, model, x, y, threat, seed)
        examples = projected_gradient(
            model,
            x,
            y,
            threat=threat,
            steps=self.steps,
            step_size=default_step_size(threat.eps, self.steps),
            restarts=self.restarts,
            loss=self.loss,
            seed=seed,
            ids=ids,
            purpose=f"eval/{'transfer' if self.source else self.name}",
        )
        return examples, None


def survivors_outcome(model: nn.Module, x: Tensor, y: Tensor, *, part: str, threat: Threat, seed: int) -> Outcome:
    """What a part of AutoAttack does to a batch of images [B, C, H, W] that have survived so far. torch's generator is
    seeded by `seed` alone, as the official code does it for each batch; afterwards it is as it was."""
    with attack_mode(model):
        examples, correct = run_part(model, x, y, threat=threat, seed=seed, part=part)
        with torch.no_grad():
            not_finite = torch.zeros_like(y) if correct.all() else (~model(examples).isfinite()).sum(dim=1)
    return Outcome(correct, not_finite)


def _autoattack(
    attack: EvalAttack, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, seed: int
) -> tuple[Tensor, Tensor]:
    """The official evaluation of one batch: (examples, whether each image survives)."""
    examples = x.clone()
    with attack_mode(model):
        with torch.no_grad():
            correct = is_correct(model(x), y)
        for part in attack.parts:
            if not (left := correct.nonzero()[:, 0]).numel():
                break
            made, stands = run_part(model, x[left], y[left], threat=threat, seed=seed, part=part)
            examples[left[~stands]] = made[~stands].detach()
            correct[left] = stands
    return examples, correct
