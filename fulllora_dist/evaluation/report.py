"""evaluation.json: what it holds, and how it is written, read and checked."""

import contextlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict, get_args

import numpy as np

from fulllora_dist.attacks.settings import Norm
from fulllora_dist.core.atomic import atomic_write
from fulllora_dist.core.errors import UserError
from fulllora_dist.core.stats import wilson
from fulllora_dist.core.units import number_in


class Score(TypedDict):
    """Accuracy under one attack at one eps.

    Attributes:
        accuracy: share of the images that the model classifies correctly.
        low, high: bounds of its 95 % Wilson interval.
        correct: 0 or 1 for each image, in the order of the report's ids.
        per_class: {class name: [correct, n]}.
    """

    accuracy: float
    low: float
    high: float
    correct: list[int]
    per_class: dict[str, list[int]]


class EpsPoint(TypedDict):
    """Every attack but `clean` at one eps, in pixels of [0, 1]."""

    eps: float
    attacks: dict[str, Score]


class ModelKeys(TypedDict):
    """What a report says of the model's training; see `EvaluationReport`."""

    classes: list[str] | None
    class_match: str
    own_pictures: dict[str, Any] | None


class EvaluationReport(TypedDict):
    """The content of evaluation.json. What is not required may be missing from a report that others wrote.

    Attributes:
        n: number of images.
        eps: radius of the ball of `attacks`, in pixels of [0, 1].
        norm: of all balls, "linf" or "l2".
        precision: what the model computes in: "fp32", "fp64", "bf16" or "fp16".
        ids: of the images, ascending.
        attacks: {name: its score at `eps`}.
        warnings: what makes the figures doubtful, one line each.
        more_eps: the attacks at further eps.
        checks: {check for masked gradients: the numbers that it measured}; empty where none was made.
        backbone, adapter, adapter_sha256: what was evaluated.
        seed: of the attacks' random starts.
        data: hash of the data set's index.
        pictures: how the images were made from the data: size, crop_pct, interpolation; and the batch size.
        own_pictures: how the adapter was trained to see them; None for a module of one's own.
        classes: names of the model's outputs, in order; None where it does not record them.
        class_match: how they were compared with the data's: empty where both are the same, see `match_classes`.
    """

    n: int
    eps: float
    norm: Norm
    precision: str
    ids: list[int]
    attacks: dict[str, Score]
    warnings: list[str]
    more_eps: NotRequired[list[EpsPoint]]
    checks: NotRequired[dict[str, dict[str, float]]]
    backbone: NotRequired[str | None]
    adapter: NotRequired[str | None]
    adapter_sha256: NotRequired[str | None]
    seed: NotRequired[int]
    data: NotRequired[str]
    pictures: NotRequired[dict[str, Any]]
    own_pictures: NotRequired[dict[str, Any] | None]
    classes: NotRequired[list[str] | None]
    class_match: NotRequired[str]


def score(correct: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> Score:
    """The score of one attack.

    Args:
        correct: 0 or 1 [n].
        labels: int64 [n].
        classes: their names.
    """
    hits, n = int(correct.sum()), len(correct)
    low, high = wilson(hits, n)
    per_class = {
        name: [int(correct[labels == label].sum()), int((labels == label).sum())] for label, name in enumerate(classes)
    }
    return {"accuracy": hits / n, "low": low, "high": high, "correct": correct.tolist(), "per_class": per_class}


def eps_points(report: EvaluationReport) -> list[EpsPoint]:
    """The report's own eps, then the further ones; `clean` stands at the first."""
    return [{"eps": report["eps"], "attacks": report["attacks"]}, *report.get("more_eps", ())]


def scores(report: EvaluationReport) -> dict[tuple[float, str], Score]:
    """{(eps, attack): score}; `clean` has eps 0."""
    return {
        (0.0 if name == "clean" else float(point["eps"]), name): score
        for point in eps_points(report)
        for name, score in point["attacks"].items()
    }


def attack_names(norm: str, attacks: Sequence[tuple[float, str]]) -> list[str]:
    """(eps, attack) for messages: "pgd20 at 4/255"."""
    return [name if eps == 0 else f"{name} at {number_in(norm, eps)}" for eps, name in attacks]


def read_evaluation(path: str | Path) -> EvaluationReport:
    """An evaluation.json.

    Raises:
        UserError: it cannot be read, or is not an evaluation.json.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    return parse_evaluation(content, str(path))


def parse_evaluation(content: bytes, name: str) -> EvaluationReport:
    """The content of an evaluation.json, unchanged.

    Args:
        name: of the file, for messages.

    Raises:
        UserError: it is not an evaluation.json.
    """
    try:
        report = json.loads(content)
        n = len(report["ids"])
        whole = all(len(s["correct"]) == n and {*s["correct"]} <= {0, 1} for s in scores(report).values())
        listed = isinstance(report["warnings"], list) and isinstance(report.get("pictures", {}), dict)
        named = report["norm"] in get_args(Norm) and all(math.isfinite(point["eps"]) for point in eps_points(report))
        ours = n and whole and listed and named and "precision" in report
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        ours = False
    if not ours:
        raise UserError(f"{name} is not an evaluation.json; evaluate.py --output writes one")
    _check_scores(report, name)
    return report


def _check_scores(report: EvaluationReport, name: str) -> None:
    """Refuse an attack that stands there twice, of which one would be lost, and images that are right under an attack
    and wrong without."""
    keys = [(float(point["eps"]), attack) for point in eps_points(report) for attack in point["attacks"]]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise UserError(f"{name}: {attack_names(report['norm'], twice)[0]} stands there twice; evaluate again")
    found = scores(report)
    clean = found.get((0.0, "clean"))
    for key, score in found.items():
        if clean is not None and (wrong := sum(a > b for a, b in zip(score["correct"], clean["correct"], strict=True))):
            raise UserError(
                f"{name}: {wrong} images are right under {attack_names(report['norm'], [key])[0]} but wrong without an "
                "attack; evaluate again"
            )


def write_evaluation(report: EvaluationReport | Mapping[str, Any], path: str | Path) -> None:
    """Write a report, of where robustness sits too: whole or not at all. Its folder is made where there is none."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write((json.dumps(report) + "\n").encode())


def check_unique_ids(report: EvaluationReport, name: str) -> None:
    """Raises UserError: an image counts twice."""
    repeated = len(report["ids"]) - len(set(report["ids"]))
    if repeated:
        raise UserError(f"{name}: {repeated} of {len(report['ids'])} ids are repeated; evaluate each image once")


def check_accuracies(report: EvaluationReport, name: str) -> None:
    """Refuse accuracies that do not follow from the images beside them, NaN among them, and images that count twice.

    Args:
        name: of the file, for messages.

    Raises:
        UserError: naming the first of them.
    """
    check_unique_ids(report, name)
    n = len(report["ids"])
    for (eps, attack), score in scores(report).items():
        hits = sum(score["correct"])
        accuracy, low, high = score.get("accuracy", math.nan), score.get("low", math.nan), score.get("high", math.nan)
        try:
            fits = abs(accuracy - hits / n) < 1e-9 and low - 1e-9 <= accuracy <= high + 1e-9
        except TypeError:
            fits = False
        if not fits:
            raise UserError(
                f"{name}: {attack} at eps {eps:.4g} has accuracy {accuracy} ({low} to {high}), but {hits} of {n} "
                "images are correct; evaluate again"
            )


def check_output(path: str | Path) -> None:
    """Refuse what `write_evaluation` could not write in the end; changes nothing.

    Raises:
        UserError: naming --output.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"--output: {path} is a folder; name a file, e.g. {path / 'evaluation.json'}")
    missing = [parent for parent in path.parents if not parent.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)  # nothing else tells whether it can be made
        writable = os.access(path.parent, os.W_OK)
    except OSError as error:
        raise UserError(f"--output: cannot create {path.parent} ({error.strerror or error})") from None
    finally:
        for parent in missing:
            with contextlib.suppress(OSError):
                parent.rmdir()
    if not writable:
        raise UserError(f"--output: {path.parent} is not writable; name a file in another folder")


def read_replaced(path: str | Path) -> EvaluationReport | None:
    """The evaluation that a new one would overwrite; None where there is none.

    Raises:
        UserError: the file there is not an evaluation, naming --output.
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
    """Refuse to overwrite an evaluation that has what the new one would not have, or a file that is not an evaluation.

    Args:
        path: where the new one is to be written.
        attacks: (eps, name) of the new one; `clean` at eps 0.
        norm, n, sha256: its norm, number of images, and adapter.

    Raises:
        UserError: naming --output.
    """
    old = read_replaced(path)
    if old is None:
        return
    lost = attack_names(old["norm"], [key for key in scores(old) if key not in attacks])
    lost += [] if len(old["ids"]) <= n else [f"{len(old['ids'])} images"]
    lost += [] if old["norm"] == norm else [old["norm"]]
    lost += [] if old.get("adapter_sha256") == sha256 else ["another adapter"]
    if lost:
        raise UserError(f"--output: {path} holds an evaluation of {', '.join(lost)}; name another file, or delete it")
