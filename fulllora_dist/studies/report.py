"""The tables of a study, made from its results alone, without data, weights or training."""

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fulllora_dist.core.atomic import atomic_write
from fulllora_dist.evaluation.bootstrap import Estimate, difference_over_seeds, mean_over_seeds
from fulllora_dist.evaluation.power import lower_bounds, measured, power
from fulllora_dist.plots.study_figure import Difference, study_figure
from fulllora_dist.studies.choice import choice, judged
from fulllora_dist.studies.declaration import known_before
from fulllora_dist.studies.plan import VALIDATION, Study
from fulllora_dist.studies.results import Result, Results, Verdicts, correct, of_attack, seen
from fulllora_dist.studies.settings import ComparisonSettings

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

    def verdicts(self, attack: str, seeds: Collection[int]) -> np.ndarray | None:
        """bool [S, n]; None where there are none, or of different images."""
        found = [part for seed, part in self.found(attack).items() if seed in seeds]
        if not found or len({seen(part) for part in found}) > 1:
            return None
        return np.stack([correct(part, attack) for part in found])


class Report:
    """The report of a study.

    Args:
        study: the study; its results are read.

    Raises:
        UserError: a file in the folder of the results that is none.
    """

    def __init__(self, study: Study):
        self._study, self._settings = study, study.settings
        self._results = Results(study.settings.results_dir)
        evaluations = study.settings.evaluations
        self._asked = {a: (part.data or VALIDATION, part.num_samples) for part in evaluations for a in part.attacks}
        self._attacks = list(self._asked)
        self._arms = [self._arm(name) for name in study.settings.arms]

    def _arm(self, name: str) -> Arm:
        values = choice(self._study, name, self._results)
        runs = [] if values is None else self._study.seeds(name, values)
        found = {run.seed: result for run in runs if (result := self._results.find(run)) is not None}
        return Arm(name, self._settings.arms[name].label, found, self._asked)

    def text(self) -> str:
        """Everything, as Markdown, without the comments around it."""
        parts = [self._head(), self._table(), self._comparisons(), self._tries(), *self._figure_line()]
        parts += [self._files(), *self._without_a_row()]
        return "\n\n".join(part for part in parts if part)

    def write(self) -> Path:
        """Put the tables into the page, between their comments or at its end, and the figure beside it."""
        page = Path(self._settings.page)
        page.parent.mkdir(parents=True, exist_ok=True)
        before = page.read_text() if page.exists() else ""
        with atomic_write(page) as file:
            file.write(self.placed(before).encode())
        if self._runs():
            self._draw()
        return page

    def is_written(self) -> bool:
        """Whether the page has the tables as they are."""
        page = Path(self._settings.page)
        return page.exists() and self.placed(text := page.read_text()) == text

    def placed(self, page: str) -> str:
        """The page with the tables in it."""
        name = self._settings.name
        first, last = f"<!-- study {name}: by `fulllora study report`, not by hand -->", f"<!-- end of study {name} -->"
        block = f"{first}\n\n{self.text()}\n\n{last}"
        pattern = re.compile(f"{re.escape(first)}.*?{re.escape(last)}", re.DOTALL)
        if pattern.search(page):
            return pattern.sub(lambda _: block, page)
        return (f"{page.rstrip()}\n\n" if page.strip() else "") + block + "\n"

    def _head(self) -> str:
        settings = self._settings
        tries = [run for runs in self._study.tries.values() for run in runs]
        tried = sum(judged(self._study, self._results, run) is not None for run in tries)
        planned, path = len(self._arms) * len(settings.seeds), self._study.path
        done = [f"Done: {tried} of {len(tries)} tries"]
        for attacks in (part.attacks for part in settings.evaluations):
            found = [part for arm in self._arms for part in arm.found(attacks[0]).values()]
            images = f" on {len(correct(found[0], attacks[0])):,} images" if found else ""
            done.append(f"{' and '.join(attacks)} of {len(found)} of {planned} runs{images}")
        return (
            f"{'; '.join(done)} ({len(self._arms)} arms, {len(settings.seeds)} seeds). `fulllora study {path}` makes "
            f"them, `fulllora study report {path}` these tables, from `{settings.results_dir}/`. Intervals are 95 %, "
            "over images and seeds (`evaluation/bootstrap.py`)."
        )

    def _table(self) -> str:
        rows = [["arm", "trains", "chosen", "seeds", *(f"{a} %" for a in self._attacks), "TFLOP", "minutes"]]
        for arm in self._arms:
            if not arm.runs:
                continue
            first = next(iter(arm.runs.values()))
            rank = f", rank {first['rank']}" if first["rank"] else ""
            values = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in first["values"].items())
            costs = [result["cost"] for result in arm.runs.values()]
            minutes = np.median([cost["step_seconds"] * cost["batches"] / 60 for cost in costs])
            cells = [arm.label, f"{first['trainable_share']:.2%}{rank}", values, ", ".join(map(str, arm.runs))]
            cells += [self._accuracy(arm, attack) for attack in self._attacks]
            cells += [f"{costs[0]['flops'] / 1e12:.1f}", f"{minutes:.1f}"]
            rows.append(cells)
        if len(rows) == 1:
            return ""
        first = next(iter(self._runs()))
        note = (
            "In brackets: seed by seed. TFLOP: operations of the training, counted. minutes: its wall clock at the "
            f"median batch, the median of the seeds, on {first['cost']['ranks']} rank(s) of "
            f"{first['cost']['threads']} thread(s), {first['cost']['parallel']} run(s) at a time."
        )
        return f"{_markdown(rows)}\n\n{note}"

    def _runs(self) -> list[Result]:
        return [result for arm in self._arms for result in arm.runs.values()]

    def _accuracy(self, arm: Arm, attack: str) -> str:
        verdicts = arm.verdicts(attack, arm.runs)
        if verdicts is None:
            return "-"
        found = mean_over_seeds(verdicts, SAMPLES, np.random.default_rng(0))
        each = ", ".join(f"{100 * value:.1f}" for value in found["per_seed"])
        return f"{100 * found['value']:.1f} ({100 * found['low']:.1f} to {100 * found['high']:.1f}) [{each}]"

    def _pair(self, comparison: ComparisonSettings) -> tuple[Arm, Arm, list[int]]:
        """A, B, and the seeds of which both have verdicts."""
        arms = {arm.name: arm for arm in self._arms}
        a, b = arms[comparison.against], arms[comparison.arm]
        of_a, of_b = (arm.found(comparison.attack) for arm in (a, b))
        return a, b, [seed for seed in self._settings.seeds if seed in of_a and seed in of_b]

    def _saw_the_same(self, comparison: ComparisonSettings) -> bool:
        a, b, seeds = self._pair(comparison)
        found = [arm.found(comparison.attack)[seed] for arm in (a, b) for seed in seeds]
        return len({seen(part) for part in found}) <= 1

    def _compared(self, comparison: ComparisonSettings) -> tuple[Estimate, np.ndarray] | None:
        """B minus A, and that of each verdict, int8 [S, n]; None where nothing is there, or they did not see the
        same."""
        a, b, seeds = self._pair(comparison)
        of_a, of_b = (arm.verdicts(comparison.attack, seeds) for arm in (a, b))
        if of_a is None or of_b is None or not self._saw_the_same(comparison):
            return None
        found = difference_over_seeds(of_a, of_b, SAMPLES, np.random.default_rng(0))
        return found, of_b.astype(np.int8) - of_a.astype(np.int8)

    def _comparisons(self) -> str:
        head = ["difference, points", "attack", "n", "mean", "seed by seed", "images that disagree", "margin"]
        rows = [[*head, "power", "verdict"]]
        for comparison in self._settings.comparisons:
            compared = self._compared(comparison)
            if compared is None:
                continue
            found, differences = compared
            seeds, n = differences.shape
            whole = seeds == len(self._settings.seeds)
            said = verdict(found, comparison.margin) if whole else f"{seeds} of {len(self._settings.seeds)} seeds"
            rows.append(
                [
                    self._label(comparison),
                    comparison.attack,
                    f"{n:,}",
                    f"{100 * found['value']:+.1f} ({100 * found['low']:+.1f} to {100 * found['high']:+.1f})",
                    ", ".join(f"{100 * value:+.1f}" for value in found["per_seed"]),
                    f"{np.abs(differences).mean():.1%}",
                    *_margin(comparison, differences, whole),
                    said + ", exploratory" * (whole and bool(known_before(comparison, self._study, self._results))),
                ]
            )
        tables = [_markdown(rows), *self._exploratory()] if len(rows) > 1 else []
        return "\n\n".join([*tables, *self._not_compared()])

    def _not_compared(self) -> Iterator[str]:
        for comparison in self._settings.comparisons:
            if not self._saw_the_same(comparison):
                what = f"{self._label(comparison)} under {comparison.attack}"
                yield f"Not compared: {what}, as their runs were evaluated on different images or in different balls."

    def _exploratory(self) -> Iterator[str]:
        late = {c: names for c in self._settings.comparisons if (names := known_before(c, self._study, self._results))}
        if late:
            what = ", ".join(f"{self._label(c)} under {c.attack}" for c in late)
            known = ", ".join(sorted({name for names in late.values() for name in names}))
            yield f"Exploratory, as declared or changed when results were known ({known}): {what}."

    def _label(self, comparison: ComparisonSettings) -> str:
        arms = self._settings.arms
        return f"{arms[comparison.arm].label} - {arms[comparison.against].label}"

    def _tries(self) -> str:
        attack = self._settings.choose.attack
        rows, n = [["arm", "tried", "clean %", f"{attack} %", ""]], 0
        for arm, tries in self._study.tries.items():
            values = choice(self._study, arm, self._results)
            for run in tries:
                found = judged(self._study, self._results, run)
                if found is None:
                    continue
                n = len(correct(found, attack))
                accuracies = [f"{100 * correct(found, name).mean():.1f}" for name in dict.fromkeys(("clean", attack))]
                tried = ", ".join(f"{key} {value}" for key, value in run.values.items()) or "-"
                mark = "chosen" if run.values == values else ""
                rows.append([self._settings.arms[arm].label, tried, *accuracies, mark])
        if len(rows) == 1:
            return ""
        what = f"Tries, on {n:,} training images that were held out (seed {self._settings.choose.seed}):"
        return f"{what}\n\n{_markdown(rows if attack != 'clean' else [[*row[:2], *row[3:]] for row in rows])}"

    def _figure_line(self) -> Iterator[str]:
        if self._runs():
            yield f"![Clean against robust accuracy, and the differences]({self._figure().name})"

    def _figure(self) -> Path:
        page = Path(self._settings.page)
        return page.with_name(f"study_{self._settings.name}.png")

    def _draw(self) -> None:
        robust = next((attack for attack in self._attacks if attack != "clean"), "clean")
        runs = {}
        for arm in self._arms:
            clean, under = (arm.verdicts(attack, arm.runs) for attack in ("clean", robust))
            if clean is not None and under is not None and len(clean) == len(under):
                runs[arm.label] = list(zip(clean.mean(axis=1), under.mean(axis=1), strict=True))
        differences = [
            Difference(f"{self._label(c)}\n{c.attack}", found[0]["value"], found[0]["low"], found[0]["high"], c.margin)
            for c in self._settings.comparisons
            if (found := self._compared(c)) is not None
        ]
        with atomic_write(self._figure()) as file:
            study_figure(runs, robust, differences).savefig(file, format="png")

    def _without_a_row(self) -> Iterator[str]:
        """Seeds' results of this study that no table shows, as of an arm that was removed."""
        names = {r["name"] for r in self._results.all() if r["study"] == self._settings.name and not r["is_try"]}
        if left := sorted(names - {result["name"] for result in self._runs()}):
            yield f"Runs of this study that are in no table: {', '.join(left)}."

    def _files(self) -> str:
        names = [f"`{result['name']}`" for result in self._runs() if result["adapter_kept"]]
        if not names:
            return ""
        first = names[0].strip("`")
        return f"With their adapters (`fulllora study verify {first}`): {', '.join(names)}."


def _margin(comparison: ComparisonSettings, differences: np.ndarray, whole: bool) -> tuple[str, str]:
    """The cells of a margin and of its power: as declared, and with what was measured in place of what was assumed."""
    if comparison.margin is None or comparison.power is None:
        return "-", "-"
    said = f"{comparison.power.power:.0%} declared"
    if whole and len(differences) > 1:
        lows = lower_bounds(measured(differences), differences.shape[1], len(differences), studies=STUDIES)
        said += f", {power(lows, comparison.margin):.0%} as measured"
    return f"{100 * comparison.margin:g}", said


def verdict(found: Estimate, margin: float | None) -> str:
    """What an interval says of a loss."""
    if found["low"] > 0:
        return "better"
    if margin is not None and found["low"] > -margin:
        return "not inferior"
    if margin is not None and found["high"] < -margin:
        return "inferior"
    return "worse" if found["high"] < 0 else "undecided"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *body))
