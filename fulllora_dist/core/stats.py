"""Confidence intervals."""

import math

from scipy.optimize import brentq
from scipy.stats import binomtest, norm


def wilson(right: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % confidence interval for `right` of `n` > 0, as fractions."""
    bounds = binomtest(right, n).proportion_ci(confidence_level=0.95, method="wilson")
    return float(bounds.low), float(bounds.high)


def paired_score(only_a: int, only_b: int, n: int) -> tuple[float, float]:
    """95 % score interval for the difference B - A of two accuracies on the same n > 0 images, as fractions.

    Tango, "Equivalence test and confidence interval for the difference in proportions for the paired-sample design",
    Statistics in Medicine 17 (1998) 891-908: the differences that the score test does not reject. If A and B are
    correct on the same images, it extends z^2 / (n + z^2) to either side.

    Args:
        only_a, only_b: number of images that only A, only B classifies correctly.
    """
    z = float(norm.ppf(0.975))

    def score(delta: float) -> tuple[float, float]:
        """The score of the difference delta, and its standard deviation."""
        b = -only_a - only_b + (2 * n - only_b + only_a) * delta
        c = -only_a * delta * (1 - delta)
        alone = (math.sqrt(max(b * b - 8 * n * c, 0)) - b) / (4 * n)  # most likely fraction that only A gets right
        return only_b - only_a - n * delta, math.sqrt(max(n * (2 * alone + delta * (1 - delta)), 0))

    def bound(sign: int) -> float:
        def beyond(delta: float) -> float:
            value, deviation = score(delta)
            return value - sign * z * deviation

        observed, end = (only_b - only_a) / n, -float(sign)
        # at the observed difference itself the deviation may be 0, which is no bound
        return end if observed == end else float(brentq(beyond, observed - sign * 1e-9, end))

    return bound(1), bound(-1)
