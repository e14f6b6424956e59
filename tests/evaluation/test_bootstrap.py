"""Intervals over images and seeds against a bootstrap written out, their coverage, and the power of a margin."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy.stats import norm, ttest_1samp

from fulllora_dist.evaluation.bootstrap import bootstrap_means, difference_over_seeds, mean_over_seeds, mean_squares
from fulllora_dist.evaluation.power import Assumptions, lower_bounds, margin_within_reach, measured, power, simulated

FOLDER = Path(__file__).parents[2] / "configs" / "studies"
WITH_MARGINS = [path for path in sorted(FOLDER.glob("*.yaml")) if "margin:" in path.read_text()]


def test_equals_a_bootstrap_over_images_and_seeds() -> None:
    """Written out: images with all their seeds, and S - 1 seeds with all their images, one draw at a time."""
    rng = np.random.default_rng(0)
    values = simulated(Assumptions(0.3, 0.03, 0.4), 150, 3, rng)
    mean = values.mean()
    drawn = []
    for _ in range(6000):
        images = values[:, rng.integers(150, size=150)].mean()
        seeds = values[rng.integers(3, size=2)].mean()
        drawn.append(images + seeds - mean)
    ours = bootstrap_means(values, 20_000, rng)
    assert np.percentile(ours, [2.5, 25, 75, 97.5]) == pytest.approx(
        np.percentile(drawn, [2.5, 25, 75, 97.5]), abs=5e-3
    )
    assert ours.std() == pytest.approx(np.std(drawn), rel=0.05)


@pytest.mark.parametrize(("seed_sd", "correlation"), [(0.0, 0.0), (0.01, 0.2), (0.005, 0.6), (0.02, 0.2)])
def test_covers_the_truth_of_new_images_and_new_seeds(seed_sd: float, correlation: float) -> None:
    rng, inside = np.random.default_rng(1), 0
    for _ in range(400):
        values = simulated(Assumptions(0.095, seed_sd, correlation, 0.01), 1000, 3, rng)
        found = difference_over_seeds(values < 0, values > 0, 400, rng)
        inside += found["low"] <= 0.01 <= found["high"]
    assert inside / 400 > 0.92, "95 %, less twice the error of 400 repetitions"


def test_seeds_that_differ_alone_leave_what_students_t_leaves() -> None:
    """Where images say the same, the interval is that of a mean of three numbers; of a few thousand draws from three
    seeds the quantiles are steps, so that it is a little off."""
    right = [300, 400, 500]
    values = np.array([[i < number for i in range(1000)] for number in right])
    nothing = np.zeros((3, 1000), bool)
    found = difference_over_seeds(nothing, values, 20_000, np.random.default_rng(0))
    expected = ttest_1samp(np.array(right) / 1000, 0).confidence_interval(0.95)
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high), abs=0.03)


def test_mean_squares_are_those_of_a_regression() -> None:
    """Of ordinary least squares on indicators of seeds and of images."""
    values = simulated(Assumptions(0.3, 0.05, 0.4), 40, 3, np.random.default_rng(0)).astype(float)
    seeds, images = (kind.reshape(-1) for kind in np.indices(values.shape))

    def left(*factors: np.ndarray) -> float:
        columns = np.concatenate([np.ones((120, 1)), *(np.eye(f.max() + 1)[f] for f in factors)], axis=1)
        fitted = columns @ np.linalg.lstsq(columns, values.reshape(-1), rcond=None)[0]
        return float(((values.reshape(-1) - fitted) ** 2).sum())

    none, by_seed, by_image, both = left(), left(seeds), left(images), left(seeds, images)
    expected = (none - by_seed) / 2, (none - by_image) / 39, both / (2 * 39)
    assert mean_squares(values) == pytest.approx(expected)


def test_a_difference_that_only_seeds_make_is_not_sure() -> None:
    """Every image says the same, but the seeds contradict each other: intervals of images alone would be sure."""
    values = np.zeros((3, 2000), bool)
    values[0, :400], values[1, 400:800] = True, True
    better = np.zeros((3, 2000), bool)
    better[0, :400], better[1, 400:800], better[2, 800:1200] = True, True, True
    found = difference_over_seeds(values, better, 4000, np.random.default_rng(0))
    assert found["per_seed"] == [0, 0, 0.2]
    assert found["low"] <= 0 < found["value"]
    images_alone = difference_over_seeds(values.reshape(1, -1), better.reshape(1, -1), 4000, np.random.default_rng(0))
    assert images_alone["low"] > 0.05


def test_stays_open_where_no_image_differs() -> None:
    same = np.ones((3, 100), bool)
    difference = difference_over_seeds(same, same, 1000, np.random.default_rng(0))
    tells = 1.96**2 / (300 + 1.96**2)
    assert (difference["low"], difference["high"]) == pytest.approx((-tells, tells), rel=1e-3)
    mean = mean_over_seeds(same, 1000, np.random.default_rng(0))
    assert (mean["value"], mean["high"]) == (1, 1)
    assert 0.98 < mean["low"] < 0.995


def test_what_power_assumes_is_measured_again() -> None:
    assumed = Assumptions(0.13, 0.01, 0.4)
    rng = np.random.default_rng(0)
    found = [measured(simulated(assumed, 2000, 4, rng)) for _ in range(200)]
    assert np.mean([m.disagreement for m in found]) == pytest.approx(0.13, abs=0.005)
    assert np.mean([m.seed_sd**2 for m in found]) ** 0.5 == pytest.approx(0.01, rel=0.1)
    assert np.mean([m.image_correlation for m in found]) == pytest.approx(0.4, abs=0.03)
    assert measured(np.zeros((3, 10), np.int8)) == Assumptions(0, 0, 0)


def test_one_seed_has_the_power_of_the_textbook() -> None:
    """Of a paired difference of proportions, by the normal approximation."""
    lows = lower_bounds(Assumptions(0.095, 0, 0), 1000, 1, studies=600, samples=600)
    for margin in (0.02, 0.025, 0.03):
        expected = norm.cdf(margin / np.sqrt(0.095 / 1000) - 1.96)
        assert power(lows, margin) == pytest.approx(expected, abs=0.06)
    assert power(lows, margin_within_reach(lows)) == pytest.approx(0.8, abs=0.01)
    assert power(lower_bounds(Assumptions(0.095, 0, 0, -0.025), 1000, 1, studies=400, samples=400), 0.025) < 0.05


@pytest.mark.parametrize("path", WITH_MARGINS, ids=lambda path: path.stem)
def test_the_declared_power_of_a_study_is_computed(path: Path) -> None:
    study = yaml.safe_load(path.read_text())
    declared = [c for c in study["comparisons"] if "margin" in c]
    assert declared
    for assumed, margin, attack in {(tuple(c["power"].items()), c["margin"], c["attack"]) for c in declared}:
        (n,) = [part["num_samples"] for part in study["evaluations"] if attack in part["attacks"]]
        values = dict(assumed)
        said = values.pop("power")
        lows = lower_bounds(Assumptions(**values), n, len(study["seeds"]), studies=400, samples=600, seed=1)
        assert power(lows, margin) == pytest.approx(said, abs=0.05)
