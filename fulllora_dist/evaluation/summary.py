"""What people read of an evaluation: a table, and figures beside evaluation.json."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path

from timm.data import ImageNetInfo

from fulllora_dist.core.stats import wilson
from fulllora_dist.core.text_table import text_table
from fulllora_dist.core.units import size_in
from fulllora_dist.evaluation.checks import CHECKS
from fulllora_dist.evaluation.report import WORST_CASE, EvaluationReport, Score, eps_points, points, worst_scores
from fulllora_dist.evaluation.trained import pictures_line
from fulllora_dist.plots.figures import Curves, least_and_most, per_class_bars, robustness_curve


def table(report: EvaluationReport) -> str:
    """Each attack and the worst case with its interval in each ball, the classes, and the warnings."""
    attacks = report["attacks"]
    width = max(map(len, (WORST_CASE, *attacks)))
    worst = worst_scores(report)
    blocks = [caption(report), *_about_model(report), ""]
    for k, point in enumerate(points(report)):
        norm, eps = point["norm"], float(point["eps"])
        blocks += ["", size_in(norm, eps)] if k else []
        rows = [(name, *accuracy_cells(score)) for name, score in point["attacks"].items()]
        rows += [(WORST_CASE, *accuracy_cells(score)) for key, score in worst.items() if key[:2] == (norm, eps)]
        cells = [("attack", "accuracy %", "95 % interval"), *((name.ljust(width), *rest) for name, *rest in rows)]
        blocks.append(text_table(cells, "lrl"))
    blocks += ["", _class_table(attacks)]
    if (made := report.get("checks")) and not report["warnings"]:
        others = [check.name for check in CHECKS if check.name not in made]
        not_made = f"; not made: {', '.join(others)}" if others else ""
        blocks += ["", f"{len(made)} checks for masked gradients, no warning{not_made}"]
    return "\n".join([*blocks, *(f"warning: {line}" for line in report["warnings"])])


def _about_model(report: EvaluationReport) -> list[str]:
    """How the images were made, and how classes were compared, a line each."""
    pictures = pictures_line(report.get("pictures", {}), report.get("own_pictures"))
    classes = report.get("class_match")
    return [*([pictures] if pictures else []), *([f"classes: {classes}"] if classes else [])]


def _class_table(attacks: Mapping[str, Score]) -> str:
    """The accuracy of each class under each attack; of many classes the least and the most robust ones."""
    strongest = _strongest(attacks)
    counts = attacks[strongest]["per_class"]
    seen = {label: n for label, (_, n) in counts.items() if n}
    shown = least_and_most(counts)
    rows = [("class", "n", *attacks, f"95 % interval of {strongest}")]
    for label in (label for label in seen if label in shown):
        accuracies = (score["per_class"][label][0] / seen[label] for score in attacks.values())
        cells = (f"{100 * accuracy:.1f}" for accuracy in accuracies)
        rows.append((label, str(seen[label]), *cells, interval(*wilson(counts[label][0], seen[label]))))
    text = text_table(rows, "l" + "r" * (1 + len(attacks)) + "l")
    if len(shown) < len(seen):
        text += f"\n... and {len(seen) - len(shown)} classes between these, the least and the most robust ones"
    return text


def caption(report: EvaluationReport) -> str:
    """What the figures are of, in a line."""
    return f"n = {report['n']}, {size_in(report['norm'], report['eps'])}, {report['precision']}"


def interval(low: float, high: float) -> str:
    """Bounds in per cent."""
    return f"{100 * low:.1f} to {100 * high:.1f}"


def accuracy_cells(score: Score) -> tuple[str, str]:
    """Accuracy and 95 % interval in per cent, as cells of a table."""
    return f"{100 * score['accuracy']:.2f}", interval(score["low"], score["high"])


def write_figures(report: EvaluationReport, path: str | Path) -> list[Path]:
    """Figures beside evaluation.json: accuracy of each class, and robust accuracy against eps where there are several.

    Args:
        path: of evaluation.json.

    Returns:
        The files: evaluation_classes.png, evaluation_eps.png.
    """
    path, attacks = Path(path), report["attacks"]
    strongest = _strongest(attacks)
    per_class = {
        name: {_class_name(label): counts for label, counts in attacks[name]["per_class"].items()}
        for name in sorted(attacks, key=lambda name: name == strongest)  # that one last, the others in their order
    }
    of_classes, against_eps = (path.with_name(f"{path.stem}_{what}.png") for what in ("classes", "eps"))
    per_class_bars(per_class, caption(report)).savefig(of_classes)
    if not report.get("more_eps"):
        against_eps.unlink(missing_ok=True)  # of an evaluation that this one replaces
        return [of_classes]
    figure = robustness_curve(_curves(report), attack="attack", norm=report["norm"])
    figure.suptitle(f"n = {report['n']}, {report['precision']}", fontsize=10)
    figure.savefig(against_eps)
    return [of_classes, against_eps]


_imagenet_names = cache(lambda: ImageNetInfo("imagenet-22k"))  # a table of 22,000 rows


@cache
def _class_name(label: str) -> str:
    """A WordNet id of ImageNet with the first of its names; other classes as they are."""
    try:
        return f"{_imagenet_names().label_name_to_description(label).split(',')[0]} ({label})"
    except KeyError:
        return label


def _curves(report: EvaluationReport) -> Curves:
    """One of each attack, from the clean accuracy on."""
    attacks = report["attacks"]
    at_zero = {0.0: attacks["clean"]} if "clean" in attacks else {}
    return {
        name: at_zero | {point["eps"]: point["attacks"][name] for point in eps_points(report)}
        for name in attacks
        if name != "clean"
    }


def _strongest(attacks: Mapping[str, Score]) -> str:
    """The one that leaves the fewest images correct, the last of equal ones."""
    return min(reversed(list(attacks)), key=lambda name: attacks[name]["accuracy"])
