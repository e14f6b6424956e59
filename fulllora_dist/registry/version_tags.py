"""The tags of a version: what the adapter is, where it comes from, what its evaluation found."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fulllora_dist.core.units import size_in
from fulllora_dist.models.adapter_description import AdapterDescription
from fulllora_dist.registry.mlflow_client import Store
from fulllora_dist.registry.registry import EVALUATION, SHA256, accuracy_tag, content_of

EVALUATION_DATA = "evaluation_data"
MAX_TAG = 5000
"""Characters that MLflow keeps of a tag's value or a description."""


@dataclass(frozen=True)
class Lineage:
    """Where an adapter comes from.

    Attributes:
        run_id: of the MLflow run.
        config: YAML of its settings, without what signs a URL.
        git_commit: of the program.
        experiment: where the model is logged if there is no run.
    """

    run_id: str | None = None
    config: str | None = None
    git_commit: str | None = None
    experiment: str = "adapters"

    @classmethod
    def of_run(cls, store: Store, run_id: str | None, config: str | None, experiment: str = "adapters") -> "Lineage":
        """Of a run in the store, with the commit that trained, which may not be the one that is checked out now."""
        commit = None if run_id is None else store.get_run(run_id).data.tags.get("git_commit")
        return cls(run_id, config, commit, experiment)


def metadata_tags(description: AdapterDescription, lineage: Lineage) -> dict[str, str]:
    """What it is and where it comes from."""
    training = description.training
    methods = dict.fromkeys(phase["method"]["name"] for phase in training.get("made", ()))
    return _tags(
        {
            SHA256: description.sha256,
            "backbone": description.backbone.name,
            "backbone_sha256": description.backbone.sha256,
            "finetune": description.spec.finetune,
            "rank": description.spec.rank,
            "method": ", ".join(methods) or training.get("method", {}).get("name"),  # as planned, where that is all
            "threat": description.threat and size_in(*description.threat),
            "data_digest": description.data and description.data.index,
            "git_commit": lineage.git_commit,
            "config_sha256": lineage.config and hashlib.sha256(lineage.config.encode()).hexdigest(),
        }
    )


def evaluation_tags(evaluation: Mapping[str, Any] | None) -> dict[str, str]:
    """What its evaluation found."""
    if evaluation is None:
        return {}
    ids = ",".join(map(str, evaluation["ids"]))
    accuracies = {
        accuracy_tag(attack): " ".join(f"{score[key]:.4f}" for key in ("accuracy", "low", "high"))
        for attack, score in evaluation["attacks"].items()
    }
    return _tags(
        {
            EVALUATION: hashlib.sha256(content_of(evaluation)).hexdigest(),
            "attacks": ",".join(evaluation["attacks"]),
            "eps": f"{evaluation['eps']:.6g}",
            "norm": evaluation["norm"],
            "n": len(evaluation["ids"]),
            "precision": evaluation["precision"],
            "ids_sha256": hashlib.sha256(ids.encode()).hexdigest(),
            EVALUATION_DATA: evaluation.get("data"),
            "warnings": "; ".join(evaluation["warnings"])[:MAX_TAG] or "none",
            **accuracies,
        }
    )


def _tags(values: Mapping[str, Any]) -> dict[str, str]:
    return {key: str(value) for key, value in values.items() if value is not None}
