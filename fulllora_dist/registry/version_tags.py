"""What the tags of a version say: what the adapter is, where it comes from, what its evaluation found."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fulllora_dist.attacks.threat import size_in
from fulllora_dist.registry.mlflow_client import Store
from fulllora_dist.registry.registry import EVALUATION, SHA256, accuracy_tag, content_of

EVALUATION_DATA = "evaluation_data"
MOST = 5000  # characters that MLflow keeps of a tag's value or a description


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
    def of_run(cls, store: Store, run_id: str, config: str | None, experiment: str = "adapters") -> "Lineage":
        """Of a run in the store, with the commit that trained, which may not be the one that is checked out now."""
        return cls(run_id, config, store.get_run(run_id).data.tags.get("git_commit"), experiment)


def metadata(description: Mapping[str, Any], lineage: Lineage) -> dict[str, str]:
    """Tags: what it is and where it comes from."""
    backbone, training, spec = description["backbone"], description["training"], description["adapter"]
    threat, data = training.get("threat"), training.get("data", {})
    methods = dict.fromkeys(phase["method"]["name"] for phase in training.get("made", ()))
    found = {
        SHA256: description["sha256"],
        "backbone": backbone["name"],
        "backbone_sha256": backbone["sha256"],
        "finetune": spec["finetune"],
        "rank": spec["rank"],
        "method": ", ".join(methods) or training.get("method", {}).get("name"),  # as planned, where that is all
        "threat": threat and size_in(threat["norm"], threat["eps"]),
        "data_digest": data.get("index"),
        "git_commit": lineage.git_commit,
        "config_sha256": lineage.config and hashlib.sha256(lineage.config.encode()).hexdigest(),
    }
    return {key: str(value) for key, value in found.items() if value is not None}


def scores(evaluation: Mapping[str, Any] | None) -> dict[str, str]:
    """Tags: what its evaluation found."""
    if evaluation is None:
        return {}
    attacks = evaluation["attacks"]
    ids = ",".join(map(str, evaluation["ids"]))
    found = {
        EVALUATION: hashlib.sha256(content_of(evaluation)).hexdigest(),
        "attacks": ",".join(attacks),
        "eps": f"{evaluation['eps']:.6g}",
        "norm": evaluation["norm"],
        "n": len(evaluation["ids"]),
        "precision": evaluation["precision"],
        "ids_sha256": hashlib.sha256(ids.encode()).hexdigest(),
        EVALUATION_DATA: evaluation.get("data"),
        "warnings": "; ".join(evaluation["warnings"])[:MOST] or "none",
    }
    for attack, score in attacks.items():
        found[accuracy_tag(attack)] = " ".join(f"{score[key]:.4f}" for key in ("accuracy", "low", "high"))
    return {key: str(value) for key, value in found.items() if value is not None}
