"""An adapter becomes a version of a registered model, once, however often it is tried or interrupted.

MLflow's `register_model` makes another version at each call. Here an adapter is known by its sha256:

1. A LoggedModel with that tag is created, or found again (PENDING where an upload was killed).
2. Its files are uploaded, then it is READY.
3. A version is created from it, with all its tags in the same call, unless there is one with that sha256.
4. Where two processes ran at once and created two versions, the lowest one without an alias in the way stays.

A new evaluation of an existing version is uploaded under the name of its own sha256, and becomes the version's by a
tag: nothing is overwritten.
"""

import hashlib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fulllora_dist.core.errors import UserError
from fulllora_dist.core.units import size_in
from fulllora_dist.evaluation.report import EvaluationReport, check_accuracies
from fulllora_dist.models.adapter_description import AdapterDescription
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
)
from fulllora_dist.registry.version_tags import EVALUATION_DATA, MAX_TAG, Lineage, evaluation_tags, metadata_tags
from fulllora_dist.tracking.settings import check_model_name

CONFIG = "config.yaml"
_LOGGED_NAME = "adapter"
_OPTIONAL_IDENTITY = ("classes_sha256", "data")
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
    """The version of the adapter in `folder`, created if there is none. Safe to repeat.

    Args:
        folder: what `save_adapter` wrote.
        evaluation: in the form of evaluation.json; becomes the version's own.
        name: of the registered model, instead of `model_name`.
        data: name of the data set, where the adapter does not record it.
        keep: an evaluation that the version has already stays.

    Raises:
        UserError: a damaged adapter; an evaluation of another adapter, or whose figures do not match its images; a
            registered model of another backbone, data set or threat model; the store fails.
    """
    description, _ = read_adapter(folder)
    if evaluation is not None:
        _check_evaluation(evaluation, description)
    threat = description.threat
    if threat is None and evaluation is not None:
        threat = evaluation["norm"], evaluation["eps"]
    if threat is None:
        raise UserError("the adapter does not record which threat model it was trained for; give its evaluation.json")
    if data is None and description.data is not None:
        data = description.data.name
    name = model_name(description, data, threat) if name is None else check_model_name(name)
    one = _Publication(registry, name, folder, description, evaluation, lineage or Lineage())
    one.register_model(data, threat)
    version = one.existing() or one.create()
    if evaluation is not None and not (keep and EVALUATION in version.tags):
        version = one.set_evaluation(version, evaluation)
    return version


def _check_evaluation(evaluation: EvaluationReport, description: AdapterDescription) -> None:
    check_accuracies(evaluation, "evaluation.json")
    if evaluation.get("backbone") not in (None, description.backbone.name):
        raise UserError(
            f"evaluation.json is of the backbone {evaluation['backbone']}, the adapter's is "
            f"{description.backbone.name}; give its own evaluation"
        )
    sha256 = evaluation.get("adapter_sha256", description.sha256)  # a report of another program may not have it
    if sha256 != description.sha256:
        of = "no adapter" if sha256 is None else f"the adapter {str(sha256)[:12]}"
        raise UserError(f"evaluation.json is of {of}, this one is {description.sha256[:12]}; give its own evaluation")


@dataclass(frozen=True)
class _Publication:
    """One adapter on its way to a registered model."""

    registry: Registry
    name: str
    folder: str
    description: AdapterDescription
    evaluation: Mapping[str, Any] | None
    lineage: Lineage

    def register_model(self, data: str | None, threat: tuple[str, float]) -> None:
        """The registered model, created if it does not exist.

        Raises:
            UserError: it is of another backbone, data set or threat model.
        """
        backbone, recorded = self.description.backbone, self.description.data
        identity = {
            KIND: ADAPTER_KIND,
            "backbone_sha256": str(backbone.sha256),
            "threat": size_in(*threat),
            "outputs": str(backbone.num_classes),
        }
        if recorded is not None and recorded.classes:
            identity["classes_sha256"] = hashlib.sha256("\n".join(recorded.classes).encode()).hexdigest()
        if data is not None:
            identity["data"] = data
        try:
            self.registry.store.create_registered_model(self.name, tags=identity | {"backbone": backbone.name})
            return
        except StoreError as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        tags = self.registry.model(self.name).tags
        for key, value in identity.items():
            if tags.get(key, value if key in _OPTIONAL_IDENTITY else None) != value:
                raise UserError(
                    f"the registered model {self.name} is of another {key.removesuffix('_sha256')} "
                    f"({str(tags.get(key))[:40]}, the adapter's is {value[:40]}); choose another name "
                    f"(tracking.registered_model_name, --name){_SAME_DATA if key == 'data' else ''}"
                )

    def existing(self) -> Version | None:
        """The adapter's version. Where several processes at once created some, all of them keep the same one."""
        versions = self.registry.versions(self.name)
        same = [version for version in versions if version.tags.get(SHA256) == self.description.sha256]
        if not same:
            return None
        kept = min(same, key=lambda version: (not version.aliases, version.number))
        for version in same:
            if version != kept and not version.aliases:
                try:
                    self.registry.store.delete_model_version(self.name, str(version.number))
                    if version.source != kept.source:
                        self.registry.store.delete_logged_model(version.source.removeprefix("models:/"))
                except StoreError as error:
                    if error.error_code != "RESOURCE_DOES_NOT_EXIST":  # another process has deleted it
                        raise
        return kept

    def create(self) -> Version:
        """A version, with all its tags."""
        model_id = self._logged_model()
        tags = metadata_tags(self.description, self.lineage) | evaluation_tags(self.evaluation)
        card = model_card(self.description, self.evaluation, self.name)[:MAX_TAG]
        self.registry.store.create_model_version(
            self.name, f"models:/{model_id}", self.lineage.run_id, tags=tags, description=card, model_id=model_id
        )
        version = self.existing()
        assert version is not None
        return version

    def _logged_model(self) -> str:
        """Id of the LoggedModel with the adapter's files, whole and READY."""
        store, run_id, evaluation = self.registry.store, self.lineage.run_id, self.evaluation
        if run_id is None:
            experiment = store.experiment_id(self.lineage.experiment)
        else:
            experiment = store.get_run(run_id).info.experiment_id
        logged = store.search_logged_models([experiment], filter_string=f"tags.{SHA256} = '{self.description.sha256}'")
        ready = [model for model in logged if str(model.status) == "READY"]
        if ready:
            model_id = min(ready, key=lambda model: model.creation_timestamp).model_id
            if evaluation is not None:  # whoever uploaded the rest may have had another one
                self._upload(model_id, evaluation)
            return model_id
        model_id = (logged[0] if logged else self._create_logged_model(experiment)).model_id
        self._link(model_id)
        from mlflow.models import Model

        with tempfile.TemporaryDirectory() as temporary:
            path = f"{temporary}/model"
            model = Model(model_uuid=model_id, run_id=run_id, model_id=model_id)
            save_model(self.folder, path, evaluation=evaluation, name=self.name, mlflow_model=model)
            if self.lineage.config is not None:
                Path(path, CONFIG).write_text(self.lineage.config)
            if evaluation is not None:
                _write_evaluation(evaluation, path)
            store.log_model_artifacts(model_id, path)
        store.finalize_logged_model(model_id, "READY")
        return model_id

    def _create_logged_model(self, experiment: str) -> Any:
        spec = {key: str(value) for key, value in vars(self.description.spec).items()}
        tags = metadata_tags(self.description, self.lineage)
        return self.registry.store.create_logged_model(
            experiment, _LOGGED_NAME, self.lineage.run_id, tags=tags, params=spec
        )

    def _link(self, model_id: str) -> None:
        """Make the model an output of its run, unless it is one already."""
        from mlflow.entities import LoggedModelOutput

        store, run_id = self.registry.store, self.lineage.run_id
        if run_id is None:
            return
        outputs = store.get_run(run_id).outputs
        if outputs is None or model_id not in [output.model_id for output in outputs.model_outputs]:
            step = self.description.training.get("batches", 0)
            store.log_outputs(run_id, [LoggedModelOutput(model_id, step)])

    def _upload(self, model_id: str, evaluation: Mapping[str, Any], card: str | None = None) -> None:
        """Add an evaluation to the files of a LoggedModel, and replace its card."""
        with tempfile.TemporaryDirectory() as folder:
            _write_evaluation(evaluation, folder)
            if card is not None:
                Path(folder, CARD).write_text(card)
            self.registry.store.log_model_artifacts(model_id, folder)

    def set_evaluation(self, version: Version, evaluation: Mapping[str, Any]) -> Version:
        """Make an evaluation the version's own. The tag with its sha256 goes last: it vouches for the others."""
        tags = evaluation_tags(evaluation)
        if version.tags.get(EVALUATION) == tags[EVALUATION]:
            return version
        store, number = self.registry.store, str(version.number)
        card = model_card(self.description, evaluation, self.name)
        self._upload(version.source.removeprefix("models:/"), evaluation, card)
        store.update_model_version(self.name, number, card[:MAX_TAG])
        for key in version.tags.keys() - tags.keys():
            if key.startswith(ACCURACY) or key == EVALUATION_DATA:
                store.delete_model_version_tag(self.name, number, key)
        for key, value in sorted(tags.items(), key=lambda tag: tag[0] == EVALUATION):
            store.set_model_version_tag(self.name, number, key, value)
        return self.registry.find(version.address)


def _write_evaluation(evaluation: Mapping[str, Any], folder: str) -> None:
    """The evaluation among the files of a model."""
    content = content_of(evaluation)
    Path(folder, EVALUATIONS).mkdir(exist_ok=True)
    Path(folder, evaluation_file(hashlib.sha256(content).hexdigest())).write_bytes(content)
