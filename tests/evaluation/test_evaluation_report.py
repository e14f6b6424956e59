"""What people read of an evaluation: the figures show its numbers, and the table their intervals."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import image as matplotlib_image
from matplotlib.figure import Figure
from scipy.stats import binomtest

from fulllora_dist.evaluation.report import score
from fulllora_dist.evaluation.summary import table, write_figures
from fulllora_dist.plots.figures import per_class_bars, robustness_curve


def _results(classes: list[str], more_eps: tuple[float, ...] = ()) -> dict[str, Any]:
    """An evaluation of ten images a class: of class k, k mod 11 survive the attack and one more is correct without."""
    labels = np.repeat(np.arange(len(classes)), 10)

    def scored(more: int) -> dict[str, Any]:
        right = [int(i % 10 < label % 11 + more) for i, label in enumerate(labels)]
        return score(np.array(right), labels, classes)

    return {
        "n": len(labels),
        "norm": "linf",
        "eps": 4 / 255,
        "precision": "fp32",
        "attacks": {"clean": scored(1), "pgd10": scored(0)},
        "more_eps": [{"eps": eps, "attacks": {"pgd10": scored(-k)}} for k, eps in enumerate(more_eps, start=1)],
        "warnings": ["something is odd"],
    }


def _bars(figure: Figure) -> tuple[list[str], list[float]]:
    (axes,) = figure.axes
    return [tick.get_text() for tick in axes.get_yticklabels()], [bar.get_width() for bar in axes.patches]


def _per_class(results: dict[str, Any]) -> dict[str, Any]:
    return {name: found["per_class"] for name, found in results["attacks"].items()}


def test_bars_are_the_last_attack_least_robust_first() -> None:
    results = _results(["ant", "bee", "cat"])
    figure = per_class_bars(_per_class(results), "mine")
    assert _bars(figure) == (["ant", "bee", "cat"], [0, 10, 20])
    (axes,) = figure.axes
    assert axes.yaxis_inverted(), "the first on top"
    (clean,) = (c for c in axes.collections if c.get_label() == "clean")
    assert clean.get_offsets()[:, 0].tolist() == [10, 20, 30]
    assert axes.get_xlabel() == "accuracy, %   (mine)"


def test_the_interval_is_that_of_the_strongest_attack() -> None:
    """Wherever it stands among the attacks."""
    results = _results(["ant", "bee", "cat"])
    results["attacks"] = dict(reversed(results["attacks"].items()))
    assert "95 % interval of pgd10" in table(results)


def test_of_many_classes_both_ends_are_shown() -> None:
    results = _results([f"c{k}" for k in range(99)])
    names, widths = _bars(figure := per_class_bars(_per_class(results), "mine"))
    assert len(names) == len(widths) == 40
    assert widths[:20] == [0] * 9 + [10] * 9 + [20] * 2, "nine classes have each accuracy from 0 to 100 %"
    assert widths[20:] == [80] * 2 + [90] * 9 + [100] * 9
    assert "59 classes in between left out" in figure.axes[0].get_xlabel()


def test_classes_without_an_image_are_left_out() -> None:
    names, _ = _bars(per_class_bars({"pgd10": {"ant": (1, 2), "bee": (0, 0)}}, "mine"))
    assert names == ["ant"]


def test_a_curve_goes_through_its_points() -> None:
    scores = {0.0: {"accuracy": 0.9, "low": 0.8, "high": 0.95}, 4 / 255: {"accuracy": 0.5, "low": 0.4, "high": 0.6}}
    (axes,) = robustness_curve({"pgd10": scores}).axes
    (line,) = axes.lines
    assert line.get_xydata() == pytest.approx(np.array([[0, 90], [4, 50]]))
    (band,) = axes.collections
    corners = {(float(x), float(y)) for x, y in band.get_paths()[0].vertices.round(6)}
    assert corners == {(0, 80), (0, 95), (4, 40), (4, 60)}


def test_figures_lie_beside_the_file(tmp_path: Path) -> None:
    one, several = _results(["n03000684", "bee"]), _results(["n03000684", "bee"], (8 / 255, 2 / 255))
    assert [path.name for path in write_figures(one, tmp_path / "one.json")] == ["one_classes.png"]
    written = write_figures(several, tmp_path / "evaluation.json")
    assert [path.name for path in written] == ["evaluation_classes.png", "evaluation_eps.png"]
    for path in written:
        image = matplotlib_image.imread(path)[..., :3]
        assert min(image.shape[:2]) > 150
        assert np.ptp(image) > 0.5, "something is drawn"


def test_the_table_has_an_interval_for_each_class() -> None:
    lines = table(_results(["ant", "bee", "cat"])).splitlines()
    bounds = binomtest(2, 10).proportion_ci(method="wilson")
    (cat,) = (line.split() for line in lines if line.startswith("cat"))
    of_many = table(_results([f"class{i}" for i in range(99)])).splitlines()
    assert sum(line.startswith("class") for line in of_many) == 1 + 40
    assert "... and 59 classes between these, the least and the most robust ones" in of_many
    assert cat == ["cat", "10", "30.0", "20.0", f"{100 * bounds.low:.1f}", "to", f"{100 * bounds.high:.1f}"]
    assert lines[-1] == "warning: something is odd"
