"""The attacks of an evaluation, by their names in the settings."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from fulllora_dist.attacks.fgsm import single_step
from fulllora_dist.attacks.pgd import LossName, attack_mode, default_step_size, is_correct, projected_gradient
from fulllora_dist.attacks.threat import Threat
from fulllora_dist.core.errors import SharedUserError, UserError
from fulllora_dist.core.rng import base_key
from fulllora_dist.evaluation.official import autoattack

STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")
"""The four parts of the standard AutoAttack, in order."""
_PARTS: dict[str, int] = {"apgd-ce": 200, "apgd-t": 1800, "fab-t": 1800, "square": 5000}  # forward and backward passes
_PARTS |= {"apgd-dlr": 200, "fab": 200}
_ITERATED = re.compile(r"(pgd|cw|dlr)([1-9]\d*)(?:x([1-9]\d*))?")
_LOSSES: dict[str, LossName] = {"pgd": "ce", "cw": "margin", "dlr": "dlr"}
_KNOWN = (
    "clean, fgsm, autoattack, parts of it (apgd-ce, apgd-t, fab-t, square, or several: apgd-ce+square), and pgdK, cwK "
    "and dlrK for K steps, with R restarts pgdKxR, e.g. clean,pgd20,cw20,pgd50x5,autoattack"
)


class Outcome(NamedTuple):
    """What an attack did to a batch.

    Attributes:
        correct: bool [B], whether the model classifies the image and its adversarial example correctly.
        not_finite: int64 [B], how many logits of the example are NaN or infinite.
    """

    correct: Tensor
    not_finite: Tensor


@dataclass(frozen=True)
class EvalAttack:
    """An attack by its name.

    Attributes:
        name: `clean`; `fgsm` (Goodfellow et al.: one step of eps from the image); `pgdK` (cross-entropy), `cwK` (the
            margin loss of Carlini and Wagner) or `dlrK` (the difference of logits ratio) under PGD, K steps, with `xR`
            behind it the best of R random starts; `autoattack`, the standard version (Croce and Hein, arXiv
            2003.01690); or parts of AutoAttack joined by +, with the standard version's parameters.
        kind: how it is made.
        steps, loss, restarts: of PGD.
        parts: of AutoAttack, in the order in which they run.
    """

    name: str
    kind: Literal["clean", "fgsm", "pgd", "autoattack"]
    steps: int = 0
    loss: LossName = "ce"
    restarts: int = 1
    parts: tuple[str, ...] = ()

    @classmethod
    def parse(cls, name: str) -> "EvalAttack":
        """Raises UserError: the name is unknown."""
        if name in ("clean", "fgsm"):
            return cls(name, name)  # type: ignore[arg-type]
        parts = STANDARD if name == "autoattack" else tuple(name.split("+"))
        if all(part in _PARTS for part in parts) and len(set(parts)) == len(parts):
            return cls(name, "autoattack", parts=parts)
        match = _ITERATED.fullmatch(name)
        if match is None:
            raise UserError(f"evaluation.attacks: unknown attack {name!r}; known: {_KNOWN}")
        kind, steps, restarts = match.groups()
        return cls(name, "pgd", int(steps), _LOSSES[kind], int(restarts or 1))

    @property
    def passes(self) -> int:
        """Forward and backward passes of an image, at most, the prediction included; the measure of its cost."""
        if self.kind == "autoattack":
            return 1 + sum(_PARTS[part] for part in self.parts)
        if self.kind == "clean":
            return 1
        if self.kind == "fgsm":
            return 4
        return 2 + self.restarts * 2 * self.steps + (self.restarts if self.restarts > 1 else 0)

    def check_classes(self, classes: int) -> None:
        """Raises SharedUserError: the attack's loss needs more logits than there are."""
        needed = 4 if "apgd-t" in self.parts else 3 if "apgd-dlr" in self.parts or self.loss == "dlr" else 2
        if classes < needed:
            raise SharedUserError(
                f"evaluation.attacks: {self.name} needs at least {needed} classes, got {classes}; pgd20, cw20 and "
                "apgd-ce+square need two"
            )

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
    parsed = [EvalAttack.parse(name) for name in names]
    if not names or len(set(names)) < len(names):
        raise UserError(f"evaluation.attacks: name each attack once, e.g. clean,pgd20, got {','.join(names) or 'none'}")
    return parsed


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
