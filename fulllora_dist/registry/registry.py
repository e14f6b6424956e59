"""Adapters in MLflow's model registry: what is there, and getting it out.

A registered model is of one backbone, one data set and one threat model, and its versions are adapters, each once
(`publish.py`). `@champion` is moved by `champion.py` alone.
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from fulllora_dist.core.errors import UserError
from fulllora_dist.evaluation.report import EvaluationReport, parse_evaluation
from fulllora_dist.models.adapter_file import read_adapter
from fulllora_dist.registry.mlflow_client import Store, StoreError
from fulllora_dist.tracking.mlflow_run import allowed_name

CHAMPION, PREVIOUS = "champion", "previous"
SHA256 = "adapter_sha256"
EVALUATION = "evaluation_sha256"
ACCURACY = "accuracy."  # and an attack: a tag of "accuracy low high"
EVALUATIONS = "evaluations"  # folder of a version's artifacts
KIND = "kind"
ADAPTER_KIND = "fulllora_dist adapter"
_SPLITS = {"train", "training", "val", "validation", "test", "shards"}


@dataclass(frozen=True)
class Version:
    """A version of a registered model.

    Attributes:
        name, number: of the model, of the version.
        aliases: that point to it.
        tags: what is known of it, by name.
        run_id: of the MLflow run that made it.
        source: address of its artifacts, "models:/m-ID".
        created: milliseconds since 1970.
    """

    name: str
    number: int
    aliases: tuple[str, ...] = ()
    tags: Mapping[str, str] = field(default_factory=dict)
    run_id: str | None = None
    source: str = ""
    created: int = 0

    @property
    def address(self) -> str:
        """What `fulllora_dist.load` takes."""
        return f"models:/{self.name}/{self.number}"

    @property
    def accuracies(self) -> dict[str, tuple[float, ...]]:
        """(accuracy, low, high) of its evaluation, by the attack."""
        attacks = self.tags["attacks"].split(",") if "attacks" in self.tags else []
        found = {attack: self.tags.get(accuracy_tag(attack)) for attack in attacks}
        return {attack: tuple(map(float, text.split())) for attack, text in found.items() if text is not None}


def model_name(description: Mapping[str, Any], data: str | None = None, threat: Mapping[str, Any] | None = None) -> str:
    """The registered model that an adapter belongs to: BACKBONE-DATA-NORM-EPS, e.g.
    vit_tiny_patch16_224.augreg_in21k_ft_in1k-imagenette-linf-4_255. A backbone whose weights have no name of their own
    carries the beginning of their sha256.

    Args:
        description: of the adapter, as `read_adapter` gives it.
        data: name of the data set, where the adapter does not tell.
        threat: {"norm", "eps"}, where the adapter does not tell.

    Raises:
        UserError: a part is known neither from the adapter nor from the caller.
    """
    backbone, training = description["backbone"], description["training"]
    data = data or training.get("data", {}).get("name")
    if data is None:
        raise UserError("the adapter does not say which data it was trained on; give --data NAME, or --name")
    eps = threat_of(description, threat)
    size = f"{eps['eps'] * 255:.4g}_255" if eps["norm"] == "linf" else f"{eps['eps']:.4g}"
    base = backbone["name"] if "." in backbone["name"] else f"{backbone['name']}_{backbone['sha256'][:8]}"
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", f"{base}-{data}-{eps['norm']}-{size}")


def threat_of(description: Mapping[str, Any], otherwise: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
    """{"norm", "eps"} that an adapter was trained against."""
    found = description["training"].get("threat") or otherwise
    if found is None:
        raise UserError("the adapter does not say which threat model it was trained against; give its evaluation.json")
    return found


def data_name(where: str) -> str:
    """Name of a data set by its folder or URL: s3://bucket/imagenet/train -> imagenet."""
    url = urlsplit(where) if "://" in where else None
    if url is None:
        path = os.path.abspath(where)
    else:  # without a query, which may be a signature; a bucket may be a name, a web server's address is none
        path = url.path if url.scheme.lower() in ("http", "https") else f"{url.netloc}/{url.path}"
    parts = [part for part in PurePosixPath(path).parts if part != "/"]
    named = [part for part in parts if part.lower() not in _SPLITS and not part.endswith(".safetensors")]
    return named[-1] if named else "data"


class Registry:
    """The registry of one MLflow store.

    Args:
        uri: tracking URI; None takes MLflow's own (MLFLOW_TRACKING_URI, or what was set).
        create: whether a sqlite file that is not there is made.

    Attributes:
        store: for what is not of adapters alone.
    """

    def __init__(self, uri: str | None = None, create: bool = False):
        self.store = Store(uri, create)

    def names(self) -> list[str]:
        """Registered models of adapters."""
        names, token = [], None
        while True:
            page = self.store.search_registered_models(max_results=100, page_token=token)
            names += [model.name for model in page if model.tags.get(KIND) == ADAPTER_KIND]
            token = page.token
            if not token:
                return sorted(names)

    def model(self, name: str) -> Any:
        """MLflow's registered model.

        Raises:
            UserError: there is none of that name; says which there are.
        """
        try:
            return self.store.get_registered_model(name)
        except StoreError as error:
            if error.code != "RESOURCE_DOES_NOT_EXIST":
                raise
            known = ", ".join(self.names()) or "none"
            raise UserError(f"there is no registered model {name}; there are: {known}") from None

    def versions(self, name: str) -> list[Version]:
        """Its versions, the oldest first."""
        aliases = self.aliases(name)
        found, token = [], None
        while True:
            page = self.store.search_model_versions(f"name = '{name}'", max_results=100, page_token=token)
            found += [_version(entity, aliases) for entity in page if entity.status == "READY"]
            token = page.token
            if not token:
                return sorted(found, key=lambda version: version.number)

    def aliases(self, name: str) -> dict[str, int]:
        """{alias: version number}."""
        return {alias: int(number) for alias, number in self.model(name).aliases.items()}

    def find(self, reference: str) -> Version:
        """The version of NAME@ALIAS, NAME/NUMBER, or either behind models:/.

        Raises:
            UserError: there is none; says which aliases and versions there are.
        """
        match = re.fullmatch(r"(?:models:/)?([^/@:]+)(?:@([^/@]+)|/(\d+))", reference)
        if match is None:
            raise UserError(f"{reference!r} is no version; write NAME@champion or NAME/3")
        name, alias, number = match.groups()
        aliases = self.aliases(name)
        if alias is not None and alias not in aliases:
            known = ", ".join(f"@{other} ({version})" for other, version in sorted(aliases.items())) or "no alias"
            raise UserError(f"{name} has no alias {alias}; it has {known}{self._numbers(name)}")
        wanted = aliases[alias] if alias is not None else int(number)
        try:
            return _version(self.store.get_model_version(name, str(wanted)), aliases)
        except StoreError as error:
            if error.code != "RESOURCE_DOES_NOT_EXIST":
                raise
            raise UserError(
                f"{name} has no version {wanted}; it has {self._numbers(name).removeprefix(', ')}"
            ) from None

    def _numbers(self, name: str) -> str:
        numbers = [version.number for version in self.versions(name)]
        return f", versions {', '.join(map(str, numbers))}" if numbers else ", no version"

    def resolved(self, address: str) -> str:
        """An address of MLflow without an alias, which may move: models:/NAME@champion -> models:/NAME/3."""
        return self.find(address).address if address.startswith("models:") and "@" in address else address

    def fetch(self, address: str, folder: str) -> str:
        """Download an adapter; returns its folder, in `folder`.

        Args:
            address: models:/NAME@ALIAS, models:/NAME/NUMBER, models:/m-ID, or runs:/ID/PATH.

        Raises:
            UserError: there is none, or it is damaged, or is not the adapter that was published.
        """
        logged = re.fullmatch(r"models:/(m-[0-9a-f]+)", address)
        if address.startswith("runs:"):
            return self.store.download(address, folder)
        if logged:
            return self.store.download(self.store.get_logged_model(logged[1]).artifact_location, folder)
        version = self.find(address)
        found = self.store.download(self._location(version), folder)
        try:
            description, _ = read_adapter(found)
        except UserError as error:
            raise UserError(str(error).replace(found, address)) from error
        if description["sha256"] != version.tags.get(SHA256, description["sha256"]):
            raise UserError(f"adapter: {address} is not the one that was published: its sha256 differs from its tag")
        return found

    def check(self, version: Version) -> None:
        """UserError where its adapter cannot be fetched whole."""
        with tempfile.TemporaryDirectory() as folder:
            self.fetch(version.address, folder)

    def evaluation(self, version: Version) -> EvaluationReport | None:
        """Its evaluation.json; None where it was never evaluated.

        Raises:
            UserError: it is damaged.
        """
        digest = version.tags.get(EVALUATION)
        if digest is None:
            return None
        with tempfile.TemporaryDirectory() as folder:
            file = self.store.download(f"{self._location(version)}/{evaluation_file(digest)}", folder)
            content = Path(file).read_bytes()
        where = f"{version.address}: {evaluation_file(digest)}"
        if hashlib.sha256(content).hexdigest() != digest:
            raise UserError(f"{where} is damaged: its sha256 is not that of the version's tag")
        return parse_evaluation(content, where)

    def _location(self, version: Version) -> str:
        return self.store.get_model_version_download_uri(version.name, str(version.number))


def accuracy_tag(attack: str) -> str:
    """Name of the tag with an attack's accuracy: MLflow takes no + in it (apgd-ce+square)."""
    return ACCURACY + allowed_name(attack)


def evaluation_file(digest: str) -> str:
    """Path among a version's artifacts of the evaluation.json with that sha256."""
    return f"{EVALUATIONS}/{digest[:16]}.json"


def content_of(evaluation: Mapping[str, Any]) -> bytes:
    """The bytes of evaluation.json, as a version keeps them."""
    return json.dumps(evaluation, sort_keys=True).encode()


def _version(entity: Any, aliases: Mapping[str, int]) -> Version:
    number = int(entity.version)
    own = tuple(sorted(alias for alias, of in aliases.items() if of == number))
    return Version(entity.name, number, own, dict(entity.tags), entity.run_id, entity.source, entity.creation_timestamp)
