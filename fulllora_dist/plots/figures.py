"""Figures for people: what an attack does to a model before and after training, and how strong it has to be.

The colours are of Okabe and Ito's eight, which colour-blind readers can tell apart; correct and wrong
predictions have marks, too.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from torch import Tensor

from fulllora_dist.core.stats import wilson

RIGHT, WRONG = "#0072B2", "#D55E00"
GREY, BAR = "#555555", "#9CCBE8"
STYLES = [
    (WRONG, "o", "--"),
    (RIGHT, "s", "-"),
    (GREY, "^", ":"),
    ("#009E73", "D", "-."),
    ("#CC79A7", "v", "-"),
    ("#E69F00", "P", "--"),
    ("#56B4E9", "X", ":"),
    ("black", "*", "-."),
]
MOST_CLASSES = 40  # that a figure or table shows


Curves = Mapping[str, Mapping[float, Mapping[str, Any]]]
"""{name: {eps in pixels of [0, 1]: "accuracy", "low" and "high" as in evaluation.json}}, of models or attacks."""


@dataclass(frozen=True)
class Attacked:
    """One model under attack.

    Attributes:
        name: in the figure, e.g. "backbone".
        adversarial: [N, 3, H, W] in [0, 1], made against this model.
        before, after: int64 [N], its predictions on the clean and on the adversarial images.
    """

    name: str
    adversarial: Tensor
    before: Tensor
    after: Tensor


def _show(axes: Axes, image: Tensor) -> None:
    axes.imshow(image.detach().cpu().float().clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])


def _verdict(axes: Axes, lines: Sequence[tuple[str, str, bool]]) -> None:
    """Under an image, one line for each (model, predicted class, whether it is correct)."""
    for i, (model, predicted, correct) in enumerate(lines):
        axes.text(
            0.5,
            -0.05 - 0.17 * i,
            f"{model}: {predicted} {'✓' if correct else '✗'}",
            transform=axes.transAxes,
            ha="center",
            va="top",
            fontsize=9,
            color=RIGHT if correct else WRONG,
            fontweight="normal" if correct else "bold",
        )
    if len(lines) == 1:
        for spine in axes.spines.values():
            spine.set(color=RIGHT if lines[0][2] else WRONG, linewidth=2.5)


def draw_examples(
    figure: Figure | SubFigure,
    clean: Tensor,
    labels: Tensor,
    classes: Sequence[str],
    models: Sequence[Attacked],
    eps: float,
) -> None:
    """A row for each image; the perturbation is shown on grey, stretched so that eps spans half the range."""
    rows, magnified = len(clean), 0.5 / eps
    grid = figure.subplots(rows, 1 + 2 * len(models), squeeze=False, gridspec_kw={"wspace": 0.12, "hspace": 0.5})
    titles = ["clean"]
    for model in models:
        titles += [f"perturbation\nagainst {model.name}\n(x {magnified:.0f})", f"{model.name}\nunder attack"]
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=10)
    for i, row in enumerate(grid):
        label = int(labels[i])
        _show(row[0], clean[i])
        row[0].set_ylabel(f"true class: {classes[label]}", fontsize=10 if len(classes[label]) < 12 else 8)
        _verdict(row[0], [(m.name, classes[int(m.before[i])], int(m.before[i]) == label) for m in models])
        for j, model in enumerate(models):
            _show(row[1 + 2 * j], 0.5 + magnified * (model.adversarial[i] - clean[i]))
            _show(row[2 + 2 * j], model.adversarial[i])
            after = int(model.after[i])
            _verdict(row[2 + 2 * j], [(model.name, classes[after], after == label)])


def draw_curves(axes: Axes, curves: Curves, attack: str, norm: str = "linf") -> None:
    """As `robustness_curve`, on axes of a larger figure."""
    unit = 255 if norm == "linf" else 1
    for (name, scores), (color, marker, line) in zip(curves.items(), itertools.cycle(STYLES)):
        eps = sorted(scores)
        levels = [unit * e for e in eps]
        accuracy, low, high = (np.array([100 * scores[e][key] for e in eps]) for key in ("accuracy", "low", "high"))
        axes.fill_between(levels, low, high, color=color, alpha=0.15, linewidth=0)
        axes.plot(levels, accuracy, color=color, marker=marker, linestyle=line, linewidth=2, label=name)
    axes.set_ylim(-3, 107)
    axes.set_xlim(left=0)
    axes.set_xticks(sorted({round(unit * e, 2) for scores in curves.values() for e in scores}))
    length = f"{norm.upper()} length of the change"
    change = "largest change of a pixel, in 1/255 of its range" if norm == "linf" else length
    axes.set_xlabel(f"eps: {change}", fontsize=11)
    axes.set_ylabel(f"accuracy under {attack}, % (band: 95 % interval)", fontsize=11)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    # above the axes, where no line can be
    columns = min(len(curves), 3)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=columns, frameon=False, fontsize=12)


def adversarial_examples(
    clean: Tensor, labels: Tensor, classes: Sequence[str], models: Sequence[Attacked], eps: float
) -> Figure:
    """A few images clean, their perturbations magnified, and under attack, with each model's predictions.

    Args:
        clean: [N, 3, H, W] in [0, 1]; four or five are readable.
        labels: int64 [N], the true classes.
        classes: class names.
        models: e.g. the backbone and the adapted model.
        eps: size of the perturbation in pixels of [0, 1].

    Returns:
        A figure; `figure.savefig(path)` writes it.
    """
    height = 0.9 + 2.2 * len(clean)
    figure = Figure(figsize=(2.0 * (1 + 2 * len(models)), height), dpi=120)
    draw_examples(figure, clean, labels, classes, models, eps)
    figure.subplots_adjust(left=0.07, right=0.98, top=1 - 0.75 / height, bottom=0.5 / height)
    return figure


def robustness_curve(curves: Curves, *, attack: str = "PGD-20", norm: str = "linf") -> Figure:
    """Robust accuracy against eps, with 95 % intervals, for a few models (the backbone first) or attacks.

    Args:
        attack: its name for the axis.
        norm: of eps, "linf", "l2" or "l1".
    """
    figure = Figure(figsize=(6.5, 4.5), dpi=120, layout="constrained")
    draw_curves(figure.subplots(), curves, attack, norm)
    return figure


def per_class_bars(per_class: Mapping[str, Mapping[str, Sequence[int]]], caption: str) -> Figure:
    """Accuracy of each class, the least robust on top: a bar with its 95 % interval for the last attack, a mark for
    each of the others. Of many classes the 20 least and the 20 most robust ones.

    Args:
        per_class: {attack: {class: (correct, n)}}; classes without an image are left out.
        caption: what the numbers are of.
    """
    attacks = list(per_class)
    shown = {
        name: [100 * per_class[attack][name][0] / n for attack in attacks]
        for name, (_, n) in per_class[attacks[-1]].items()
        if n
    }
    total = len(shown)
    names = sorted(least_and_most(per_class[attacks[-1]]), key=lambda name: shown[name][::-1])
    figure = Figure(figsize=(7.5, 1.6 + 0.27 * len(names)), dpi=110, layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(names)) + np.where(np.arange(len(names)) >= MOST_CLASSES // 2, total > len(names), 0)
    heights = np.array([shown[name][-1] for name in names])
    bounds = 100 * np.array([wilson(*per_class[attacks[-1]][name]) for name in names])
    axes.barh(
        places,
        heights,
        xerr=np.abs(bounds.T - heights),
        error_kw={"ecolor": GREY, "elinewidth": 1, "capsize": 2},
        color=BAR,
        height=0.7,
        label=f"{attacks[-1]} (with 95 % interval)",
    )
    for number, (attack, (color, marker, _)) in enumerate(zip(attacks[:-1], itertools.cycle(STYLES))):
        values = [shown[name][number] for name in names]
        axes.scatter(
            values, places, color=color, marker=marker, edgecolor="white", s=45, zorder=3, clip_on=False, label=attack
        )
    axes.set_yticks(places, [str(name) for name in names], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    left_out = f"\n{total - len(names)} classes in between left out" if total > len(names) else ""
    axes.set_xlabel(f"accuracy, %   ({caption}){left_out}", fontsize=10)
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=min(len(attacks), 3), frameon=False)
    return figure


def least_and_most(per_class: Mapping[str, Sequence[int]]) -> set[str]:
    """The classes to show: all, or of many the least and the most robust ones, equally many of each.

    Args:
        per_class: {class: (correct, n)}; classes without an image are left out.
    """
    names = sorted((correct / n, name) for name, (correct, n) in per_class.items() if n)
    half = MOST_CLASSES // 2
    return {name for _, name in (names if len(names) <= MOST_CLASSES else [*names[:half], *names[-half:]])}
