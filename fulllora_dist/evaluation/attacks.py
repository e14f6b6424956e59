"""The attacks of an evaluation, by their names in the settings."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fulllora_dist.attacks.fgsm import single_step
from fulllora_dist.attacks.pgd import attack_mode, default_step_size, pgd
from fulllora_dist.attacks.threat import Threat
from fulllora_dist.core.rng import base_key
from fulllora_dist.evaluation.attack_names import AttackName


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
        round to the other side."""
        examples, correct = self._examples(model, x, y, threat, seed, ids)
        if correct is None:
            with torch.no_grad(), attack_mode(model):
                correct = is_correct(model(examples), y)
                if examples is not x:
                    correct &= is_correct(model(x), y)
        return correct

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
        examples = pgd(
            model,
            x,
            y,
            eps=threat.eps,
            norm=threat.norm,
            steps=self.steps,
            step_size=default_step_size(threat.eps, self.steps),
            restarts=self.restarts,
            loss=self.loss,
            seed=seed,
            ids=ids,
            purpose=f"eval/{self.name}",
        )
        return examples, None


def is_correct(logits: Tensor, y: Tensor) -> Tensor:
    """bool [B]: the largest logit is the label's, and all are finite: of NaN alone, argmax is the first class."""
    return (logits.argmax(dim=1) == y) & logits.isfinite().all(dim=1)


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
    with own_generator(x.device), attack_mode(model), _silent():
        with torch.no_grad():
            classes = model(x[:1]).shape[1]
        adversary = official_autoattack(model, threat, attack.parts, number, x.device, classes)
        examples, predicted = adversary.run_standard_evaluation(x, y, batch_size=len(x))
    return examples, predicted == y


def official_autoattack(
    model: nn.Module, threat: Threat, parts: Sequence[str], seed: int, device: torch.device, classes: int
) -> Any:
    """pyautoattack's `AutoAttack`, standard version, reduced to `parts`. Where there are fewer than ten classes its
    targeted attacks take all wrong ones, instead of nine."""
    from pyautoattack import AutoAttack

    norm = {"linf": "Linf", "l2": "L2"}[threat.norm]
    adversary = AutoAttack(model, norm=norm, eps=threat.eps, version="standard", device=device, seed=seed)
    adversary.attacks_to_run = list(parts)
    targets = min(9, classes - 1)
    adversary.apgd_targeted.n_target_classes = adversary.fab.n_target_classes = targets
    return adversary


@contextmanager
def own_generator(device: torch.device) -> Iterator[None]:
    """Seeds and draws of torch's generators inside are forgotten afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


@contextmanager
def _silent() -> Iterator[None]:
    """Without pyautoattack's remarks on each batch: `checks` looks at the whole evaluation."""
    logger = logging.getLogger("auto-attack")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
