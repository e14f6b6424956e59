"""Curves of a training run."""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fulllora_dist.plots.figures import GREY, RIGHT, WRONG

_LINES = {
    "train/accuracy": ("training batches, under their attack", GREY, "", "-"),
    "guard/clean_accuracy": ("held-out, clean", RIGHT, "s", "-"),
    "guard/robust_accuracy": ("held-out, PGD", WRONG, "o", "--"),
    "train/loss": ("training batches, under their attack", GREY, "", "-"),
}
"""Metrics of metrics.jsonl that are drawn: label, colour, marker, line."""
_MANY = 60  # points, from which on the mean of a twentieth of them is drawn too


def training_curves(lines: Iterable[Mapping[str, Any]]) -> Figure:
    """Accuracy and loss over the batches, from the lines of metrics.jsonl.

    Of the training itself, where each point is of one batch under its own attack; of images held out, clean and under
    PGD; and of the final evaluation.
    """
    points: dict[str, tuple[list[int], list[float]]] = {}  # {metric: (steps, values)}
    for line in lines:
        for name, value in line.items():
            if name in _LINES or name.startswith("eval/"):
                steps, values = points.setdefault(name, ([], []))
                steps.append(line["step"])
                values.append(value if name == "train/loss" else 100 * value)
    figure = Figure(figsize=(8, 6.5), dpi=110, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": (2.2, 1)})
    for name in _LINES:
        if name in points:
            _draw_line(below if name == "train/loss" else above, name, *points[name])
    finals = [name for name in points if name.startswith("eval/")]
    for name, marker in zip(finals, itertools.cycle("*XDPv")):
        color = RIGHT if name == "eval/clean" else WRONG
        label = f"validation at the end, {name.removeprefix('eval/')}"
        style = {"color": color, "markeredgecolor": "white", "markersize": 13, "zorder": 4}
        above.plot(*points[name], marker=marker, linestyle="", clip_on=False, label=label, **style)
    above.set_ylim(-3, 103)
    above.set_ylabel("accuracy, %", fontsize=11)
    below.set_ylabel("training loss", fontsize=11)
    below.set_xlabel("batches", fontsize=11)
    below.set_xlim(left=0)
    for axes in (above, below):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = above.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
    return figure


def _draw_line(axes: Axes, name: str, steps: list[int], values: list[float]) -> None:
    """Single batches are noisy: many of them are drawn pale, with their running mean."""
    label, color, marker, line = _LINES[name]
    if len(values) < _MANY:
        axes.plot(steps, values, color=color, marker=marker, linestyle=line, linewidth=1.8, label=label)
        return
    if marker:
        axes.plot(steps, values, color=color, linestyle=line, linewidth=1.8, label=label)
        return
    width = len(values) // 20
    means = np.convolve(values, np.ones(width) / width, mode="valid")
    axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.3)
    axes.plot(steps[width - 1 :], means, color=color, linewidth=1.8, label=f"{label} (mean of {width} points)")
