"""The gate: candidates and champions, and what is said of them."""

import re
from typing import Any

import numpy as np
import pytest

from fulllora_dist.core.errors import UserError
from fulllora_dist.registry.promotion import Rules, judge
from tests.registry.conftest import evaluation, right

N = 1000
THREAT = "linf eps = 8/255"
CHAMPION = evaluation(right(600, N), right(800, N))


def flipped(gains: int, losses: int, **metadata: Any) -> dict[str, Any]:
    """The champion's robust images, less `losses` of them, and `gains` others."""
    robust = right(600, N)
    robust[:losses] = 0
    robust[N - gains :] = 1
    return evaluation(robust, np.maximum(right(800, N), robust), **metadata)


def with_attack(name: str) -> dict[str, Any]:
    found = flipped(50, 0)
    found["attacks"][name] = found["attacks"].pop("pgd20")
    return found


def with_figure(key: str, value: float) -> dict[str, Any]:
    found = flipped(50, 0)
    found["attacks"]["pgd20"] = found["attacks"]["pgd20"] | {key: value}
    return found


def without(key: str) -> dict[str, Any]:
    found = flipped(50, 0)
    found["attacks"] = {name: score for name, score in found["attacks"].items() if name != key}
    return found


def with_cw20(lost: slice, gained: slice) -> dict[str, Any]:
    """The champion's figures, and those of cw20, which fools `lost` and leaves `gained` beside those of pgd20."""
    found = flipped(0, 0)
    robust = right(600, N)
    robust[lost], robust[gained] = 0, 1
    return {**found, "attacks": {**found["attacks"], "cw20": evaluation(robust)["attacks"]["pgd20"]}}


FEW, FAIR = (evaluation(right(int(0.6 * n), n)) for n in (20, 300))
NAN = float("nan")
PAIRS: dict[str, tuple[Any, Any, tuple[str, ...]]] = {
    # candidate, champion, reasons against the candidate; none: it passes
    "the same figures": (CHAMPION, CHAMPION, ()),
    "the same figures, of 20 images": (FEW, FEW, (r"-16.11 to \+16.11\): a loss of more than 1 point is not",)),
    "the same figures, of 300 images": (FAIR, FAIR, ("a loss of more than 1 point is not excluded",)),
    "an image twice": (flipped(50, 0, ids=[0, *range(N - 1)]), CHAMPION, ("1 of 1000 ids are repeated",)),
    "clearly better": (flipped(50, 0), CHAMPION, ()),
    "better, and paired": (flipped(60, 30), CHAMPION, ()),
    "a little worse, surely within the margin": (flipped(0, 2), CHAMPION, ()),
    "clearly worse": (flipped(0, 50), CHAMPION, ("less robust by more than 1 point",)),
    "better under each attack, but not in the worst case": (
        with_cw20(slice(540, 600), slice(600, 760)),
        with_cw20(slice(0), slice(0)),
        (r"worst_case: -6.00 points .* less robust by more than 1 point",),
    ),
    "no worse, but unsure": (flipped(40, 40), CHAMPION, (r"-1.80 to \+1.80\): a loss of more than 1 point is not",)),
    "better, but unsure": (flipped(75, 70), CHAMPION, ("a loss of more than 1 point is not excluded",)),
    "another attack": (with_attack("autoattack"), CHAMPION, ("attacks clean, autoattack, the champion's clean, pgd",)),
    "another eps": (
        flipped(50, 0, eps=4 / 255),
        CHAMPION,
        ("attacked at linf eps = 4/255, the model is for linf eps = 8/255", "linf eps = 4/255, the champion's"),
    ),
    "another norm": (
        flipped(50, 0, norm="l2"),
        CHAMPION,
        ("attacked at l2", "norm l2, the champion's linf"),
    ),
    "another precision": (
        flipped(50, 0, precision="bf16", warnings=["precision: computed in bf16"]),
        CHAMPION,
        ("a check warned: precision: computed in bf16", "precision bf16, the champion's fp32"),
    ),
    "other images": (flipped(50, 0, ids=list(range(1, N + 1))), CHAMPION, ("of 1000 ids 999 are the champion's",)),
    "other data": (flipped(50, 0, data="another"), CHAMPION, ("digest of the index",)),
    "fewer images": (evaluation(right(70, 100)), CHAMPION, ("n = 100, the champion's 1000",)),
    "clean accuracy below the floor": (
        evaluation(right(600, N), right(640, N)),
        CHAMPION,
        (r"clean accuracy is 64.00% \(61.0 to 66.9\), the floor is 70.00%",),
    ),
    "a check warned": (
        flipped(50, 0, warnings=["zero_gradients: at 40 % of the images"]),
        CHAMPION,
        ("a check warned: zero_gradients",),
    ),
    "no check was made": (flipped(50, 0, checks={}), CHAMPION, ("gradient masking was not checked",)),
    "NaN": (with_figure("accuracy", NAN), CHAMPION, ("pgd20 at eps 0.03137 has accuracy nan",)),
    "NaN in the interval": (with_figure("low", NAN), CHAMPION, (r"pgd20 .* \(nan to",)),
    "figures that are not the images'": (with_figure("accuracy", 0.64), CHAMPION, ("but 650 of 1000 images",)),
    "NaN of the champion": (flipped(50, 0), with_figure("accuracy", NAN), ("the champion's figures are damaged",)),
    "never evaluated": (None, CHAMPION, ("never evaluated",)),
    "the champion never evaluated": (flipped(50, 0), None, ("the champion was never evaluated",)),
    "not attacked": (
        without("pgd20"),
        CHAMPION,
        ("it was not attacked", "attacks clean, the champion's clean, pgd20"),
    ),
    "clean not measured": (without("clean"), CHAMPION, ("clean accuracy was not measured", "attacks pgd20, the")),
    "everything at once": (
        evaluation(right(600, N), right(640, N), warnings=["square: stronger"], precision="bf16"),
        CHAMPION,
        ("clean accuracy is 64.00%", "a check warned: square", "precision bf16, the champion's fp32"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("pair", PAIRS)
def test_verdicts(pair: str) -> None:
    candidate, champion, expected = PAIRS[pair]
    verdict = judge(candidate, champion, Rules(margin=0.01, clean_floor=0.7), first=False, threat=THREAT)
    assert len(verdict.reasons) == len(expected), verdict.reasons
    for reason, words in zip(verdict.reasons, expected, strict=True):
        assert re.search(words, reason), reason
        assert "\n" not in reason
    assert verdict.passed == (not expected)


FIRST: dict[str, tuple[Any, tuple[str, ...]]] = {
    "good": (CHAMPION, ()),
    "not very robust": (evaluation(right(10, N)), ()),
    "below the floor": (evaluation(right(100, N), right(300, N)), ("the floor is 70.00%",)),
    "warned": (flipped(0, 0, warnings=["pixels: outside"]), ("a check warned: pixels",)),
    "another threat": (flipped(0, 0, eps=2 / 255), ("attacked at linf eps = 2/255",)),
    "not evaluated": (None, ("never evaluated",)),
}


@pytest.mark.parametrize("case", FIRST)
def test_the_first_champion_stands_for_itself(case: str) -> None:
    candidate, expected = FIRST[case]
    verdict = judge(candidate, None, Rules(clean_floor=0.7), first=True, threat=THREAT)
    assert len(verdict.reasons) == len(expected), verdict.reasons
    assert all(words in reason for reason, words in zip(verdict.reasons, expected, strict=True))


def test_a_doubtful_champion_is_named() -> None:
    doubtful = evaluation(right(600, N), right(800, N), warnings=["restarts: win over 5 %"])
    verdict = judge(flipped(50, 0), doubtful, Rules(), first=False)
    assert verdict.passed
    assert "the champion's own check warned: restarts: win over 5 %" in verdict.findings


@pytest.mark.parametrize(("margin", "floor"), [(-0.1, 0.5), (1.0, 50)])
def test_rules_are_shares(margin: float, floor: float) -> None:
    with pytest.raises(UserError, match="must be between 0 and 1"):
        Rules(margin, floor)
