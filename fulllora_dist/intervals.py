"""Confidence intervals."""

from scipy.stats import binomtest


def wilson(right: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of `right` of `n` > 0, as shares."""
    bounds = binomtest(right, n).proportion_ci(confidence_level=0.95, method="wilson")
    return float(bounds.low), float(bounds.high)
