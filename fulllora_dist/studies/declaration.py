"""What a study declared, and whether it did so before its results were known."""

from collections.abc import Collection, Mapping
from typing import Any

from fulllora_dist.studies.content import folder_key
from fulllora_dist.studies.plan import HELD_OUT, Study
from fulllora_dist.studies.results import Results, Verdicts
from fulllora_dist.studies.settings import ComparisonSettings


def declared(study: Study) -> dict[str, Any]:
    """What a study is to declare before its evaluations, JSON-able, without what is at its default.

    Returns:
        `arms`, {name: {try: its content's hash}}; `seeds`; and as in the file `choose`, `evaluations`, `comparisons`.
        Where held-out images are does not count.
    """
    settings = study.settings.model_dump(mode="json", exclude_defaults=True)
    arms = {
        arm: {" ".join(f"{key}={value}" for key, value in run.values.items()): folder_key(run.config) for run in tries}
        for arm, tries in study.tries.items()
    }
    choose = {key: value for key, value in settings["choose"].items() if key != "data"}
    return {"arms": arms, "choose": choose} | {
        key: settings.get(key, []) for key in ("seeds", "evaluations", "comparisons")
    }


def known_before(
    comparison: ComparisonSettings,
    name: str,
    declaration: Mapping[str, Any],
    results: Results,
    compared: Collection[Verdicts],
) -> list[str]:
    """The results that were there when the comparison, or what it depends on, was not yet as it is declared now.

    Args:
        name: of the study.
        declaration: what the study declares now.
        results: of these the study's seeds count.
        compared: the verdicts that are compared, which count whichever study made them.
    """
    now = _design(declaration, comparison)

    def counts(part: Verdicts) -> bool:
        own = part["study"] == name and part["images"] != HELD_OUT
        return own or any(part is other for other in compared)

    return [
        result["name"]
        for result in results.all()
        if any(counts(part) and _design(part["declared"], comparison) != now for part in result["evaluations"])
    ]


def _design(declaration: Mapping[str, Any], comparison: ComparisonSettings) -> list[Any]:
    """What of a declaration a comparison depends on."""
    wanted = comparison.model_dump(mode="json", exclude_defaults=True, exclude={"power"})
    pairs = [{key: value for key, value in other.items() if key != "power"} for other in declaration["comparisons"]]
    arms = [declaration["arms"].get(name) for name in (comparison.arm, comparison.against)]
    evaluations = [part for part in declaration["evaluations"] if comparison.attack in part["attacks"]]
    return [wanted in pairs, arms, evaluations, declaration["seeds"], declaration["choose"]]
