"""The gate: whether an adapter may replace the champion, judged from the evaluations of both, with reasons.

It is a test of non-inferiority: the candidate passes where the paired 95 % interval of its difference to the champion
lies above minus the margin, so that a loss of more than the margin is excluded. The fewer the images, the wider the
interval, and the less can be excluded.
"""

from dataclasses import dataclass, field

from fulllora_dist.core.errors import UserError
from fulllora_dist.core.units import size_in
from fulllora_dist.data.class_names import match_classes
from fulllora_dist.evaluation.compare import compare
from fulllora_dist.evaluation.report import WORST_CASE, EvaluationReport, Score, check_accuracies, worst_scores

Evaluation = EvaluationReport
_SHOWN = {"precision": "precision", "norm": "norm", "data": "data (digest of the index)"}


@dataclass(frozen=True)
class Rules:
    """The gate's settings.

    Attributes:
        margin: largest loss of robust accuracy against the champion that must be excluded, a share of 1.
        clean_floor: lowest clean accuracy, a share of 1.
    """

    margin: float = 0.01
    clean_floor: float = 0.5

    def __post_init__(self) -> None:
        for name, value in (("margin", self.margin), ("clean floor", self.clean_floor)):
            if not 0 <= value <= 1:
                raise UserError(f"{name} must be between 0 and 1 (0.01 is one point), got {value}")


@dataclass(frozen=True)
class Verdict:
    """The gate's answer.

    Attributes:
        reasons: why the candidate is refused; it passes if there are none.
        findings: its figures, and other remarks.
    """

    reasons: tuple[str, ...]
    findings: tuple[str, ...] = field(default=())

    @property
    def passed(self) -> bool:
        """Whether the candidate may be champion."""
        return not self.reasons


def judge(
    candidate: Evaluation | None, champion: Evaluation | None, rules: Rules, *, first: bool, threat: str | None = None
) -> Verdict:
    """The verdict on a candidate.

    Args:
        candidate, champion: in the form of evaluation.json; None if never evaluated.
        first: there is no champion yet: the candidate is judged by itself.
        threat: the threat model that the registered model is for, as `size_in` writes it.
    """
    if candidate is None:
        return Verdict(("it was never evaluated; evaluate it, and publish it with --evaluation",))
    if broken := _broken(candidate):
        return Verdict((broken,))
    reasons, findings = _alone(candidate, rules, threat)
    if not first:
        more_reasons, more_findings = _against(candidate, champion, rules)
        reasons, findings = reasons + more_reasons, findings + more_findings
    return Verdict(tuple(reasons), tuple(findings))


def _broken(evaluation: Evaluation) -> str | None:
    try:
        check_accuracies(evaluation, "its evaluation")
    except UserError as error:
        return str(error)
    return None


def _alone(candidate: Evaluation, rules: Rules, threat: str | None) -> tuple[list[str], list[str]]:
    """(reasons, findings) of the candidate by itself."""
    reasons = []
    attacks, norm, eps = candidate["attacks"], candidate["norm"], candidate["eps"]
    size = size_in(norm, eps)
    if "clean" not in attacks:
        reasons.append("its clean accuracy was not measured; evaluate with --attacks clean,...")
    elif attacks["clean"]["accuracy"] < rules.clean_floor:
        reasons.append(f"its clean accuracy is {_percent(attacks['clean'])}, the floor is {rules.clean_floor:.2%}")
    if not attacks.keys() - {"clean"}:
        reasons.append("it was not attacked; evaluate with --attacks clean,pgd20 or more")
    if threat is not None and size != threat:
        reasons.append(f"it was attacked at {size}, the model is for {threat}")
    if not candidate.get("checks"):
        reasons.append("gradient masking was not checked; evaluate with evaluation.gradient_masking_samples=50")
    reasons += [f"a check warned: {line}" for line in candidate["warnings"]]
    worst = {key.attack: score for key, score in worst_scores(candidate).items() if key[:2] == (norm, float(eps))}
    return reasons, [f"{attack}: {_percent(score)}" for attack, score in (attacks | worst).items()]


def _percent(score: Score) -> str:
    return f"{score['accuracy']:.2%} ({100 * score['low']:.1f} to {100 * score['high']:.1f})"


def _against(candidate: Evaluation, champion: Evaluation | None, rules: Rules) -> tuple[list[str], list[str]]:
    """(reasons, findings) of the candidate beside the champion."""
    if champion is None:
        return ["the champion was never evaluated; evaluate it, and publish it with --evaluation"], []
    if broken := _broken(champion):
        return [f"the champion's figures are damaged: {broken}"], []
    if differing := _differences(candidate, champion):
        return [f"the evaluations are not comparable: {line}" for line in differing], []
    reasons = []
    findings = [f"the champion's own check warned: {line}" for line in champion["warnings"]]
    try:
        match = match_classes(
            champion.get("classes") or (), candidate.get("classes") or (), model_is="the champion", data_is="it"
        )
    except UserError as error:
        return [f"its outputs are not the champion's: {error}"], []
    if match.note and match.outputs is None:
        findings.append(f"classes: {match.note}")
    elif match.outputs is not None:
        return [
            "its outputs are the champion's classes in another order; whoever reads the scores takes them wrongly"
        ], []
    judged = [*candidate["attacks"], *([WORST_CASE] if len(candidate["attacks"]) > 2 else [])]
    for row in compare(champion, candidate)["rows"]:
        if row["eps"] not in (0.0, champion["eps"]) or row["norm"] != champion["norm"] or row["attack"] not in judged:
            continue  # of one attack alone the worst case is that attack
        interval = f"{100 * row['low']:+.2f} to {100 * row['high']:+.2f}"
        shown = f"{row['attack']}: {100 * row['difference']:+.2f} points to the champion (paired 95 %: {interval})"
        findings.append(shown)
        if row["attack"] == "clean" or row["low"] >= -rules.margin - 1e-12:
            continue
        margin = f"{100 * rules.margin:g} point{'' if rules.margin == 0.01 else 's'}"
        if row["high"] < -rules.margin:
            reasons.append(f"{shown}: it is less robust by more than {margin}")
        else:
            reasons.append(f"{shown}: a loss of more than {margin} is not excluded; evaluate on more images")
    return reasons, findings


def _differences(candidate: Evaluation, champion: Evaluation) -> list[str]:
    """All that makes two evaluations incomparable."""
    lines = []
    if candidate["attacks"].keys() != champion["attacks"].keys():
        lines.append(f"attacks {', '.join(candidate['attacks'])}, the champion's {', '.join(champion['attacks'])}")
    for key, shown in _SHOWN.items():
        if candidate.get(key) != champion.get(key):
            lines.append(f"{shown} {candidate.get(key)}, the champion's {champion.get(key)}")
    if candidate["eps"] != champion["eps"]:
        mine, theirs = (size_in(evaluation["norm"], evaluation["eps"]) for evaluation in (candidate, champion))
        lines.append(f"{mine}, the champion's {theirs}")
    if len(candidate["ids"]) != len(champion["ids"]):
        lines.append(f"n = {len(candidate['ids'])}, the champion's {len(champion['ids'])}")
    elif set(candidate["ids"]) != set(champion["ids"]):
        common = len(set(candidate["ids"]) & set(champion["ids"]))
        lines.append(f"other images: of {len(candidate['ids'])} ids {common} are the champion's")
    return lines
