"""The tables of a study, made from its results alone: no training, no data, no torch."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fulllora_dist.core.atomic import atomic_write
from fulllora_dist.evaluation.bootstrap import Estimate, difference_over_seeds, mean_over_seeds
from fulllora_dist.plots.study_figure import Difference, study_figure
from fulllora_dist.studies.choice import choice, judged
from fulllora_dist.studies.plan import VALIDATION, Study
from fulllora_dist.studies.results import Result, Results, Verdicts, correct, of_attack, seen
from fulllora_dist.studies.settings import ComparisonSettings

SAMPLES = 10_000


@dataclass(frozen=True)
class Arm:
    """What is there of an arm: {seed: result} of its reported runs."""

    name: str
    label: str
    runs: dict[int, Result]
    sizes: dict[str, int | None]  # {attack: num_samples}

    def found(self, attack: str, seeds: Sequence[int]) -> list[Verdicts]:
        """The verdicts of those runs that have them."""
        found = (of_attack(self.runs[seed], attack, VALIDATION, self.sizes[attack]) for seed in seeds)
        return [part for part in found if part is not None]

    def verdicts(self, attack: str, seeds: Sequence[int]) -> np.ndarray | None:
        """bool [S, n]; None where a run lacks them, or has those of other images."""
        found = self.found(attack, seeds)
        if not found or len(found) < len(seeds) or len({seen(part) for part in found}) > 1:
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
        self._sizes = {attack: part.num_samples for part in study.settings.evaluations for attack in part.attacks}
        self._attacks = list(self._sizes)
        self._arms = [self._arm(name) for name in study.settings.arms]

    def _arm(self, name: str) -> Arm:
        values = choice(self._study, name, self._results)
        runs = [] if values is None else self._study.seeds(name, values)
        found = {run.seed: result for run in runs if (result := self._results.find(run)) is not None}
        return Arm(name, self._settings.arms[name].label, found, self._sizes)

    def text(self) -> str:
        """Everything, as Markdown, without the comments around it."""
        parts = [self._head(), self._table(), self._comparisons(), self._tries(), *self._figure_line(), self._files()]
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
        done = sum(len(arm.runs) for arm in self._arms)
        planned = len(self._arms) * len(settings.seeds)
        found = ((a, part) for arm in self._arms for a in self._attacks for part in arm.found(a, list(arm.runs)))
        sizes = {len(correct(part, attack)) for attack, part in found}
        images = " and ".join(f"{n:,}" for n in sorted(sizes, reverse=True))
        on = f", evaluated on {images} validation images" if images else ""
        count = f"{done} of {planned} runs are done ({len(self._arms)} arms, {len(settings.seeds)} seeds){on}"
        path = self._study.path
        return (
            f"{count}. `fulllora study {path}` makes them, `fulllora study report {path}` these tables, from "
            f"`{settings.results_dir}/`. Intervals are 95 %, over images and seeds (`evaluation/bootstrap.py`)."
        )

    def _table(self) -> str:
        rows = [["arm", "trains", "chosen", "seeds", *(f"{a} %" for a in self._attacks), "PFLOP", "minutes"]]
        for arm in self._arms:
            if not arm.runs:
                continue
            first = next(iter(arm.runs.values()))
            rank = f", rank {first['rank']}" if first["rank"] else ""
            values = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in first["values"].items())
            costs = [result["cost"] for result in arm.runs.values()]
            minutes = sorted(cost["step_seconds"] * cost["batches"] / 60 for cost in costs)
            cells = [arm.label, f"{first['trainable_share']:.2%}{rank}", values, ", ".join(map(str, arm.runs))]
            cells += [self._accuracy(arm, attack) for attack in self._attacks]
            cells += [f"{costs[0]['flops'] / 1e15:.3g}", f"{minutes[0]:.1f}"]
            rows.append(cells)
        if len(rows) == 1:
            return ""
        first = next(iter(self._runs()))
        note = (
            "PFLOP: operations of the training, counted. minutes: its wall clock at the median batch, the least of the "
            f"seeds, on {first['cost']['ranks']} rank(s) of {first['cost']['threads']} thread(s)."
        )
        return f"{_markdown(rows)}\n\n{note}"

    def _runs(self) -> list[Result]:
        return [result for arm in self._arms for result in arm.runs.values()]

    def _accuracy(self, arm: Arm, attack: str) -> str:
        verdicts = arm.verdicts(attack, list(arm.runs))
        if verdicts is None:
            return "-"
        found = mean_over_seeds(verdicts, SAMPLES, np.random.default_rng(0))
        return f"{100 * found['value']:.1f} ({100 * found['low']:.1f} to {100 * found['high']:.1f})"

    def _pair(self, comparison: ComparisonSettings) -> tuple[Arm, Arm, list[int]]:
        """A, B, and the seeds that both have."""
        arms = {arm.name: arm for arm in self._arms}
        a, b = arms[comparison.against], arms[comparison.arm]
        return a, b, [seed for seed in self._settings.seeds if seed in a.runs and seed in b.runs]

    def _saw_the_same(self, comparison: ComparisonSettings) -> bool:
        a, b, seeds = self._pair(comparison)
        return len({seen(part) for arm in (a, b) for part in arm.found(comparison.attack, seeds)}) <= 1

    def _compared(self, comparison: ComparisonSettings) -> tuple[Estimate, float, int, list[int]] | None:
        """(B minus A, share of the images on which a run of either differs, n, seeds); None where nothing is there, or
        they did not see the same."""
        a, b, seeds = self._pair(comparison)
        of_a, of_b = (arm.verdicts(comparison.attack, seeds) for arm in (a, b))
        if of_a is None or of_b is None or not self._saw_the_same(comparison):
            return None
        found = difference_over_seeds(of_a, of_b, SAMPLES, np.random.default_rng(0))
        return found, float((of_a != of_b).mean()), of_a.shape[1], seeds

    def _comparisons(self) -> str:
        rows = [["difference, points", "under", "n", "all seeds", "seed by seed", "differ", "margin", "so"]]
        for comparison in self._settings.comparisons:
            compared = self._compared(comparison)
            if compared is None:
                continue
            found, differ, n, seeds = compared
            declared, power = comparison.margin, comparison.power
            margin = "-" if declared is None or power is None else f"{100 * declared:g} (power {power.power:.0%})"
            whole = len(seeds) == len(self._settings.seeds)
            rows.append(
                [
                    self._label(comparison),
                    comparison.attack,
                    f"{n:,}",
                    f"{100 * found['value']:+.1f} ({100 * found['low']:+.1f} to {100 * found['high']:+.1f})",
                    ", ".join(f"{100 * value:+.1f}" for value in found["per_seed"]),
                    f"{differ:.1%}",
                    margin,
                    verdict(found, declared) if whole else f"{len(seeds)} of {len(self._settings.seeds)} seeds",
                ]
            )
        tables = [_markdown(rows), *self._late_declarations()] if len(rows) > 1 else []
        return "\n\n".join([*tables, *self._not_compared()])

    def _not_compared(self) -> Iterator[str]:
        for comparison in self._settings.comparisons:
            if not self._saw_the_same(comparison):
                what = f"{self._label(comparison)} under {comparison.attack}"
                yield f"Not compared: {what}, as their runs were evaluated on different images or in different balls."

    def _late_declarations(self) -> Iterator[str]:
        """A comparison that is not as it was declared when the first of its runs was made."""
        for comparison in self._settings.comparisons:
            now = comparison.model_dump(mode="json")
            runs = [r for a in self._arms if a.name in (comparison.arm, comparison.against) for r in a.runs.values()]
            if late := [result["name"] for result in runs if now not in result["comparisons"]]:
                what = f"{self._label(comparison)} under {comparison.attack}"
                yield f"Declared or changed after {', '.join(late)}: {what}."

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
            clean, under = (arm.verdicts(attack, list(arm.runs)) for attack in ("clean", robust))
            if clean is not None and under is not None:
                runs[arm.label] = list(zip(clean.mean(axis=1), under.mean(axis=1), strict=True))
        differences = [
            Difference(f"{self._label(c)}\n{c.attack}", found[0]["value"], found[0]["low"], found[0]["high"], c.margin)
            for c in self._settings.comparisons
            if (found := self._compared(c)) is not None
        ]
        with atomic_write(self._figure()) as file:
            study_figure(runs, robust, differences).savefig(file, format="png")

    def _files(self) -> str:
        names = [f"`{result['name']}`" for result in self._runs() if result["adapter_kept"]]
        if not names:
            return ""
        first = names[0].strip("`")
        return f"With their adapters (`fulllora study verify {first}`): {', '.join(names)}."


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
