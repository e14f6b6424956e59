"""An adapter becomes a version of a registered model, once, however often that is tried and wherever it was cut short.

MLflow's `register_model` makes another version at each call. Here an adapter is known by its sha256:

1. A LoggedModel with that tag is made, or found again (PENDING where an attempt was killed in the midst of uploading).
2. Its files are uploaded, then it is READY.
3. A version is made of it, with all its tags in the same call, unless there is one with that sha256.
4. Where two attempts ran at once and made two versions, the lowest one without an alias in the way stays.

An evaluation of a version that is there already is uploaded under the name of its own sha256, and becomes the
version's by a tag: nothing is overwritten.
"""

import hashlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fulllora_dist.attacks.threat import size_in
from fulllora_dist.core.errors import UserError
from fulllora_dist.evaluation.report import EvaluationReport, check_accuracies
from fulllora_dist.models.adapter_file import read_adapter
from fulllora_dist.registry.card import model_card
from fulllora_dist.registry.flavor import CARD, save_model
from fulllora_dist.registry.mlflow_client import StoreError
from fulllora_dist.registry.registry import (
    ACCURACY,
    ADAPTER_KIND,
    EVALUATION,
    EVALUATIONS,
    KIND,
    SHA256,
    Registry,
    Version,
    content_of,
    evaluation_file,
    model_name,
    threat_of,
)
from fulllora_dist.registry.version_tags import EVALUATION_DATA, MOST, Lineage, metadata, scores

CONFIG = "config.yaml"
_LOGGED_NAME = "adapter"
_NOT_ALWAYS_KNOWN = ("classes_sha256", "data")
_SAME_DATA = ", or give --data where it is the same under another name"


def publish(
    registry: Registry,
    folder: str,
    *,
    evaluation: EvaluationReport | None = None,
    name: str | None = None,
    data: str | None = None,
    lineage: Lineage | None = None,
    keep: bool = False,
) -> Version:
    """The version of the adapter in `folder`, made where there is none. Safe to repeat.

    Args:
        folder: what `save_adapter` wrote.
        evaluation: in the form of evaluation.json; becomes the version's own.
        name: of the registered model, instead of `model_name`.
        data: name of the data set, where the adapter does not tell.
        keep: an evaluation that the version has already stays.

    Raises:
        UserError: a damaged adapter, an evaluation of another one or with figures that are none, a registered model of
            another backbone, data or threat model; the store fails.
    """
    lineage = lineage or Lineage()
    description, _ = read_adapter(folder)
    if evaluation is not None:
        _check_evaluation(evaluation, description)
    name = name or model_name(description, data, evaluation)
    _register_model(registry, name, description, data, evaluation)
    version = _existing(registry, name, description["sha256"])
    if version is None:
        model_id = _logged_model(registry, folder, description, evaluation, name, lineage)
        tags = metadata(description, lineage) | scores(evaluation)
        card = model_card(description, evaluation, name)[:MOST]
        registry.store.create_model_version(
            name, f"models:/{model_id}", lineage.run_id, tags=tags, description=card, model_id=model_id
        )
        version = _existing(registry, name, description["sha256"])
        assert version is not None
    if evaluation is not None and not (keep and EVALUATION in version.tags):
        version = _evaluated(registry, version, description, evaluation)
    return version


def _check_evaluation(evaluation: EvaluationReport, description: Mapping[str, Any]) -> None:
    check_accuracies(evaluation, "evaluation.json")
    if evaluation.get("backbone") not in (None, description["backbone"]["name"]):
        raise UserError(
            f"evaluation.json is of the backbone {evaluation['backbone']}, the adapter's is "
            f"{description['backbone']['name']}; give its own evaluation"
        )
    sha256 = evaluation.get("adapter_sha256")
    if sha256 not in (None, description["sha256"]):
        raise UserError(
            f"evaluation.json is of the adapter {str(sha256)[:12]}, this one is {description['sha256'][:12]}; "
            "give its own evaluation"
        )


def _register_model(
    registry: Registry,
    name: str,
    description: Mapping[str, Any],
    data: str | None,
    evaluation: Mapping[str, Any] | None,
) -> None:
    """The registered model, made where there is none.

    Raises:
        UserError: it is of another backbone, data or threat model.
    """
    backbone, training = description["backbone"], description["training"]
    threat = threat_of(description, evaluation)
    classes = training.get("data", {}).get("classes")
    identity = {
        KIND: ADAPTER_KIND,
        "backbone_sha256": backbone["sha256"],
        "threat": size_in(threat["norm"], threat["eps"]),
        "outputs": str(backbone["num_classes"]),
        **({} if classes is None else {"classes_sha256": hashlib.sha256("\n".join(classes).encode()).hexdigest()}),
    }
    trained_on = data or training.get("data", {}).get("name")
    if trained_on is not None:
        identity["data"] = trained_on
    try:
        registry.store.create_registered_model(name, tags=identity | {"backbone": backbone["name"]})
        return
    except StoreError as error:
        if error.code != "RESOURCE_ALREADY_EXISTS":
            raise
    found = registry.model(name).tags
    for key, value in identity.items():
        if found.get(key, value if key in _NOT_ALWAYS_KNOWN else None) != value:
            raise UserError(
                f"the registered model {name} is of another {key.removesuffix('_sha256')} "
                f"({str(found.get(key))[:40]}, the adapter's is {value[:40]}); choose another name "
                f"(tracking.registered_model_name, --name){_SAME_DATA if key == 'data' else ''}"
            )


def _existing(registry: Registry, name: str, sha256: str) -> Version | None:
    """The version of an adapter. Where several attempts at once made some, all of them keep the same one."""
    same = [version for version in registry.versions(name) if version.tags.get(SHA256) == sha256]
    if not same:
        return None
    kept = min(same, key=lambda version: (not version.aliases, version.number))
    for version in same:
        if version != kept and not version.aliases:
            try:
                registry.store.delete_model_version(name, str(version.number))
                if version.source != kept.source:
                    registry.store.delete_logged_model(version.source.removeprefix("models:/"))
            except StoreError as error:
                if error.code != "RESOURCE_DOES_NOT_EXIST":  # another attempt has deleted it
                    raise
    return kept


def _logged_model(
    registry: Registry,
    folder: str,
    description: Mapping[str, Any],
    evaluation: Mapping[str, Any] | None,
    name: str,
    lineage: Lineage,
) -> str:
    """Id of the LoggedModel with the adapter's files, whole and READY."""
    store, sha256 = registry.store, description["sha256"]
    if lineage.run_id is None:
        experiment = store.experiment_id(lineage.experiment)
    else:
        experiment = store.get_run(lineage.run_id).info.experiment_id
    found = store.search_logged_models([experiment], filter_string=f"tags.{SHA256} = '{sha256}'")
    ready = [model for model in found if str(model.status) == "READY"]
    if ready:
        model_id = min(ready, key=lambda model: model.creation_timestamp).model_id
        if evaluation is not None:  # the attempt that uploaded the rest may have had another one
            _upload(registry, model_id, evaluation)
        return model_id
    logged = found[0] if found else _create_logged_model(registry, experiment, description, lineage)
    _link(registry, logged.model_id, description, lineage)
    from mlflow.models import Model

    with tempfile.TemporaryDirectory() as temporary:
        path = f"{temporary}/model"
        model = Model(model_uuid=logged.model_id, run_id=lineage.run_id, model_id=logged.model_id)
        save_model(folder, path, evaluation=evaluation, name=name, mlflow_model=model)
        if lineage.config is not None:
            Path(path, CONFIG).write_text(lineage.config)
        if evaluation is not None:
            _write_evaluation(evaluation, path)
        store.log_model_artifacts(logged.model_id, path)
    store.finalize_logged_model(logged.model_id, "READY")
    return logged.model_id


def _create_logged_model(registry: Registry, experiment: str, description: Mapping[str, Any], lineage: Lineage) -> Any:
    spec = {key: str(value) for key, value in description["adapter"].items()}
    return registry.store.create_logged_model(
        experiment, _LOGGED_NAME, lineage.run_id, tags=metadata(description, lineage), params=spec
    )


def _link(registry: Registry, model_id: str, description: Mapping[str, Any], lineage: Lineage) -> None:
    """Make the model an output of its run, where no attempt before has."""
    from mlflow.entities import LoggedModelOutput

    if lineage.run_id is None:
        return
    outputs = registry.store.get_run(lineage.run_id).outputs
    if outputs is None or model_id not in [output.model_id for output in outputs.model_outputs]:
        step = description["training"].get("batches", 0)
        registry.store.log_outputs(lineage.run_id, [LoggedModelOutput(model_id, step)])


def _write_evaluation(evaluation: Mapping[str, Any], folder: str) -> None:
    """The evaluation among the files of a model."""
    content = content_of(evaluation)
    Path(folder, EVALUATIONS).mkdir(exist_ok=True)
    Path(folder, evaluation_file(hashlib.sha256(content).hexdigest())).write_bytes(content)


def _upload(registry: Registry, model_id: str, evaluation: Mapping[str, Any], card: str | None = None) -> None:
    """Add an evaluation to the files of a LoggedModel, and put the card in place of its own."""
    with tempfile.TemporaryDirectory() as folder:
        _write_evaluation(evaluation, folder)
        if card is not None:
            Path(folder, CARD).write_text(card)
        registry.store.log_model_artifacts(model_id, folder)


def _evaluated(
    registry: Registry, version: Version, description: Mapping[str, Any], evaluation: Mapping[str, Any]
) -> Version:
    """Make an evaluation the version's own. The tag with its sha256 goes last: it is what the others stand for."""
    tags = scores(evaluation)
    if version.tags.get(EVALUATION) == tags[EVALUATION]:
        return version
    store, name, number = registry.store, version.name, str(version.number)
    card = model_card(description, evaluation, name)
    _upload(registry, version.source.removeprefix("models:/"), evaluation, card)
    store.update_model_version(name, number, card[:MOST])
    for key in version.tags.keys() - tags.keys():
        if key.startswith(ACCURACY) or key == EVALUATION_DATA:
            store.delete_model_version_tag(name, number, key)
    for key, value in sorted(tags.items(), key=lambda tag: tag[0] == EVALUATION):
        store.set_model_version_tag(name, number, key, value)
    return registry.find(version.address)
