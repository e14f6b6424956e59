"""Symptoms of a robust accuracy that is none, on a few images: gradients that an attack cannot use, attacks that
win in the wrong order, logits that change by themselves (Athalye et al., arXiv 1802.00420; Carlini et al., arXiv
1902.06705; Croce and Hein, arXiv 2003.01690).

A check measures some numbers (`CHECKS`), which are kept in evaluation.json; `warnings` puts those that are a symptom
into words. Each looks at images that the model has right without an attack.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from scipy.stats import binomtest
from torch import Tensor, nn

from fulllora_dist.attacks.pgd import attack_mode, cross_entropy, input_gradient
from fulllora_dist.attacks.threat import Threat
from fulllora_dist.core.rng import base_key
from fulllora_dist.evaluation.attacks import EvalAttack, autoattack_seed, is_right, official_autoattack, own_generator

Numbers = dict[str, float]

MANY_STEPS = "pgd20"
FEWEST_STEPS = 10  # of an attack that is to be stronger than one step
RESTARTS = 5
SQUARE_QUERIES = 300
ZERO_GRADIENT_SHARE = 0.05
CHANGE_OF_LOGITS = 1e-3  # of their spread: a GPU's own reordering of sums is far below
LATE_WINS = 0.05  # of the images, and never fewer than 3
HUGE_SHARE = 0.05
SURE = 0.01  # of a one-sided sign test


@dataclass(frozen=True)
class Examined:
    """What a check looks at.

    Attributes:
        model: fp32 pixels [B, 3, H, W] in [0, 1] -> logits.
        x, y, ids: images, labels int64 [B] and ids int64 [B].
        threat: the ball of the evaluation.
        seed: of all that is random.
    """

    model: nn.Module
    x: Tensor
    y: Tensor
    ids: Tensor
    threat: Threat
    seed: int

    def standing(self, attack: str, threat: Threat | None = None) -> Tensor:
        """bool [B]: what an attack leaves right."""
        made = EvalAttack.parse(attack)
        return made.right(self.model, self.x, self.y, threat=threat or self.threat, seed=self.seed, ids=self.ids)

    @cached_property
    def right(self) -> Tensor:
        """bool [B]: right without an attack."""
        return is_right(self.logits(self.x), self.y)

    @cached_property
    def many(self) -> Tensor:
        """bool [B]: what PGD with many steps leaves right."""
        return self.standing(MANY_STEPS)

    def logits(self, x: Tensor) -> Tensor:
        with torch.no_grad(), attack_mode(self.model):
            return self.model(x)


def _pixels(of: Examined) -> Numbers:
    return {"lowest": float(of.x.min()), "highest": float(of.x.max())}


def _determinism(of: Examined) -> Numbers:
    first, second = of.logits(of.x), of.logits(of.x)
    spread = float((first - first.mean(dim=1, keepdim=True)).abs().mean())
    return {"change": float((first - second).abs().max()) / max(spread, 1e-12)}


def _probabilities(of: Examined) -> Numbers:
    logits = of.logits(of.x)
    share = (logits.min(dim=1).values >= 0) & ((logits.sum(dim=1) - 1).abs() < 1e-3)
    return {"n": len(logits), "sum_to_one": int(share.sum())}


def _zero_gradients(of: Examined) -> Numbers:
    with attack_mode(of.model):
        gradient = input_gradient(of.model, of.x, of.y, cross_entropy)
    rows = gradient.flatten(1)
    zero = (rows == 0).all(dim=1) | ~rows.isfinite().all(dim=1)
    right = of.right
    return {"n": int(right.sum()), "zero": int((zero & right).sum())}


def _against_many_steps(of: Examined, other: Tensor) -> Numbers:
    """How many images only the other attack fools, and how many only PGD with many steps does."""
    return {"other_alone": int((of.many & ~other).sum()), "many_alone": int((~of.many & other).sum())}


def _single_step(of: Examined) -> Numbers:
    return _against_many_steps(of, of.standing("fgsm"))


def _square(of: Examined) -> Numbers:
    right = of.right
    if not right.any():
        return {"other_alone": 0, "many_alone": 0}
    seed = autoattack_seed("check/square", of.threat, of.seed, of.ids)
    classes = of.logits(of.x[:1]).shape[1]
    with own_generator(of.x.device), attack_mode(of.model):
        adversary = official_autoattack(of.model, of.threat, ("square",), seed, of.x.device, classes).square
        adversary.n_queries = SQUARE_QUERIES
        examples = adversary.perturb(of.x[right], of.y[right])
    standing = right.clone()
    standing[right] = is_right(of.logits(examples), of.y[right])
    return _against_many_steps(of, standing)


def _huge_eps(of: Examined) -> Numbers:
    # any image can become grey
    radius = 0.5 if of.threat.norm == "linf" else 0.5 * math.sqrt(of.x[0].numel())
    huge = of.threat.scaled(radius / of.threat.eps)
    return {"eps": radius, "n": int(of.right.sum()), "standing": int(of.standing(MANY_STEPS, huge).sum())}


def _restarts(of: Examined) -> Numbers:
    """Images that each restart is the first to fool."""
    standing, wins = of.right, {}
    n = int(standing.sum())
    for restart in range(RESTARTS):
        again = EvalAttack.parse("pgd10")
        seed = base_key(of.seed, f"check/restarts/{restart}", 0)
        left = standing & again.right(of.model, of.x, of.y, threat=of.threat, seed=seed, ids=of.ids)
        wins[f"restart_{restart + 1}"] = int(standing.sum()) - int(left.sum())
        standing = left
    return {"n": n, **wins}


CHECKS: dict[str, Callable[[Examined], Numbers]] = {
    "pixels": _pixels,
    "determinism": _determinism,
    "probabilities": _probabilities,
    "zero_gradients": _zero_gradients,
    "single_step": _single_step,
    "huge_eps": _huge_eps,
    "restarts": _restarts,
    "square": _square,
}


def joined(parts: Sequence[Mapping[str, Numbers]]) -> dict[str, Numbers]:
    """What was measured on several batches, as of one: extremes and counts."""

    def join(name: str, key: str) -> float:
        numbers = [part[name][key] for part in parts]
        how = {"lowest": min, "highest": max, "change": max, "eps": max}.get(key, sum)
        return how(numbers)

    return {name: {key: join(name, key) for key in parts[0][name]} for name in CHECKS} if parts else {}


def _surely_more(numbers: Numbers) -> bool:
    """Whether the other attack is the stronger one, by a one-sided sign test over the images."""
    alone, both = int(numbers["other_alone"]), int(numbers["other_alone"] + numbers["many_alone"])
    return both > 0 and binomtest(alone, both, 0.5, alternative="greater").pvalue < SURE


def _say_pixels(n: Numbers) -> str | None:
    if n["lowest"] >= 0 and n["highest"] <= 1:
        return None
    return (
        f"images reach from {n['lowest']:.3g} to {n['highest']:.3g}, outside of [0, 1]: normalise inside the model, "
        "or eps means something else than it says"
    )


def _say_determinism(n: Numbers) -> str | None:
    if n["change"] <= CHANGE_OF_LOGITS:
        return None
    return (
        f"the same images give different logits (by {n['change']:.1%} of their spread): against a random model these "
        "attacks see one draw; average gradients over draws (EOT), or switch the randomness off"
    )


def _say_probabilities(n: Numbers) -> str | None:
    if n["sum_to_one"] < n["n"]:
        return None
    return (
        "the model gives probabilities: cross-entropy takes a softmax of them again, and its gradient vanishes where "
        "the model is sure; give logits"
    )


def _say_zero_gradients(n: Numbers) -> str | None:
    if n["zero"] <= ZERO_GRADIENT_SHARE * n["n"]:
        return None
    return (
        f"the gradient is zero or no number at {n['zero']:.0f} of {n['n']:.0f} images: cross-entropy attacks do not "
        "move there, and what they leave right is not robust; look at cw20, dlr20 and square"
    )


def _say_order(weaker: str, stronger: str, n: Numbers) -> str | None:
    if not _surely_more(n):
        return None
    return (
        f"{weaker} fools {n['other_alone']:.0f} images that {stronger} does not, and {n['many_alone']:.0f} are the "
        f"other way round: gradients are masked, and what {stronger} leaves right is not robust; trust autoattack"
    )


def _say_single_step(n: Numbers) -> str | None:
    return _say_order("one step (fgsm)", MANY_STEPS, n)


def _say_square(n: Numbers) -> str | None:
    return _say_order(f"square, which sees no gradient, in {SQUARE_QUERIES} queries", MANY_STEPS, n)


def order_warnings(columns: Mapping[EvalAttack, np.ndarray], where: str) -> list[str]:
    """Of the reported figures themselves: attacks that are to be the weaker ones, and are surely stronger.

    Args:
        columns: bool [n], what each attack leaves right; the same images in the same order.
        where: what a line begins with.
    """
    lines = []
    for check, name in (("single_step", "fgsm"), ("square", "square")):
        by_weaker = columns.get(EvalAttack.parse(name))
        for attack, left in columns.items():
            iterated = attack.steps >= FEWEST_STEPS or any(part.startswith("apgd") for part in attack.parts)
            if by_weaker is None or not iterated:
                continue
            alone: Numbers = {"other_alone": (left & ~by_weaker).sum(), "many_alone": (~left & by_weaker).sum()}
            if line := _say_order(name, attack.name, alone):
                lines.append(f"{check}: {where}{line}")
    return lines


def _say_huge_eps(n: Numbers) -> str | None:
    if n["standing"] <= HUGE_SHARE * n["n"]:
        return None
    return (
        f"{n['standing']:.0f} of {n['n']:.0f} images stay right at eps = {n['eps']:.3g}, where any image may "
        "become grey: the attack does not work on this model"
    )


def _say_restarts(n: Numbers) -> str | None:
    late = n[f"restart_{RESTARTS - 1}"] + n[f"restart_{RESTARTS}"]
    if late < 3 or late <= LATE_WINS * n["n"]:
        return None
    wins = ", ".join(f"{n[f'restart_{k + 1}']:.0f}" for k in range(RESTARTS))
    return (
        f"restarts of pgd10 keep winning ({wins} images of {n['n']:.0f}): more would win more; "
        "the loss is rough or the steps are too few, so raise both (pgd100x10) or trust autoattack"
    )


_SAY: dict[str, Callable[[Numbers], str | None]] = {
    "pixels": _say_pixels,
    "determinism": _say_determinism,
    "probabilities": _say_probabilities,
    "zero_gradients": _say_zero_gradients,
    "single_step": _say_single_step,
    "huge_eps": _say_huge_eps,
    "restarts": _say_restarts,
    "square": _say_square,
}


def warnings(measured: Mapping[str, Numbers]) -> list[str]:
    """What is wrong, a line each; nothing for a healthy model.

    Args:
        measured: {check: its numbers}.
    """
    lines = ((name, _SAY[name](numbers)) for name, numbers in measured.items())
    return [f"{name}: {line}" for name, line in lines if line is not None]
