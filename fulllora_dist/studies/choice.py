"""Which try is the best, and which runs are left."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import numpy as np

from fulllora_dist.core.errors import UserError
from fulllora_dist.core.stats import paired_score
from fulllora_dist.studies.plan import HELD_OUT, Run, Study
from fulllora_dist.studies.results import Results, Verdicts, correct, has, of_attack, seen

InputsOf = Callable[[Run], Mapping[str, str] | None]


def _no_inputs(_: Run) -> None:
    return None


def judged(study: Study, results: Results, run: Run, inputs_of: InputsOf = _no_inputs) -> Verdicts | None:
    """The verdicts by which a try is chosen; None while it is not done."""
    result, choose = results.find(run, inputs_of(run)), study.settings.choose
    return None if result is None else of_attack(result, choose.attack, HELD_OUT, choose.num_samples)


def choice(study: Study, arm: str, results: Results, inputs_of: InputsOf = _no_inputs) -> Mapping[str, str] | None:
    """The values of an arm's best try (see `ChoiceSettings`); None while one is not done.

    Raises:
        UserError: they were not evaluated on the same images.
    """
    found = {run: judged(study, results, run, inputs_of) for run in study.tries[arm]}
    done = {run: verdicts for run, verdicts in found.items() if verdicts is not None}
    if len({seen(verdicts) for verdicts in done.values()}) > 1:
        names = ", ".join(run.name for run in done)
        raise UserError(
            f"{study.path}: the tries of {arm} were evaluated on different images ({names}); delete the results of "
            f"those that were not evaluated on {study.settings.choose.data} as it is now"
        )
    if len(done) < len(found):
        return None
    right = {run: correct(verdicts, study.settings.choose.attack) for run, verdicts in done.items()}
    best = max(right, key=lambda run: float(right[run].mean()))
    if study.settings.choose.prefer_clean:
        equals = [run for run in done if not _told_apart(right[best], right[run])]
        best = max(equals, key=lambda run: float(correct(done[run], "clean").mean()))
    return best.values


def _told_apart(best: np.ndarray, other: np.ndarray) -> bool:
    return paired_score(int((best & ~other).sum()), int((~best & other).sum()), len(best))[1] < 0


def is_done(results: Results, run: Run, inputs: Mapping[str, str] | None) -> bool:
    """Whether its result is there, with all verdicts."""
    result = results.find(run, inputs)
    return result is not None and all(has(result, evaluation) for evaluation in run.evaluations)


def pending(study: Study, results: Results, inputs_of: InputsOf) -> Iterator[Run]:
    """The runs that are left and can start, in order: wave by wave, the tries, then evaluation by evaluation and seed
    by seed, so that what is there at any time can be compared. A run has its evaluations up to the one whose turn it
    is, and comes again for a further one."""
    seen = set()  # arms that are alike share a run
    for arms in study.waves():
        runs = [run for arm in arms for run in study.tries[arm]]
        values = {arm: choice(study, arm, results, inputs_of) for arm in arms}
        seeds = {arm: study.seeds(arm, found) for arm, found in values.items() if found is not None}
        for count in range(1, len(study.settings.evaluations) + 1):
            for i in range(len(study.settings.seeds)):
                runs += [replace(seeds[arm][i], evaluations=seeds[arm][i].evaluations[:count]) for arm in seeds]
        for run in runs:
            turn = run.key, len(run.evaluations)
            if turn not in seen and not is_done(results, run, inputs_of(run)):
                seen.add(turn)
                yield run
