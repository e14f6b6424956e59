"""The figure of a study: clean against robust accuracy of each run, and the differences of its comparisons."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fulllora_dist.plots.figures import GREY

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX*"


@dataclass(frozen=True)
class Difference:
    """A comparison, as shares; `margin` is None where none was declared."""

    label: str
    value: float
    low: float
    high: float
    margin: float | None


def study_figure(
    runs: Mapping[str, Sequence[tuple[float, float]]], robust: str, differences: Sequence[Difference]
) -> Figure:
    """Both, side by side; the second only where there are differences.

    Args:
        runs: {arm: (clean, robust) of each seed}, as shares.
        robust: the name of the robust accuracy.
    """
    figure = Figure(figsize=(10.5 if differences else 5.5, 4.6), dpi=110, layout="constrained")
    panels = figure.subplots(1, 2 if differences else 1, squeeze=False)[0]
    _draw_runs(panels[0], runs, robust)
    if differences:
        _draw_differences(panels[1], differences)
    for axes in panels:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_runs(axes: Axes, runs: Mapping[str, Sequence[tuple[float, float]]], robust: str) -> None:
    for i, (arm, points) in enumerate(runs.items()):
        clean, under = zip(*points, strict=True)
        style: dict[str, Any] = {
            "color": COLOURS[i % len(COLOURS)],
            "marker": MARKERS[i % len(MARKERS)],
            "linestyle": "",
        }
        axes.plot([100 * c for c in clean], [100 * r for r in under], alpha=0.4, markersize=5, **style)
        mean = 100 * sum(clean) / len(points), 100 * sum(under) / len(points)
        axes.plot(*mean, markersize=10, markeredgecolor="white", label=arm, **style)
    axes.set_xlabel("clean accuracy, %\n(small: one seed each, large: their mean)")
    axes.set_ylabel(f"{robust} accuracy, %")
    if runs:
        axes.legend(frameon=False, fontsize=8)


def _draw_differences(axes: Axes, differences: Sequence[Difference]) -> None:
    for row, d in enumerate(differences):
        axes.plot([100 * d.low, 100 * d.high], [row, row], color="#0072B2", linewidth=2)
        axes.plot(100 * d.value, row, color="#0072B2", marker="o")
        if d.margin is not None:
            axes.plot([-100 * d.margin] * 2, [row - 0.35, row + 0.35], color="#D55E00", linewidth=2)
    axes.axvline(0, color=GREY, linewidth=1)
    axes.set_yticks(range(len(differences)), [d.label for d in differences], fontsize=8)
    axes.set_ylim(len(differences) - 0.4, -0.6)
    axes.set_xlabel("difference, points (line: 95 % interval; orange: -margin)")
