"""The comparisons of a study: what two arms' runs differ by, and what that says."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fulllora_dist.evaluation.bootstrap import Estimate, difference_over_seeds
from fulllora_dist.evaluation.power import lower_bounds, measured, power
from fulllora_dist.studies.declaration import known_before
from fulllora_dist.studies.results import Result, Results, Verdicts, correct, from_ranges, of_attack, seen
from fulllora_dist.studies.settings import ComparisonSettings, StudySettings

SAMPLES = 10_000
STUDIES = 400
"""Simulated for the power as measured."""


@dataclass(frozen=True)
class Arm:
    """What is there of an arm: {seed: result} of its reported runs."""

    name: str
    label: str
    runs: dict[int, Result]
    asked: dict[str, tuple[str, int | None]]  # {attack: which images, how many}

    def found(self, attack: str) -> dict[int, Verdicts]:
        """The verdicts of those runs that have them, by seed."""
        runs = self.runs if attack in self.asked else {}
        found = {seed: of_attack(result, attack, *self.asked[attack]) for seed, result in runs.items()}
        return {seed: part for seed, part in found.items() if part is not None}

    def verdicts(self, attack: str) -> np.ndarray | None:
        """bool [S, n]; None where there are none, or of different images."""
        found = list(self.found(attack).values())
        if not found or len({seen(part) for part in found}) > 1:
            return None
        return np.stack([correct(part, attack) for part in found])

    def on_images_of(self, smaller: str, attack: str) -> float | None:
        """The accuracy under an attack on the images of another one, the mean of the seeds that have both; None where
        that one did not see fewer of the same images."""
        means = []
        for seed, few in self.found(smaller).items():
            many = self.found(attack).get(seed)
            if many is None or any(few[key] != many[key] for key in ("data", "norm", "eps")):
                continue
            ids, of_all = from_ranges(few["ids"]), from_ranges(many["ids"])
            if set(ids) < set(of_all):
                means.append(correct(many, attack)[np.isin(of_all, ids)].mean())
        return float(np.mean(means)) if means else None


@dataclass(frozen=True)
class Compared:
    """A comparison, as far as its runs are done.

    Attributes:
        settings: which one it is.
        label: "B - A".
        whole: whether all seeds are there.
        same: whether the runs saw the same images, in the same balls.
        found: B minus A; None where nothing is there, or they did not see the same.
        differences: of each verdict, int8 [S, n]; None as `found`.
        known_before: results that were known when it was declared as it is now.
    """

    settings: ComparisonSettings
    label: str
    whole: bool
    same: bool
    found: Estimate | None
    differences: np.ndarray | None
    known_before: list[str]

    def row(self) -> list[str] | None:
        """Its row in the table; None where nothing is there."""
        if self.found is None or self.differences is None:
            return None
        found, (seeds, n) = self.found, self.differences.shape
        said = verdict(found, self.settings.margin) if self.whole else f"pending: {seeds} seed(s)"
        return [
            self.label,
            self.settings.attack,
            f"{n:,}",
            f"{100 * found['value']:+.1f} ({100 * found['low']:+.1f} to {100 * found['high']:+.1f})",
            ", ".join(f"{100 * value:+.1f}" for value in found["per_seed"]),
            f"{np.abs(self.differences).mean():.1%}",
            *self._margin(self.differences),
            said + ", exploratory" * (self.whole and bool(self.known_before)),
        ]

    def _margin(self, differences: np.ndarray) -> tuple[str, str]:
        """The cells of the margin and of its power, with what was assumed and with what was measured."""
        margin, assumed = self.settings.margin, self.settings.power
        if margin is None or assumed is None:
            return "-", "-"
        said = f"{assumed.power:.0%} assumed"
        if self.whole and len(differences) > 1:
            lows = lower_bounds(measured(differences), differences.shape[1], len(differences), studies=STUDIES)
            said += f", {power(lows, margin):.0%} measured"
        return f"{100 * margin:g}", said


HEAD = [
    "difference, points",
    "attack",
    "n",
    "mean",
    "seed by seed",
    "images that disagree",
    "margin",
    "power",
    "verdict",
]


def compare(
    comparison: ComparisonSettings,
    arms: Mapping[str, Arm],
    settings: StudySettings,
    declaration: Mapping[str, Any],
    results: Results,
) -> Compared:
    """Compare the runs of two arms, on the seeds of which both have verdicts.

    Args:
        arms: of the study, by name.
        declaration: what the study declares now, see `declaration.declared`.
        results: all that there are.
    """
    a, b = arms[comparison.against], arms[comparison.arm]
    of_a, of_b = (arm.found(comparison.attack) for arm in (a, b))
    seeds = [seed for seed in settings.seeds if seed in of_a and seed in of_b]
    parts = [of_arm[seed] for of_arm in (of_a, of_b) for seed in seeds]
    same, found, differences = len({seen(part) for part in parts}) <= 1, None, None
    if seeds and same:
        right_a, right_b = (
            np.stack([correct(of_arm[seed], comparison.attack) for seed in seeds]) for of_arm in (of_a, of_b)
        )
        found = difference_over_seeds(right_a, right_b, SAMPLES, np.random.default_rng(0))
        differences = right_b.astype(np.int8) - right_a.astype(np.int8)
    return Compared(
        settings=comparison,
        label=f"{b.label} - {a.label}",
        whole=len(seeds) == len(settings.seeds),
        same=same,
        found=found,
        differences=differences,
        known_before=known_before(comparison, settings.name, declaration, results, parts),
    )


def verdict(found: Estimate, margin: float | None) -> str:
    """What an interval says of a loss."""
    if found["low"] > 0:
        return "better"
    if margin is not None and found["low"] > -margin:
        return "not inferior"
    if margin is not None and found["high"] < -margin:
        return "inferior"
    if found["high"] < 0:
        return "worse"
    return "no difference shown" if margin is None else "undecided"
