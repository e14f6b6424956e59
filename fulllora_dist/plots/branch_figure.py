"""Where robustness sits, as a figure: the size of each branch beside W, and what is lost without some of them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fulllora_dist.plots.figures import GREY, RIGHT, WRONG

_DARK = 0.6  # of the colour scale: from there on, text is white


@dataclass(frozen=True)
class Loss:
    """Accuracy lost without a group of branches, as shares: (lost, low, high)."""

    name: str
    attacked: tuple[float, float, float]
    clean: tuple[float, float, float]


Place = tuple[str, ...]
"""(block, component)."""


def branch_sizes(norms: Mapping[Place, float | None]) -> Figure:
    """The size of each branch, as a map of blocks and components.

    Args:
        norms: {(block, component): norm relative to W}, in forward order; None where there is none.
    """
    blocks, components = _sides(norms)
    size = max(8.0, 2.0 + 0.6 * len(blocks)), 1.5 + 0.33 * len(components)
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    _draw_sizes(figure.subplots(), norms)
    return figure


def _sides(places: Iterable[Place]) -> tuple[list[str], list[str]]:
    """Blocks and components, each once."""
    blocks, components = zip(*places, strict=True)
    return list(dict.fromkeys(blocks)), list(dict.fromkeys(components))


def _draw_sizes(axes: Axes, norms: Mapping[Place, float | None]) -> None:
    sides = _sides(norms)
    _map(axes, _grid(norms, *sides), *sides, "{:.1f}", "Blues")
    axes.set_title("size of a branch: norm of (alpha / r) B A, in % of the norm of W", fontsize=11)


def branch_figure(
    norms: Mapping[Place, float | None],
    losses: Mapping[str, Sequence[Loss]],
    *,
    attack: str,
    intact: float,
    all_off: float,
    caption: str,
) -> Figure:
    """A map of the norms on top, the losses as bars below it; or, for `branch`, as a second map.

    Args:
        norms: as in `branch_sizes`.
        losses: {"component", "block" or "branch": groups in forward order}; of "branch" the names are
            "block/component", and of several in one place the one that costs most is shown.
        attack: its name.
        intact, all_off: accuracy under it with all branches and with none.
        caption: what the numbers are of.
    """
    blocks, components = _sides(norms)
    bars = {by: groups for by, groups in losses.items() if by != "branch"}
    maps = 2 if "branch" in losses else 1
    tallest = max((len(groups) for groups in bars.values()), default=0)
    heights = [0.7 + 0.33 * len(components)] * maps + ([0.6 + 0.3 * tallest] if bars else [])
    width = max(10.0, 2.0 + 0.6 * len(blocks))
    figure = Figure(figsize=(width, 1.3 + sum(heights)), dpi=110, layout="constrained")
    figure.suptitle(
        f"{attack}: {100 * intact:.1f} % with all branches, {100 * all_off:.1f} % with none   ({caption})", fontsize=11
    )
    rows = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    _draw_sizes(rows[0].subplots(), norms)
    if "branch" in losses:
        ascending = sorted(losses["branch"], key=lambda loss: loss.attacked[0])
        lost: dict[Place, float | None] = {tuple(loss.name.split("/")): loss.attacked[0] for loss in ascending}
        axes = rows[1].subplots()
        _map(axes, _grid(lost, blocks, components), blocks, components, "{:+.0f}", "Oranges")
        axes.set_title(f"points of accuracy under {attack} lost without it", fontsize=11)
    if bars:
        panels = rows[-1].subplots(1, len(bars), squeeze=False)[0]
        for panel, (by, groups) in zip(panels, bars.items(), strict=True):
            _bars(panel, groups, attack)
            panel.set_title(f"lost without all branches of a {by}", fontsize=11)
        handles, labels = panels[0].get_legend_handles_labels()
        rows[-1].legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return figure


def _grid(values: Mapping[Place, float | None], blocks: Sequence[str], components: Sequence[str]) -> np.ndarray:
    """Per cent [components, blocks], NaN where there is no branch."""
    rows = [[values.get((block, component)) for block in blocks] for component in components]
    return 100 * np.array(rows, dtype=float)  # None becomes NaN


def _map(
    axes: Axes, grid: np.ndarray, blocks: Sequence[str], components: Sequence[str], style: str, colours: str
) -> None:
    top = max(float(np.nanmax(grid, initial=0)), 1e-9)
    axes.imshow(grid, cmap=colours, vmin=0, vmax=top, aspect="auto")
    for (i, j), value in np.ndenumerate(grid):
        if not np.isnan(value):
            colour = "white" if value > _DARK * top else "black"
            axes.text(j, i, style.format(value), ha="center", va="center", fontsize=9, color=colour)
    names = [block.removeprefix("blocks.").replace("_embed", "\nembed") for block in blocks]
    tilted = max(map(len, names)) > 11
    axes.set_xticks(
        range(len(names)), names, fontsize=9, rotation=35 if tilted else 0, ha="right" if tilted else "center"
    )
    axes.set_yticks(range(len(components)), components, fontsize=10)
    axes.set_xlabel("block", fontsize=10)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _with_error(losses: Iterable[tuple[float, float, float]]) -> tuple[np.ndarray, np.ndarray]:
    """Points lost [n], and how far the interval reaches to either side [2, n]."""
    lost, low, high = 100 * np.array(list(losses)).T
    return lost, np.stack([lost - low, high - lost])


def _bars(axes: Axes, groups: Sequence[Loss], attack: str) -> None:
    places = np.arange(len(groups))
    # the bar above, the mark below it: neither interval hides the other
    lost, error = _with_error(group.attacked for group in groups)
    style = {"ecolor": GREY, "elinewidth": 1.2, "capsize": 2.5}
    axes.barh(places - 0.12, lost, color=WRONG, height=0.5, xerr=error, error_kw=style, label=f"under {attack}")
    lost, error = _with_error(group.clean for group in groups)
    axes.errorbar(lost, places + 0.27, xerr=error, color=RIGHT, fmt="D", ms=4, lw=1, capsize=2, label="on clean images")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(places, [group.name.removeprefix("blocks.") for group in groups], fontsize=10)
    axes.invert_yaxis()
    axes.set_xlabel("points of accuracy lost (95 % interval)", fontsize=10)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
