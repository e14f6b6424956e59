"""Two evaluations of the same images: the difference in accuracy with its uncertainty."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest

from fulllora_dist.attacks.threat import number_in
from fulllora_dist.core.errors import UserError
from fulllora_dist.core.stats import paired_score

SAME = ("norm", "precision", "data")
"""What two evaluations must have in common to be compared."""


def read_evaluation(path: str | Path) -> dict[str, Any]:
    """An evaluation.json.

    Raises:
        UserError: it cannot be read, or is none.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    return parse_evaluation(content, str(path))


def parse_evaluation(content: bytes, name: str) -> dict[str, Any]:
    """The content of an evaluation.json.

    Args:
        name: of the file, for messages.

    Raises:
        UserError: it is none.
    """
    try:
        found = json.loads(content)
        n = len(found["ids"])
        whole = all(len(score["correct"]) == n and {*score["correct"]} <= {0, 1} for _, _, score in _scores(found))
        listed = isinstance(found["warnings"], list)
        if n and whole and listed and {"eps", "norm", "precision"} <= found.keys():
            return found
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise UserError(f"{name} is no evaluation.json; evaluate.py --output writes one")


def check_accuracies(found: Mapping[str, Any], name: str) -> None:
    """Refuse figures that are not those of the images beside them, NaN among them, and images that count twice.

    Args:
        found: in the form of evaluation.json.
        name: of the file, for messages.

    Raises:
        UserError: naming the first of them.
    """
    _check_ids(found, name)
    n = len(found["ids"])
    for eps, attack, score in _scores(found):
        right = sum(score["correct"])
        accuracy, low, high = (score.get(key, math.nan) for key in ("accuracy", "low", "high"))
        try:
            fits = abs(accuracy - right / n) < 1e-9 and low - 1e-9 <= accuracy <= high + 1e-9
        except TypeError:
            fits = False
        if not fits:
            raise UserError(
                f"{name}: {attack} at eps {eps:.4g} has accuracy {accuracy} ({low} to {high}), but {right} of {n} "
                "images right; evaluate again"
            )


def read_replaced(path: str | Path) -> dict[str, Any] | None:
    """The evaluation that an evaluation would be written over; None where there is none.

    Raises:
        UserError: what is there is none, naming --output.
    """
    if not Path(path).exists():
        return None
    try:
        return read_evaluation(path)
    except UserError as error:
        raise UserError(f"--output: {error}; name another file") from None


def check_replaced(
    path: str | Path, attacks: Sequence[tuple[float, str]], norm: str, n: int, sha256: str | None
) -> None:
    """Refuse to write over an evaluation that has what the new one would not have, or over what is none.

    Args:
        path: where it is to be written.
        attacks: (eps, name) of the new one; `clean` at eps 0.
        norm, n, sha256: its norm, number of images, and adapter.

    Raises:
        UserError: naming --output.
    """
    found = read_replaced(path)
    if found is None:
        return
    lost = _named(found["norm"], [(eps, name) for eps, name, _ in _scores(found) if (eps, name) not in attacks])
    lost += [] if len(found["ids"]) <= n else [f"{len(found['ids'])} images"]
    lost += [] if found["norm"] == norm else [found["norm"]]
    lost += [] if found.get("adapter_sha256") == sha256 else ["another adapter"]
    if lost:
        raise UserError(f"--output: {path} holds an evaluation of {', '.join(lost)}; name another file, or delete it")


def _check_ids(found: Mapping[str, Any], name: str) -> None:
    twice = len(found["ids"]) - len(set(found["ids"]))
    if twice:
        raise UserError(f"{name}: {twice} of {len(found['ids'])} ids stand there already; evaluate each image once")


def _scores(found: Mapping[str, Any]) -> list[tuple[float, str, Mapping[str, Any]]]:
    """(eps, attack, score); `clean` has eps 0."""
    points = [{"eps": found["eps"], "attacks": found["attacks"]}, *found.get("more_eps", ())]
    return [
        (0.0 if name == "clean" else float(point["eps"]), name, score)
        for point in points
        for name, score in point["attacks"].items()
    ]


def compare(
    a: Mapping[str, Any],
    b: Mapping[str, Any],
    *,
    attacks: Sequence[str] | None = None,
    shared: bool = False,
    samples: int = 10_000,
    seed: int = 0,
) -> dict[str, Any]:
    """B minus A on each attack and eps that both have.

    See `paired_difference` for the interval. p is that of McNemar's exact test.

    Args:
        a, b: in the form of evaluation.json.
        attacks: of these alone.
        shared: compare the ids that both have, where they are not the same.
        samples: of the bootstrap.

    Returns:
        {"n", "norm", "rows": [{"attack", "eps", "a", "b": accuracies, "difference", "low", "high" (shares of 1),
        "only_a", "only_b": images that only one has right, "p"}], "warnings": [of both, and what of theirs is not
        compared, or not made alike]}.

    Raises:
        UserError: other images, norm, precision or data; nothing in common; an image twice.
    """
    for label, found in (("A", a), ("B", b)):
        _check_ids(found, label)
    for what in SAME:
        if a.get(what) != b.get(what):
            raise UserError(f"{what} of A is {a.get(what)}, of B {b.get(what)}: they cannot be compared")
    ids, in_a, in_b = np.intersect1d(a["ids"], b["ids"], assume_unique=True, return_indices=True)
    if not (len(ids) == len(a["ids"]) == len(b["ids"])) and not shared:
        raise UserError(
            f"A has {len(a['ids'])} images, B {len(b['ids'])}, and {len(ids)} of them are the same; evaluate both on "
            "the same ones, or compare those with --shared"
        )
    if not len(ids):
        raise UserError("A and B have no image in common; evaluate both on the same ones")
    theirs = {(eps, name): score for eps, name, score in _scores(b)}
    both = [(eps, name, score) for eps, name, score in _scores(a) if (eps, name) in theirs]
    chosen = [row for row in both if attacks is None or row[1] in attacks]
    if not chosen or (attacks is not None and set(attacks) - {name for _, name, _ in chosen}):
        shown = ", ".join(_named(a["norm"], [(eps, name) for eps, name, _ in both])) or "nothing"
        raise UserError(f"--attack: {', '.join(attacks or ()) or 'none'} is not in both; in common they have {shown}")
    rng = np.random.default_rng(seed)
    rows = []
    for eps, name, score in chosen:
        first = np.array(score["correct"])[in_a].astype(bool)
        second = np.array(theirs[eps, name]["correct"])[in_b].astype(bool)
        rows.append({"attack": name, "eps": eps, **paired_difference(first, second, samples, rng)})
    warnings = [f"{label}: {line}" for label, found in (("A", a), ("B", b)) for line in found["warnings"]]
    if attacks is None:
        common = {(eps, name) for eps, name, _ in both}
        for label, found in (("A", a), ("B", b)):
            alone = [(eps, name) for eps, name, _ in _scores(found) if (eps, name) not in common]
            warnings += [f"only {label} has {', '.join(_named(a['norm'], alone))}"] if alone else []
    made = [found.get("pictures", {}) for found in (a, b)]
    warnings += [
        f"{key} of A is {made[0][key]}, of B {made[1][key]}: not the same pixels"
        for key in made[0]
        if key != "batch_size" and made[1].get(key, made[0][key]) != made[0][key]
    ]
    return {"n": len(ids), "norm": a["norm"], "rows": rows, "warnings": warnings}


def _named(norm: str, attacks: Sequence[tuple[float, str]]) -> list[str]:
    return [name if eps == 0 else f"{name} at {number_in(norm, eps)}" for eps, name in attacks]


def paired_difference(a: np.ndarray, b: np.ndarray, samples: int, rng: np.random.Generator) -> dict[str, float]:
    """B minus A, where each is right (bool, by image), as a row of `compare` has it.

    The interval is the percentile one of a paired bootstrap: images are drawn with replacement, each with both its
    results (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, ch. 13). As only the numbers of images
    that A alone and B alone have right matter, they are drawn from their multinomial distribution, which is the same.
    Where few images differ it is too narrow, and empty where none does, however few there are; so it is widened to
    the score interval (`paired_score`) at the end where that reaches further.

    Args:
        samples: of the bootstrap.
    """
    n, only_a, only_b = len(a), int((a & ~b).sum()), int((b & ~a).sum())
    drawn = rng.multinomial(n, np.array([only_a, only_b, n - only_a - only_b]) / n, size=samples)
    low, high = np.percentile((drawn[:, 1] - drawn[:, 0]) / n, [2.5, 97.5])
    score = paired_score(only_a, only_b, n)
    low, high = min(low, score[0]), max(high, score[1])
    p = binomtest(only_b, only_a + only_b).pvalue if only_a + only_b else 1.0
    return {
        "a": float(a.mean()),
        "b": float(b.mean()),
        "difference": (only_b - only_a) / n,
        "low": float(low),
        "high": float(high),
        "only_a": only_a,
        "only_b": only_b,
        "p": float(p),
    }


def comparison_table(found: Mapping[str, Any]) -> str:
    """What `compare` found, for people."""
    head = ("attack", "eps", "A %", "B %", "B - A (95 %)", "A alone", "B alone", "p")
    lines = [head]
    for row in found["rows"]:
        interval = f"{100 * row['difference']:+.2f} ({100 * row['low']:+.2f} to {100 * row['high']:+.2f})"
        size = "" if row["eps"] == 0 else number_in(found["norm"], row["eps"])
        numbers = (f"{100 * row['a']:.2f}", f"{100 * row['b']:.2f}", interval)
        lines.append((row["attack"], size, *numbers, str(row["only_a"]), str(row["only_b"]), f"{row['p']:.2g}"))
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    table = [
        "  ".join(
            cell.rjust(w) if i > 1 else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return "\n".join([f"n = {found['n']}, {found['norm']}", "", *table, *(f"warning: {w}" for w in found["warnings"])])
