"""Symptoms of a robust accuracy that is none, on a few images: gradients that an attack cannot use, attacks that
win in the wrong order, logits that change by themselves (Athalye et al., arXiv 1802.00420; Carlini et al., arXiv
1902.06705; Croce and Hein, arXiv 2003.01690).

A check (`CHECKS`) measures some numbers on a batch, which are kept in evaluation.json, and warns where those of all
batches together are a symptom. Each looks at images that the model classifies correctly without an attack.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from scipy.stats import binomtest
from torch import Tensor, nn

from fulllora_dist.attacks.pgd import attack_mode, cross_entropy, input_gradient, is_correct
from fulllora_dist.attacks.threat import Threat
from fulllora_dist.core.rng import base_key
from fulllora_dist.evaluation.attacks import EvalAttack
from fulllora_dist.evaluation.official import square
from fulllora_dist.models.adapted_model import WITH_BRANCHES, AdaptedModel
from fulllora_dist.models.branches import branches_of, disable_branches

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
class CheckBatch:
    """What a check looks at.

    Attributes:
        model: fp32 pixels [B, 3, H, W] in [0, 1] -> logits [B, classes].
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

    def standing(self, attack: str, threat: Threat | None = None, seed: int | None = None) -> Tensor:
        """bool [B]: the images that an attack leaves correct."""
        threat, seed = threat or self.threat, self.seed if seed is None else seed
        return EvalAttack.parse(attack).correct(self.model, self.x, self.y, threat=threat, seed=seed, ids=self.ids)

    @cached_property
    def correct(self) -> Tensor:
        """bool [B]: correct without an attack."""
        return is_correct(self.logits(self.x), self.y)

    @cached_property
    def many(self) -> Tensor:
        """bool [B]: correct under PGD with many steps."""
        return self.standing(MANY_STEPS)

    def logits(self, x: Tensor) -> Tensor:
        with torch.no_grad(), attack_mode(self.model):
            return self.model(x)


@dataclass(frozen=True)
class Check:
    """One symptom.

    Attributes:
        name: under which its numbers and warnings are known.
        measure: its numbers of a batch; `joined` says how those of several batches become one. None where there is
            nothing to measure: then the check is not made.
        warn: the symptom in words, from the numbers of all batches; None where there is none.
    """

    name: str
    measure: Callable[[CheckBatch], Numbers | None]
    warn: Callable[[Numbers], str | None]


def _determinism(batch: CheckBatch) -> Numbers:
    first, second = batch.logits(batch.x), batch.logits(batch.x)
    finite = (first.isfinite() & second.isfinite()).all(dim=1)
    first, second = first[finite], second[finite]
    spread = float((first - first.mean(dim=1, keepdim=True)).abs().mean()) if len(first) else 1.0
    return {"change": float((first - second).abs().max() if len(first) else 0) / max(spread, 1e-12)}


def _warn_determinism(n: Numbers) -> str | None:
    if n["change"] <= CHANGE_OF_LOGITS:
        return None
    return (
        f"the same images give different logits (by {n['change']:.1%} of their spread): against a random model these "
        "attacks see one draw; average gradients over draws (EOT), or disable the randomness"
    )


def _probabilities(batch: CheckBatch) -> Numbers:
    logits = batch.logits(batch.x)
    share = (logits.min(dim=1).values >= 0) & ((logits.sum(dim=1) - 1).abs() < 1e-3)
    return {"n": len(logits), "sum_to_one": int(share.sum())}


def _warn_probabilities(n: Numbers) -> str | None:
    if n["sum_to_one"] < n["n"]:
        return None
    return (
        "the model returns probabilities: cross-entropy applies softmax to them again, and its gradient vanishes where "
        "the model is confident; return logits"
    )


def _zero_gradients(batch: CheckBatch) -> Numbers:
    with attack_mode(batch.model):
        gradient = input_gradient(batch.model, batch.x, batch.y, cross_entropy)
    rows = gradient.flatten(1)
    zero = (rows == 0).all(dim=1) | ~rows.isfinite().all(dim=1)
    return {"n": int(batch.correct.sum()), "zero": int((zero & batch.correct).sum())}


def _warn_zero_gradients(n: Numbers) -> str | None:
    if n["zero"] <= ZERO_GRADIENT_SHARE * n["n"]:
        return None
    return (
        f"the gradient is zero or not finite on {n['zero']:.0f} of {n['n']:.0f} images: cross-entropy attacks do not "
        "move there, and what they leave correct is not robust; look at cw20, dlr20 and square"
    )


def _against_many_steps(batch: CheckBatch, other: Tensor) -> Numbers:
    """How many images only the other attack fools, and how many only PGD with many steps does."""
    return {"other_alone": int((batch.many & ~other).sum()), "many_alone": int((~batch.many & other).sum())}


def warn_order(weaker: str, stronger: str, n: Numbers) -> str | None:
    """Where the attack meant to be weaker is surely the stronger one, by a one-sided sign test over the images."""
    alone, both = int(n["other_alone"]), int(n["other_alone"] + n["many_alone"])
    if both == 0 or binomtest(alone, both, 0.5, alternative="greater").pvalue >= SURE:
        return None
    return (
        f"{weaker} fools {n['other_alone']:.0f} images that {stronger} does not, and {n['many_alone']:.0f} are the "
        f"other way round: gradients are masked, and what {stronger} leaves correct is not robust; trust autoattack"
    )


def _single_step(batch: CheckBatch) -> Numbers:
    return _against_many_steps(batch, batch.standing("fgsm"))


def _square(batch: CheckBatch) -> Numbers:
    correct = batch.correct
    if not correct.any():
        return {"other_alone": 0, "many_alone": 0}
    ids = ",".join(map(str, batch.ids.tolist()))
    purpose = f"eval/check/square/{batch.threat.norm}/{batch.threat.eps!r}/{ids}"
    seed = base_key(batch.seed, purpose, 0) >> 1  # torch takes 63 bits
    x, y = batch.x[correct], batch.y[correct]
    with attack_mode(batch.model):
        examples = square(batch.model, x, y, threat=batch.threat, seed=seed, queries=SQUARE_QUERIES)
    standing = correct.clone()
    standing[correct] = is_correct(batch.logits(examples), y)
    return _against_many_steps(batch, standing)


def _huge_eps(batch: CheckBatch) -> Numbers:
    # any image can become grey
    values = batch.x[0].numel()
    radius = 0.5 * {"linf": 1, "l2": math.sqrt(values), "l1": values}[batch.threat.norm]
    huge = batch.threat.scaled(radius / batch.threat.eps)
    return {"eps": radius, "n": int(batch.correct.sum()), "standing": int(batch.standing(MANY_STEPS, huge).sum())}


def _warn_huge_eps(n: Numbers) -> str | None:
    if n["standing"] <= HUGE_SHARE * n["n"]:
        return None
    return (
        f"{n['standing']:.0f} of {n['n']:.0f} images stay correct at eps = {n['eps']:.3g}, where any image may "
        "become grey: the attack does not work on this model"
    )


def _restarts(batch: CheckBatch) -> Numbers:
    """Images that each restart is the first to fool."""
    standing, wins = batch.correct, {}
    n = int(standing.sum())
    for restart in range(RESTARTS):
        seed = base_key(batch.seed, f"check/restarts/{restart}", 0)
        still = standing & batch.standing("pgd10", seed=seed)
        wins[f"restart_{restart + 1}"] = int(standing.sum()) - int(still.sum())
        standing = still
    return {"n": n, **wins}


def _warn_restarts(n: Numbers) -> str | None:
    late = n[f"restart_{RESTARTS - 1}"] + n[f"restart_{RESTARTS}"]
    if late < 3 or late <= LATE_WINS * n["n"]:
        return None
    wins = ", ".join(f"{n[f'restart_{k + 1}']:.0f}" for k in range(RESTARTS))
    return (
        f"restarts of pgd10 keep winning ({wins} images of {n['n']:.0f}): more would win more; "
        "the loss is rough or the steps are too few, so raise both (pgd100x10) or trust autoattack"
    )


def _transfer(batch: CheckBatch) -> Numbers | None:
    """PGD's examples for the model without its branches, which needs none of their gradients. Where modules of others
    are around adapted models, for the whole, without the branches inside; none where there are none."""
    adapted = (module for module in batch.model.modules() if isinstance(module, AdaptedModel))
    branches = [b for m in adapted if m.spec.finetune in WITH_BRANCHES and not m.taken_off for b in branches_of(m)]
    if not branches:
        return None
    with disable_branches(branches):
        examples = EvalAttack.parse(MANY_STEPS)(
            batch.model, batch.x, batch.y, threat=batch.threat, seed=batch.seed, ids=batch.ids
        )
    return _against_many_steps(batch, batch.correct & is_correct(batch.logits(examples), batch.y))


CHECKS: tuple[Check, ...] = (
    Check("determinism", _determinism, _warn_determinism),
    Check("probabilities", _probabilities, _warn_probabilities),
    Check("zero_gradients", _zero_gradients, _warn_zero_gradients),
    Check("single_step", _single_step, partial(warn_order, "one step (fgsm)", MANY_STEPS)),
    Check("huge_eps", _huge_eps, _warn_huge_eps),
    Check("restarts", _restarts, _warn_restarts),
    Check(
        "square",
        _square,
        partial(warn_order, f"square, which sees no gradient, in {SQUARE_QUERIES} queries", MANY_STEPS),
    ),
    Check("transfer", _transfer, partial(warn_order, f"{MANY_STEPS} on the model without its branches", MANY_STEPS)),
)


def measure(batch: CheckBatch) -> dict[str, Numbers]:
    """{check: its numbers} of a batch, of the checks that are made."""
    measured = ((check.name, check.measure(batch)) for check in CHECKS)
    return {name: numbers for name, numbers in measured if numbers is not None}


def joined(batches: Sequence[Mapping[str, Numbers]]) -> dict[str, Numbers]:
    """What was measured on several batches, as of one: extremes and counts. Empty where nothing was measured."""

    def join(name: str, key: str) -> float:
        return {"change": max, "eps": max}.get(key, sum)([b[name][key] for b in batches])

    made = [name for name in batches[0] if all(name in batch for batch in batches)] if batches else []
    return {name: {key: join(name, key) for key in batches[0][name]} for name in made}


def warnings(measured: Mapping[str, Numbers]) -> list[str]:
    """A line for each symptom; none for a healthy model.

    Args:
        measured: {check: its numbers}, as `joined` returns them.
    """
    lines = ((check.name, check.warn(measured[check.name])) for check in CHECKS if check.name in measured)
    return [f"{name}: {line}" for name, line in lines if line is not None]
