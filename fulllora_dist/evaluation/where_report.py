"""What people read of where.json: tables, and a figure beside the file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fulllora_dist.evaluation.report import caption, with_interval
from fulllora_dist.models.branches import by_place
from fulllora_dist.plots.branch_figure import Loss, branch_figure


def where_table(results: Mapping[str, Any]) -> str:
    """The norms by block and component, and what is lost without each group of branches."""
    attacks = list(results["intact"])
    intact = ", ".join(f"{name} {with_interval(score).strip()}" for name, score in results["intact"].items())
    lines = [caption(results), f"intact, %: {intact}", ""]
    lines += ["norm of (alpha / r) B A over that of W, %", *_columns(_norm_rows(results)), ""]
    head = ["switched off", "B A / W %"]
    for name in attacks:
        head += [f"{name} %", "lost (95 %)", "p"]
    rows = [head]
    for group in results["off"]:
        row = [f"{group['by']} {group['name']}".rstrip(), _percent(group["relative"])]
        for name in attacks:
            score = group["attacks"][name]
            lost, low, high = (100 * score[key] for key in ("lost", "lost_low", "lost_high"))
            row += [f"{100 * score['accuracy']:.1f}", f"{lost:+.1f} ({low:+.1f} to {high:+.1f})", f"{score['p']:.2g}"]
        rows.append(row)
    lines += _columns(rows)
    if results["always_on"]:
        lines += ["", f"trained without a branch, and never off: {', '.join(results['always_on'])}"]
    return "\n".join([*lines, *(f"warning: {text}" for text in results["warnings"])])


def cells(results: Mapping[str, Any]) -> dict[tuple[str, ...], float | None]:
    """{(block, component): relative norm}, in forward order."""
    return by_place((branch["block"], branch["component"], branch["relative"]) for branch in results["branches"])


def _norm_rows(results: Mapping[str, Any]) -> list[list[str]]:
    placed = cells(results)
    components = list(dict.fromkeys(component for _, component in placed))
    rows = [["block", *components]]
    for block in dict.fromkeys(block for block, _ in placed):
        rows.append([block, *(_percent(placed.get((block, component))) for component in components)])
    return rows


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def _columns(rows: list[list[str]]) -> list[str]:
    """Aligned: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def where_figure(results: Mapping[str, Any], path: str | Path) -> Path:
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
        losses.setdefault(group["by"], []).append(Loss(name, *(_loss(group, name) for name in (attack, "clean"))))
    (everything,) = (group for group in results["off"] if group["by"] == "all")
    del losses["all"]
    figure = branch_figure(
        cells(results),
        losses,
        attack=attack,
        intact=results["intact"][attack]["accuracy"],
        all_off=everything["attacks"][attack]["accuracy"],
        caption=caption(results),
    )
    file = Path(path).with_suffix(".png")
    figure.savefig(file)
    return file


def _loss(group: Mapping[str, Any], attack: str) -> tuple[float, float, float]:
    score = group["attacks"][attack]
    return score["lost"], score["lost_low"], score["lost_high"]
