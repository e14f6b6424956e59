"""What people read of where.json: tables, and a figure beside the file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fulllora_dist.core.text_table import text_table
from fulllora_dist.core.units import size_in
from fulllora_dist.evaluation.summary import accuracy_cells
from fulllora_dist.models.branches import by_place
from fulllora_dist.plots.branch_figure import Loss, branch_figure

Results = Mapping[str, Any]
"""What `where_robustness_sits` returns."""


def where_table(results: Results) -> str:
    """The norms by block and component, and what is lost without each group of branches."""
    intact = (f"{name} {'  '.join(accuracy_cells(score))}" for name, score in results["intact"].items())
    rows = [["disabled", "B A / W %"]]
    for name in results["intact"]:
        rows[0] += [f"{name} %", "lost (95 %)", "p"]
    for group in results["off"]:
        rows.append([f"{group['by']} {group['name']}".rstrip(), _percent(group["relative"])])
        for score in group["attacks"].values():
            lost, low, high = (100 * share for share in _loss(score))
            rows[-1] += [_percent(score["accuracy"]), f"{lost:+.1f} ({low:+.1f} to {high:+.1f})", f"{score['p']:.2g}"]
    sections = [
        f"{_caption(results)}\nintact, %: {', '.join(intact)}",
        f"norm of (alpha / r) B A over that of W, %\n{text_table(_norm_rows(results), 'lr')}",
        text_table(rows, "lr"),
    ]
    if results["always_on"]:
        sections.append(f"trained without a branch, and never disabled: {', '.join(results['always_on'])}")
    return "\n".join(["\n\n".join(sections), *(f"warning: {line}" for line in results["warnings"])])


def _caption(results: Results) -> str:
    return f"n = {results['n']}, {size_in(results['norm'], results['eps'])}, {results['precision']}"


def relative_norms(results: Results) -> dict[tuple[str, ...], float | None]:
    """{(block, component): norm of (alpha / r) B A relative to that of W}, in forward order."""
    return by_place((branch["block"], branch["component"], branch["relative"]) for branch in results["branches"])


def _norm_rows(results: Results) -> list[list[str]]:
    norms = relative_norms(results)
    blocks, components = (list(dict.fromkeys(names)) for names in zip(*norms, strict=True))
    rows = ([block, *(_percent(norms.get((block, component))) for component in components)] for block in blocks)
    return [["block", *components], *rows]


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def where_figure(results: Results, path: str | Path) -> Path:
    """Draw the results beside where.json.

    Args:
        path: of where.json.

    Returns:
        The file, where.png.
    """
    attack = next(name for name in results["intact"] if name != "clean")
    places = {branch["name"]: f"{branch['block']}/{branch['component']}" for branch in results["branches"]}
    losses: dict[str, list[Loss]] = {}
    for group in results["off"]:
        name = places[group["branches"][0]] if group["by"] == "branch" else group["name"]
        loss = Loss(name, *(_loss(group["attacks"][which]) for which in (attack, "clean")))
        losses.setdefault(group["by"], []).append(loss)
    del losses["all"]
    (everything,) = (group for group in results["off"] if group["by"] == "all")
    figure = branch_figure(
        relative_norms(results),
        losses,
        attack=attack,
        intact=results["intact"][attack]["accuracy"],
        all_off=everything["attacks"][attack]["accuracy"],
        caption=_caption(results),
    )
    file = Path(path).with_suffix(".png")
    figure.savefig(file)
    return file


def _loss(score: Mapping[str, float]) -> tuple[float, float, float]:
    return score["lost"], score["lost_low"], score["lost_high"]
