"""The tables of a study, made from its results alone, without data, weights or training."""

import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from fulllora_dist.core.atomic import atomic_write, write_text
from fulllora_dist.evaluation.bootstrap import mean_over_seeds
from fulllora_dist.plots.study_figure import Difference, study_figure
from fulllora_dist.studies.choice import choice, judged
from fulllora_dist.studies.comparisons import HEAD, SAMPLES, Arm, Compared, compare
from fulllora_dist.studies.declaration import declared
from fulllora_dist.studies.plan import VALIDATION, Study
from fulllora_dist.studies.results import Result, Results, correct


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
        write_text(page, self.placed(before))
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
        verdicts = arm.verdicts(attack)
        if verdicts is None:
            return "-"
        found = mean_over_seeds(verdicts, SAMPLES, np.random.default_rng(0))
        each = ", ".join(f"{100 * value:.1f}" for value in found["per_seed"])
        there = ((other, arm.on_images_of(attack, other)) for other in self._attacks if other != "clean")
        more = "".join(f"; {other} on these {100 * value:.1f}" for other, value in there if value is not None)
        return f"{100 * found['value']:.1f} ({100 * found['low']:.1f} to {100 * found['high']:.1f}) [{each}]{more}"

    @cached_property
    def _compared(self) -> list[Compared]:
        arms = {arm.name: arm for arm in self._arms}
        declaration, settings = declared(self._study), self._settings
        return [compare(c, arms, settings, declaration, self._results) for c in settings.comparisons]

    def _comparisons(self) -> str:
        rows = [row for compared in self._compared if (row := compared.row()) is not None]
        tables = [_markdown([HEAD, *rows]), *self._exploratory()] if rows else []
        return "\n\n".join([*tables, *self._not_compared()])

    def _not_compared(self) -> Iterator[str]:
        for c in self._compared:
            if not c.same:
                what = f"{c.label} under {c.settings.attack}"
                yield f"Not compared: {what}, as their runs were evaluated on different images or in different balls."

    def _exploratory(self) -> Iterator[str]:
        known = {name.rpartition("-seed")[0] for c in self._compared if c.found is not None for name in c.known_before}
        if known:
            yield f"Exploratory: declared or changed when seeds of {', '.join(sorted(known))} were known."

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
            clean, under = (arm.verdicts(attack) for attack in ("clean", robust))
            if clean is not None and under is not None and len(clean) == len(under):
                runs[arm.label] = list(zip(clean.mean(axis=1), under.mean(axis=1), strict=True))
        differences = [
            Difference(f"{c.label}\n{c.settings.attack}", f["value"], f["low"], f["high"], c.settings.margin)
            for c in self._compared
            if (f := c.found) is not None
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


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *body))
