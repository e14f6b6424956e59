"""Two evaluations of the same images: the difference in accuracy with its uncertainty."""

from collections.abc import Iterable, Sequence
from typing import TypedDict

import numpy as np
from scipy.stats import binomtest

from fulllora_dist.core.errors import UserError
from fulllora_dist.core.text_table import text_table
from fulllora_dist.core.units import number_in, size_in
from fulllora_dist.evaluation.bootstrap import difference_over_seeds
from fulllora_dist.evaluation.report import EvaluationReport, Key, attack_names, check_unique_ids, scores, worst_cases

SAME = ("norm", "precision", "data")
"""What two evaluations must have in common to be compared."""


class PairedDifference(TypedDict):
    """B minus A on the same images.

    Attributes:
        a, b: accuracies, as shares.
        difference, low, high: b - a with its 95 % interval, as shares.
        only_a, only_b: images that only A, only B classifies correctly.
        p: of McNemar's exact test.
    """

    a: float
    b: float
    difference: float
    low: float
    high: float
    only_a: int
    only_b: int
    p: float


class Row(PairedDifference):
    """The difference under one attack; `clean` has eps 0, and `worst_case` is that of the attacks that both have."""

    attack: str
    norm: str
    eps: float


class Comparison(TypedDict):
    """What `compare` returns.

    Attributes:
        n: images compared.
        norm: of both.
        rows: one for each attack and ball that both have, and the worst case in each ball.
        warnings: of both, what is in one alone, and what was not made alike.
    """

    n: int
    norm: str
    rows: list[Row]
    warnings: list[str]


def compare(
    a: EvaluationReport,
    b: EvaluationReport,
    *,
    attacks: Sequence[str] | None = None,
    shared: bool = False,
    samples: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """B minus A on each attack and ball that both have, and in the worst case of these; `paired_difference` says what
    the interval is.

    Args:
        attacks: of these alone.
        shared: compare the ids that both have, where they are not the same.
        samples: of the bootstrap.

    Raises:
        UserError: other images, norm, precision or data; nothing in common; an image twice.
    """
    reports = {"A": a, "B": b}
    for label, report in reports.items():
        check_unique_ids(report, label)
    for what in SAME:
        if a.get(what) != b.get(what):
            why = class_difference(a, b) if what == "data" else ""
            raise UserError(f"{what} of A is {a.get(what)}, of B {b.get(what)}{why}: they cannot be compared")
    ids, in_a, in_b = np.intersect1d(a["ids"], b["ids"], assume_unique=True, return_indices=True)
    if not (len(ids) == len(a["ids"]) == len(b["ids"])) and not shared:
        raise UserError(
            f"A has {len(a['ids'])} images, B {len(b['ids'])}, and {len(ids)} of them are the same; evaluate both on "
            "the same ones, or compare those with --shared"
        )
    if not len(ids):
        raise UserError("A and B have no image in common; evaluate both on the same ones")
    if len(ids) == len(a["ids"]) == len(b["ids"]) and (why := class_difference(a, b)):
        raise UserError(f"A and B have the same ids{why}: they are not of the same images")
    of_a, of_b = scores(a), scores(b)
    common = [key for key in of_a if key in of_b]
    columns_a, columns_b = (
        {key: np.array(found[key]["correct"])[rows].astype(bool) for key in common}
        for found, rows in ((of_a, in_a), (of_b, in_b))
    )
    columns_a, columns_b = (columns | worst_cases(columns) for columns in (columns_a, columns_b))
    chosen = [key for key in _by_ball(columns_a) if attacks is None or key.attack in attacks]
    if not chosen or (attacks is not None and set(attacks) - {key.attack for key in chosen}):
        shown = ", ".join(attack_names(a["norm"], _by_ball(columns_a))) or "nothing"
        raise UserError(f"--attack: {', '.join(attacks or ()) or 'none'} is not in both; in common they have {shown}")
    rng = np.random.default_rng(seed)
    rows: list[Row] = [
        {"attack": key.attack, "norm": key.norm, "eps": key.eps}
        | paired_difference(columns_a[key], columns_b[key], samples, rng)  # type: ignore[misc]
        for key in chosen
    ]
    warnings = [f"{label}: {line}" for label, report in reports.items() for line in report["warnings"]]
    if attacks is None:
        for label, report in reports.items():
            alone = [key for key in scores(report) if key not in common]
            warnings += [f"only {label} has {', '.join(attack_names(a['norm'], alone))}"] if alone else []
    images_a, images_b = (report.get("pictures", {}) for report in (a, b))
    warnings += [
        f"{key} of A is {value}, of B {images_b[key]}: not the same pixels"
        for key, value in images_a.items()
        if key != "batch_size" and images_b.get(key, value) != value
    ]
    return {"n": len(ids), "norm": a["norm"], "rows": rows, "warnings": warnings}


def _by_ball(keys: Iterable[Key]) -> list[Key]:
    """Each ball's attacks together, its worst case last; the balls in the order of `keys`."""
    keys = list(keys)
    balls = list(dict.fromkeys(key[:2] for key in keys))
    return sorted(keys, key=lambda key: balls.index(key[:2]))


def class_difference(a: EvaluationReport, b: EvaluationReport) -> str:
    """How the classes of the images differ, as the end of a sentence; empty where they do not, or are not known."""
    classes_a, classes_b = (
        next(({name: n for name, (_, n) in s["per_class"].items()} for s in scores(r).values() if "per_class" in s), {})
        for r in (a, b)
    )
    if not classes_a or not classes_b or list(classes_a.items()) == list(classes_b.items()):
        return ""
    if classes_a == classes_b:
        return ", with the same classes in another order"
    name = min(name for name, _ in classes_a.items() ^ classes_b.items())
    counts = (f"{classes.get(name, 'no')} images of class {name!r}" for classes in (classes_a, classes_b))
    return ", A with {}, B with {}".format(*counts)


def paired_difference(a: np.ndarray, b: np.ndarray, samples: int, rng: np.random.Generator) -> PairedDifference:
    """B minus A, from what each classifies correctly: bool [n], image by image.

    The interval is the percentile one of a paired bootstrap: images are drawn with replacement, each with both its
    results (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, ch. 13); see `bootstrap.py`, whose case of
    one seed this is. Where few images differ it is too narrow, and empty where none does, however few there are; so it
    is widened to the score interval (`paired_score`) at the end where that reaches further.

    Args:
        samples: of the bootstrap.
    """
    n, only_a, only_b = len(a), int((a & ~b).sum()), int((b & ~a).sum())
    found = difference_over_seeds(a[None], b[None], samples, rng)
    p = binomtest(only_b, only_a + only_b).pvalue if only_a + only_b else 1.0
    return {
        "a": float(a.mean()),
        "b": float(b.mean()),
        "difference": (only_b - only_a) / n,
        "low": found["low"],
        "high": found["high"],
        "only_a": only_a,
        "only_b": only_b,
        "p": float(p),
    }


def comparison_table(comparison: Comparison) -> str:
    """The result of `compare` as text."""
    rows = [("attack", "eps", "A %", "B %", "B - A (95 %)", "A alone", "B alone", "p")]
    for row in comparison["rows"]:
        size = number_in if row["norm"] == comparison["norm"] else size_in
        eps = "" if row["eps"] == 0 else size(row["norm"], row["eps"])
        accuracies = f"{100 * row['a']:.2f}", f"{100 * row['b']:.2f}"
        points = f"{100 * row['difference']:+.2f} ({100 * row['low']:+.2f} to {100 * row['high']:+.2f})"
        counts = str(row["only_a"]), str(row["only_b"])
        rows.append((row["attack"], eps, *accuracies, points, *counts, f"{row['p']:.2g}"))
    head = f"n = {comparison['n']}, {comparison['norm']}"
    return "\n".join([head, "", text_table(rows, "llr"), *(f"warning: {line}" for line in comparison["warnings"])])
