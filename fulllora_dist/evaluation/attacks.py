"""The attacks of an evaluation, by their names in the settings."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fulllora_dist.attacks.fgsm import single_step
from fulllora_dist.attacks.pgd import attack_mode, default_step_size, is_correct, projected_gradient
from fulllora_dist.attacks.threat import Threat
from fulllora_dist.core.rng import base_key
from fulllora_dist.evaluation.attack_names import AttackName
from fulllora_dist.evaluation.official import autoattack


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
        most eps; its random start is keyed by (seed, attack, id), AutoAttack's generator by (seed, attack, eps, all
        ids). torch's own generator is as it was."""
        return self._examples(model, x, y, threat, seed, ids)[0]

    def correct(self, model: nn.Module, x: Tensor, y: Tensor, *, threat: Threat, seed: int, ids: Tensor) -> Tensor:
        """bool [B]: whether the model classifies the image and its adversarial example correctly: the image is in the
        ball, too. For AutoAttack that is its own verdict: it may end at the very boundary, where another batch would
        round to the other side. Logits that are not finite are a wrong prediction."""
        return self.outcome(model, x, y, threat=threat, seed=seed, ids=ids).correct

    def outcome(self, model: nn.Module, x: Tensor, y: Tensor, *, threat: Threat, seed: int, ids: Tensor) -> Outcome:
        """`correct`, and the logits that are not finite."""
        examples, correct = self._examples(model, x, y, threat, seed, ids)
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
            return _autoattack(self, model, x, y, threat, seed, ids)
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
            purpose=f"eval/{self.name}",
        )
        return examples, None


def parse_attacks(names: Sequence[str]) -> list[EvalAttack]:
    """The attacks by their names. Raises UserError for unknown, repeated or no attacks."""
    return EvalAttack.parse_all(names)


def autoattack_seed(name: str, threat: Threat, seed: int, ids: Tensor) -> int:
    """The seed of torch's generator for this attack on the batch of these ids, int64 [B]."""
    batch = ",".join(map(str, ids.tolist()))
    return base_key(seed, f"eval/{name}/{threat.norm}/{threat.eps!r}/{batch}", 0) >> 1  # torch takes 63 bits


def _autoattack(
    attack: EvalAttack, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, seed: int, ids: Tensor
) -> tuple[Tensor, Tensor]:
    """The official code on one batch: (examples, whether each image survives)."""
    number = autoattack_seed(attack.name, threat, seed, ids)
    with attack_mode(model):
        return autoattack(model, x, y, threat=threat, seed=number, parts=attack.parts)
