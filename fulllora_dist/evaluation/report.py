"""evaluation.json, and what people read of it: a table, and figures beside the file."""

import json
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from timm.data import ImageNetInfo

from fulllora_dist.attacks.threat import size_in
from fulllora_dist.core.atomic import atomic_write
from fulllora_dist.core.errors import UserError
from fulllora_dist.core.stats import wilson
from fulllora_dist.plots.figures import Curve, least_and_most, per_class_bars, robustness_curve


def write_evaluation(results: Mapping[str, Any], path: str | Path) -> None:
    """evaluation.json, whole or not at all; its folder is made where there is none."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write((json.dumps(results) + "\n").encode())


def write_figures(results: Mapping[str, Any], path: str | Path) -> list[Path]:
    """Figures beside evaluation.json: accuracy of each class, and robust accuracy against eps where there are several.

    Args:
        path: of evaluation.json.

    Returns:
        The files: evaluation_classes.png, evaluation_eps.png.
    """
    path, attacks = Path(path), results["attacks"]
    files = [path.with_name(f"{path.stem}_classes.png")]
    names = {label: _described(label) for label in next(iter(attacks.values()))["per_class"]}
    strongest = _strongest(attacks)
    per_class = {
        name: {names[label]: counts for label, counts in attacks[name]["per_class"].items()}
        for name in sorted(attacks, key=lambda name: name == strongest)  # that one last, the others as they stand
    }
    per_class_bars(per_class, caption(results)).savefig(files[0])
    against_eps = path.with_name(f"{path.stem}_eps.png")
    if results["more_eps"]:
        figure = robustness_curve(_curves(results), trained_eps=None, attack="attack", norm=results["norm"])
        figure.suptitle(f"n = {results['n']}, {results['precision']}", fontsize=10)
        figure.savefig(against_eps)
        files.append(against_eps)
    else:
        against_eps.unlink(missing_ok=True)  # of an evaluation that this one replaces
    return files


def check_output(path: str | Path) -> None:
    """Refuse what `write_evaluation` could not write in the end; makes the folder where there is none.

    Raises:
        UserError: naming --output.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"--output: {path} is a folder; name a file, e.g. {path / 'evaluation.json'}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output: {path.parent} cannot be made ({error.strerror or error})") from None
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"--output: {path.parent} cannot be written to; name a file in another folder")


_imagenet_names = cache(lambda: ImageNetInfo("imagenet-22k"))  # a table of 22,000 rows


def _described(label: str) -> str:
    """A WordNet id of ImageNet with the first of its names; other classes as they are."""
    names = _imagenet_names()
    try:
        return f"{names.label_name_to_description(label).split(',')[0]} ({label})"
    except KeyError:
        return label


def _curves(results: Mapping[str, Any]) -> list[Curve]:
    """Of each attack, from its accuracy without one."""
    points = [{"eps": results["eps"], "attacks": results["attacks"]}, *results["more_eps"]]
    clean = results["attacks"].get("clean")
    at_zero = {} if clean is None else {0.0: clean}
    return [
        Curve(name, at_zero | {point["eps"]: point["attacks"][name] for point in points})
        for name in results["attacks"]
        if name != "clean"
    ]


def caption(results: Mapping[str, Any]) -> str:
    """What the figures are of, in a line."""
    return f"n = {results['n']}, {size_in(results['norm'], results['eps'])}, {results['precision']}"


def _strongest(attacks: Mapping[str, Any]) -> str:
    """The one that leaves the fewest images right, the last of equal ones."""
    return min(reversed(list(attacks)), key=lambda name: attacks[name]["accuracy"])


def table(results: Mapping[str, Any]) -> str:
    """The results for people: each attack with its interval, other eps, the classes, and the warnings."""
    attacks: Mapping[str, Any] = results["attacks"]
    width = max(len("attack"), *(len(name) for name in attacks))
    lines = [caption(results), ""]
    lines.append(f"{'attack':<{width}}  accuracy %  95 % interval")
    for name, score in attacks.items():
        lines.append(f"{name:<{width}}  {with_interval(score)}")
    for point in results["more_eps"]:
        lines += ["", size_in(results["norm"], point["eps"])]
        lines += [f"{name:<{width}}  {with_interval(score)}" for name, score in point["attacks"].items()]
    per_class = {name: score["per_class"] for name, score in attacks.items()}
    strongest = _strongest(attacks)
    seen = {label: n for label, (_, n) in per_class[strongest].items() if n}
    shown = least_and_most(per_class[strongest])
    wide = max(len("class"), *(len(str(label)) for label in shown))
    header = "  ".join(f"{name:>{max(6, len(name))}}" for name in attacks)
    lines += ["", f"{'class':<{wide}}      n  {header}  95 % interval of {strongest}"]
    for label, n in ((label, n) for label, n in seen.items() if label in shown):
        cells = (f"{100 * per_class[name][label][0] / n:>{max(6, len(name))}.1f}" for name in attacks)
        low, high = wilson(per_class[strongest][label][0], n)
        lines.append(f"{label:<{wide}}  {n:>5}  {'  '.join(cells)}  {100 * low:.1f} to {100 * high:.1f}")
    if len(shown) < len(seen):
        lines.append(f"... and {len(seen) - len(shown)} classes between these, the least and the most robust ones")
    if results.get("checks") and not results["warnings"]:
        lines += ["", f"{len(results['checks'])} checks for masked gradients, no warning"]
    return "\n".join([*lines, *(f"warning: {text}" for text in results["warnings"])])


def with_interval(score: Mapping[str, Any]) -> str:
    """Accuracy and 95 % interval in per cent, as columns of a table."""
    return f"{100 * score['accuracy']:>10.2f}  {100 * score['low']:.1f} to {100 * score['high']:.1f}"
