"""The power of a comparison before it is made: simulated studies, judged by the real one's interval."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from fulllora_dist.evaluation.bootstrap import difference_over_seeds, mean_squares

ENOUGH = 0.8
"""Power at which a margin is within reach."""


@dataclass(frozen=True)
class Assumptions:
    """What two arms are like.

    Attributes:
        disagreement: share of the images on which one run of either arm differs.
        seed_sd: standard deviation of the true difference from seed to seed.
        image_correlation: correlation of an image's difference between two seeds.
        difference: the true difference, B minus A.
    """

    disagreement: float
    seed_sd: float
    image_correlation: float
    difference: float = 0.0


def measured(differences: np.ndarray) -> Assumptions:
    """What the differences of a study, [seeds, n] with more than one seed, say of its arms; equal ones are assumed."""
    seeds, images, left = mean_squares(differences)
    of_images = max(0.0, images - left) / len(differences)
    return Assumptions(
        disagreement=float(np.abs(differences).mean()),
        seed_sd=float(np.sqrt(max(0.0, seeds - left) / differences.shape[1])),
        image_correlation=of_images / (of_images + left) if of_images else 0.0,
    )


def simulated(assumptions: Assumptions, n: int, seeds: int, rng: np.random.Generator) -> np.ndarray:
    """B minus A of a study, int8 [seeds, n] of -1, 0 and 1."""
    true = assumptions.difference + assumptions.seed_sd * rng.standard_normal((seeds, 1))
    wins, losses = ((assumptions.disagreement + sign * true) / 2 for sign in (1, -1))
    # two seeds that both take the image's own draw agree; that happens with the probability of the correlation
    shared = rng.random((seeds, n)) < assumptions.image_correlation**0.5
    u = np.where(shared, rng.random(n), rng.random((seeds, n)))
    return (u < wins).astype(np.int8) - (u > 1 - losses).astype(np.int8)


def lower_bounds(
    assumptions: Assumptions, n: int, seeds: int, *, studies: int = 1000, samples: int = 1000, seed: int = 0
) -> np.ndarray:
    """Lower ends of the 95 % intervals of so many simulated studies, float64 [studies]."""
    rng = np.random.default_rng(seed)
    lows = []
    for _ in range(studies):
        differences = simulated(assumptions, n, seeds, rng)
        lows.append(difference_over_seeds(differences < 0, differences > 0, samples, rng)["low"])
    return np.array(lows)


def power(lows: np.ndarray, margin: float) -> float:
    """Share of the studies that show a loss of less than the margin."""
    return float((lows > -margin).mean())


def margin_within_reach(lows: np.ndarray) -> float:
    """The smallest margin with a power of 80 %."""
    return float(-np.quantile(lows, 1 - ENOUGH))


@cache
def power_rows(
    assumptions: Assumptions, margin: float, sizes: tuple[int, ...], seeds: tuple[int, ...], *, studies: int = 500
) -> list[Mapping[str, float]]:
    """n, seeds, the power of the margin, how often an arm that loses just the margin passes for non-inferior, and the
    margin within reach, for each size and number of seeds."""
    rows: list[Mapping[str, float]] = []
    for n in sizes:
        for count in seeds:
            lows = lower_bounds(assumptions, n, count, studies=studies)
            of_a_loss = lower_bounds(replace(assumptions, difference=-margin), n, count, studies=studies)
            found = {"power": power(lows, margin), "wrongly": power(of_a_loss, margin)}
            rows.append({"n": n, "seeds": count, **found, "reach": margin_within_reach(lows)})
    return rows
