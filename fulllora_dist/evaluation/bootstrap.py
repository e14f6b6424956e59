"""Means over images and training seeds, and differences between them, with what both of them leave open."""

from typing import TypedDict

import numpy as np
from scipy.stats import norm, t

from fulllora_dist.core.stats import paired_score, wilson


class Estimate(TypedDict):
    """A mean with its 95 % interval, as shares.

    Attributes:
        value, low, high: the mean over all seeds and images, and its bounds.
        per_seed: the mean over the images, seed by seed.
    """

    value: float
    low: float
    high: float
    per_seed: list[float]


def bootstrap_means(values: np.ndarray, samples: int, rng: np.random.Generator) -> np.ndarray:
    """Draws of the mean of values [S, n], of S seeds on the same n images: float64 [samples].

    Two levels vary independently of each other, as every seed sees the same images. Images are drawn with replacement,
    each with the values of all seeds; and seeds, each with all its images, S - 1 of the S, which makes the variance of
    few seeds unbiased (Rao and Wu, JASA 83 (1988) 231-241). A draw moves by the sum of both. What varies from image to
    image within a seed is counted on either level, so intervals are a little too wide rather than too narrow. One seed
    alone is the ordinary bootstrap over images.

    Images with the same values are drawn together, from a multinomial distribution, which is the same.
    """
    seeds, n = values.shape
    patterns, counts = np.unique(values, axis=1, return_counts=True)  # [S, P], [P]
    # 0 last, as intervals that are published were drawn: most images do not differ, and take what is left
    order = np.argsort(~patterns.any(axis=0), kind="stable")
    patterns, counts = patterns[:, order], counts[order]
    of_images = rng.multinomial(n, counts / n, size=samples) @ patterns.mean(axis=0) / n
    drawn = max(1, seeds - 1)
    shares = rng.multinomial(drawn, np.full(seeds, 1 / seeds), size=samples) / drawn
    each = values.mean(axis=1)
    means: np.ndarray = of_images + shares @ each - each.mean()
    return means


def mean_over_seeds(correct: np.ndarray, samples: int, rng: np.random.Generator) -> Estimate:
    """The accuracy of bool [S, n]. Never narrower than Wilson's interval of S n independent images, which keeps it open
    where all images agree."""
    bounds = _bounds(correct.astype(np.int8), samples, rng).clip(0, 1)
    return _estimate(correct.mean(axis=1), bounds, wilson(int(correct.sum()), correct.size))


def difference_over_seeds(a: np.ndarray, b: np.ndarray, samples: int, rng: np.random.Generator) -> Estimate:
    """B minus A of bool [S, n] each, paired by image and seed. Never narrower than the score interval (`paired_score`)
    of S n independent images: where few images differ the bootstrap is too narrow, and empty where none does."""
    differences = b.astype(np.int8) - a.astype(np.int8)
    bounds = _bounds(differences, samples, rng).clip(-1, 1)
    floor = paired_score(int((differences < 0).sum()), int((differences > 0).sum()), differences.size)
    return _estimate(differences.mean(axis=1), bounds, floor)


def mean_squares(values: np.ndarray) -> tuple[float, float, float]:
    """Of seeds, images, and what is left, in the two-way analysis of variance of values [S, n] with S > 1.

    The variance of the mean over all is estimated without bias by (seeds + images - left) / (S n).
    """
    count, n = values.shape
    mean, of_seeds, of_images = values.mean(), values.mean(axis=1), values.mean(axis=0)
    seeds = n * float(((of_seeds - mean) ** 2).sum()) / (count - 1)
    images = count * float(((of_images - mean) ** 2).sum()) / (n - 1)
    left = float(((values - of_seeds[:, None] - of_images + mean) ** 2).sum()) / ((count - 1) * (n - 1))
    return seeds, images, left


def _bounds(values: np.ndarray, samples: int, rng: np.random.Generator) -> np.ndarray:
    """The percentiles of the draws. Of a few seeds that differ, draws know the spread too well: the bounds are further
    from the mean by as much as those of Student's t are than the normal distribution's, with the degrees of freedom of
    Satterthwaite (Biometrics Bulletin 2 (1946) 110-114)."""
    bounds = np.percentile(bootstrap_means(values, samples, rng), [2.5, 97.5])
    count, n = values.shape
    if count == 1:
        return bounds
    seeds, images, _ = mean_squares(values)
    below = seeds**2 / (count - 1) + images**2 / (n - 1)
    freedom = (seeds + images) ** 2 / below if below else np.inf
    wider: np.ndarray = values.mean() + (bounds - values.mean()) * t.ppf(0.975, freedom) / norm.ppf(0.975)
    return wider


def _estimate(per_seed: np.ndarray, bounds: np.ndarray, floor: tuple[float, float]) -> Estimate:
    return {
        "value": float(per_seed.mean()),
        "low": float(min(bounds[0], floor[0])),
        "high": float(max(bounds[1], floor[1])),
        "per_seed": per_seed.tolist(),
    }
