"""Where robustness sits: how large each branch is beside W, and the accuracy lost without it."""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from fulllora_dist.core.errors import UserError
from fulllora_dist.evaluation.compare import compare
from fulllora_dist.evaluation.evaluator import Evaluator
from fulllora_dist.evaluation.images import EvalImages
from fulllora_dist.evaluation.report import EvaluationReport
from fulllora_dist.models.adapted_model import AdaptedModel
from fulllora_dist.models.branches import Branch, branches_of, disable_branches

By = Literal["component", "block", "branch"]
_SHARED = ("n", "eps", "norm", "precision", "backbone", "adapter", "seed", "ids", "data", "warnings")


@dataclass(frozen=True)
class _Group:
    """Branches that are disabled together."""

    by: str
    name: str
    branches: tuple[Branch, ...]

    @property
    def variant(self) -> str:
        """Name of the model without them."""
        return f"without {self.by} {self.name}".rstrip()


def parse_by(names: str) -> tuple[By, ...]:
    """Ways to group branches: "component,block" -> ("component", "block").

    Raises:
        UserError: an unknown one.
    """
    chosen: list[By] = []
    for name in names.split(","):
        known = [by for by in get_args(By) if by == name]
        if not known:
            raise UserError(f"--by: {name!r} is unknown; known: {', '.join(get_args(By))}; several: component,block")
        chosen += known
    return tuple(dict.fromkeys(chosen))


def where_robustness_sits(
    model: AdaptedModel,
    evaluator: Evaluator,
    images: EvalImages,
    by: Sequence[By] = ("component", "block"),
    resume_dir: str | Path | None = None,
    write: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """The norm of each branch relative to W, and what each group of branches is worth.

    A group is worth what is lost when it is disabled and the adversarial examples are made anew, against the model
    without it: the same images, the same random starts, the attack's full knowledge of what remains. Losses of groups
    need not add up.

    Args:
        evaluator: its attacks; all ranks together, as in `Evaluator.run`.
        by: what is disabled at a time: every branch of a component, of a block, or each branch alone.
        resume_dir, write: see `Evaluator.run`.

    Returns:
        On every rank the same: {"n", "eps", "norm", "precision", "backbone", "adapter", "seed", "ids", "data",
        "warnings": as in evaluation.json; "branches": [{"name", "component", "block", "norm": of (alpha / r) B A,
        "weight_norm", "relative": their ratio, None where W is zero}]; "always_on": names of the backbone's own tensors
        that were trained, which belong to no branch; "intact": {attack: score}; "off": [{"by": "all" or one of `by`,
        "name", "branches": [their names], "relative": of all of them together, "attacks": {attack: score and "lost",
        "lost_low", "lost_high": intact minus this, with the 95 % interval of a paired bootstrap, "p": McNemar's}}]}.

    Raises:
        SharedUserError: the model has no branches.
    """
    branches = branches_of(model)
    groups = _groups(branches, by)
    variants: dict[str, Callable[[], AbstractContextManager[None]]] = {"intact": nullcontext}
    variants |= {group.variant: partial(disable_branches, group.branches) for group in groups}
    norms = {branch.name: (branch.norm(), branch.weight_norm()) for branch in branches}

    def relative(some: Iterable[Branch]) -> float | None:
        added, frozen = (math.hypot(*(norms[branch.name][i] for branch in some)) for i in (0, 1))
        return added / frozen if frozen else None

    def results(reports: dict[str, EvaluationReport]) -> dict[str, Any]:
        intact = reports["intact"]
        return {
            **{key: value for key, value in intact.items() if key in _SHARED},
            "branches": [
                {
                    "name": branch.name,
                    "component": branch.component,
                    "block": branch.block,
                    "norm": norms[branch.name][0],
                    "weight_norm": norms[branch.name][1],
                    "relative": relative([branch]),
                }
                for branch in branches
            ],
            "always_on": [name for name, _ in model.report.trained],
            "intact": intact["attacks"],
            "off": [
                {
                    "by": group.by,
                    "name": group.name,
                    "branches": [branch.name for branch in group.branches],
                    "relative": relative(group.branches),
                    "attacks": _losses(reports[group.variant], intact),
                }
                for group in groups
            ],
        }

    write_all = None if write is None else lambda reports: write(results(reports))
    return results(evaluator.run_variants(model, variants, images, resume_dir, write_all))


def _losses(without: EvaluationReport, intact: EvaluationReport) -> dict[str, Any]:
    """{attack: score, and what is lost against the intact model}."""
    return {
        row["attack"]: {
            **without["attacks"][row["attack"]],
            "lost": row["difference"],
            "lost_low": row["low"],
            "lost_high": row["high"],
            "p": row["p"],
        }
        for row in compare(without, intact)["rows"]
        if row["attack"] in without["attacks"]
    }


def _groups(branches: Sequence[Branch], by: Sequence[By]) -> list[_Group]:
    """All at once, and those of each name in forward order."""
    groups = [_Group("all", "", tuple(branches))]
    for grouping in by:
        together: dict[str, list[Branch]] = {}
        for branch in branches:
            key = branch.name.replace(".lnlora", "") if grouping == "branch" else getattr(branch, grouping)
            together.setdefault(key, []).append(branch)
        groups += [_Group(grouping, name, tuple(some)) for name, some in together.items()]
    return groups
