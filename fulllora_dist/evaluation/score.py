"""An accuracy with its uncertainty."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fulllora_dist.core.stats import wilson


def score(correct: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    """{"accuracy", "low", "high", "correct", "per_class": {class name: [correct, n]}}; low and high bound Wilson's 95 %
    interval.

    Args:
        correct: 0 or 1 [n].
        labels: int64 [n].
    """
    right, n = int(correct.sum()), len(correct)
    low, high = wilson(right, n)
    return {
        "accuracy": right / n,
        "low": low,
        "high": high,
        "correct": correct.tolist(),
        "per_class": {
            name: [int(correct[labels == label].sum()), int((labels == label).sum())]
            for label, name in enumerate(classes)
        },
    }
