"""evaluation.json: what it holds, and how it is written, read and checked (`output` checks where it goes)."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict, get_args

import numpy as np

from fulllora_dist.attacks.settings import Norm
from fulllora_dist.core.atomic import write_text
from fulllora_dist.core.errors import UserError
from fulllora_dist.core.stats import wilson
from fulllora_dist.core.units import number_in, size_in

WORST_CASE = "worst_case"


class Key(NamedTuple):
    """An attack in a ball."""

    norm: str
    eps: float
    attack: str


class Score(TypedDict):
    """Accuracy under one attack at one eps.

    Attributes:
        accuracy: share of the images that the model classifies correctly.
        low, high: bounds of its 95 % Wilson interval.
        correct: 0 or 1 for each image, in the order of the report's ids.
        per_class: {class name: [correct, n]}; missing from what others wrote, and from a worst case that is not in a
            file.
    """

    accuracy: float
    low: float
    high: float
    correct: list[int]
    per_class: NotRequired[dict[str, list[int]]]


class WorstCase(TypedDict, total=False):
    """An image counts where it is correct under every attack at this eps; empty where there is none but `clean`."""

    worst_case: Score


class EpsPoint(WorstCase):
    """Every attack but `clean` at one eps, in pixels of [0, 1].

    Attributes:
        norm: of the ball, where it is not the report's.
    """

    eps: float
    attacks: dict[str, Score]
    norm: NotRequired[Norm]


class ModelKeys(TypedDict):
    """What a report says of the model's training; see `EvaluationReport`."""

    classes: list[str] | None
    class_match: str
    own_pictures: dict[str, Any] | None


class EvaluationReport(WorstCase):
    """The content of evaluation.json. What is not required may be missing from a report that others wrote.

    Attributes:
        n: number of images.
        eps: radius of the ball of `attacks`, in pixels of [0, 1].
        norm: of the ball, "linf", "l2" or "l1"; that of `more_eps`, too.
        precision: what the model computes in: "fp32", "fp64", "bf16" or "fp16".
        ids: of the images, ascending.
        attacks: {name: its score at `eps`}.
        warnings: what makes the figures doubtful, one line each.
        worst_case: at `eps`.
        more_eps: the attacks at further eps.
        more_norms: the attacks in balls of further norms, one each.
        checks: {check for masked gradients: the numbers that it measured}, of those that were made.
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
    more_norms: NotRequired[list[EpsPoint]]
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
    per_class = {
        name: [int(correct[labels == label].sum()), int((labels == label).sum())] for label, name in enumerate(classes)
    }
    return {**score_of(correct), "per_class": per_class}


def score_of(correct: np.ndarray) -> Score:
    """`score` without the classes."""
    hits, n = int(correct.sum()), len(correct)
    low, high = wilson(hits, n)
    return {"accuracy": hits / n, "low": low, "high": high, "correct": correct.astype(int).tolist()}


def eps_points(report: EvaluationReport) -> list[EpsPoint]:
    """The report's own eps, then the further ones; `clean` stands at the first."""
    own: EpsPoint = {"eps": report["eps"], "attacks": report["attacks"]}
    if "worst_case" in report:
        own["worst_case"] = report["worst_case"]
    return [own, *report.get("more_eps", ())]


def points(report: EvaluationReport) -> list[EpsPoint]:
    """`eps_points`, each with its norm, then those of further norms."""
    of_norm: list[EpsPoint] = [{**point, "norm": report["norm"]} for point in eps_points(report)]
    return [*of_norm, *report.get("more_norms", ())]


def scores(report: EvaluationReport) -> dict[Key, Score]:
    """The score of each attack; `clean` has eps 0."""
    return {key: point["attacks"][key.attack] for point in points(report) for key in _keys(point)}


def _keys(point: EpsPoint) -> list[Key]:
    return [Key(point["norm"], 0.0 if name == "clean" else float(point["eps"]), name) for name in point["attacks"]]


def worst_cases(correct: Mapping[Key, np.ndarray]) -> dict[Key, np.ndarray]:
    """What every attack in a ball leaves correct, bool [n]; for each ball that has an attack. As the image itself is in
    the ball, what is wrong without an attack is wrong under each.

    Args:
        correct: bool [n] of each attack.
    """
    attacked = {key: values for key, values in correct.items() if key.attack != "clean"}
    balls = dict.fromkeys(key._replace(attack=WORST_CASE) for key in attacked)
    return {
        ball: np.logical_and.reduce([values for key, values in attacked.items() if key[:2] == ball[:2]])
        for ball in balls
    }


def worst_scores(report: EvaluationReport) -> dict[Key, Score]:
    """The worst case in each ball, of files without it too, which have no `per_class` then."""
    known = {
        Key(point["norm"], float(point["eps"]), WORST_CASE): point["worst_case"]
        for point in points(report)
        if "worst_case" in point
    }
    correct = {key: np.array(score["correct"], dtype=bool) for key, score in scores(report).items()}
    return {key: known.get(key) or score_of(values) for key, values in worst_cases(correct).items()}


def attack_names(norm: str, attacks: Iterable[Key]) -> list[str]:
    """For messages: "pgd20 at 4/255"; "pgd20 at l2 eps = 0.5" where that is not the norm."""
    return [
        key.attack
        if key.attack == "clean"
        else f"{key.attack} at {number_in(norm, key.eps) if key.norm == norm else size_in(key.norm, key.eps)}"
        for key in attacks
    ]


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
        named = all(p["norm"] in get_args(Norm) and math.isfinite(p["eps"]) for p in points(report))
        ours = n and whole and listed and named and "precision" in report
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        ours = False
    if not ours:
        raise UserError(f"{name} is not an evaluation.json; evaluate.py --output writes one")
    _check_scores(report, name)
    return report


def _check_scores(report: EvaluationReport, name: str) -> None:
    """Refuse an attack that stands there twice, of which one would be lost, images that are right under an attack and
    wrong without, and a worst case that is not that of the attacks."""
    keys = [key for point in points(report) for key in _keys(point)]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise UserError(f"{name}: {attack_names(report['norm'], twice)[0]} stands there twice; evaluate again")
    found = {key: np.array(score["correct"]) for key, score in scores(report).items()}
    clean = found.get(Key(report["norm"], 0.0, "clean"))
    for key, correct in found.items():
        if clean is not None and (wrong := (correct > clean).sum()):
            raise UserError(
                f"{name}: {wrong} images are right under {attack_names(report['norm'], [key])[0]} but wrong without an "
                "attack; evaluate again"
            )
    worst = worst_cases(found)
    for key, score in worst_scores(report).items():
        if score["correct"] != worst[key].astype(int).tolist():
            raise UserError(
                f"{name}: {attack_names(report['norm'], [key])[0]} is not what all attacks leave; evaluate again"
            )


def write_evaluation(report: EvaluationReport | Mapping[str, Any], path: str | Path) -> None:
    """Write a report, of where robustness sits too: whole or not at all. Its folder is made where there is none."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(report) + "\n")


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
    for (_, eps, attack), score in (scores(report) | worst_scores(report)).items():
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
