"""Adapters in MLflow's model registry: listing, looking up and downloading them.

A registered model belongs to one backbone, one data set and one threat model. Its versions are adapters, each of them
once (`publish.py`); only `champion.py` moves `@champion`.
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from fulllora_dist.core.errors import UserError
from fulllora_dist.registry.mlflow_client import Store, StoreError
from fulllora_dist.tracking.mlflow_store import allowed_name

if TYPE_CHECKING:
    from fulllora_dist.evaluation.report import EvaluationReport
    from fulllora_dist.models.adapter_description import AdapterDescription

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
        tags: see `version_tags.py`.
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
        tags = {attack: self.tags.get(accuracy_tag(attack)) for attack in self.tags.get("attacks", "").split(",")}
        return {attack: tuple(map(float, tag.split())) for attack, tag in tags.items() if tag is not None}


def model_name(description: "AdapterDescription", data: str | None, threat: tuple[str, float]) -> str:
    """The registered model that an adapter belongs to: BACKBONE-DATA-NORM-EPS, e.g.
    vit_tiny_patch16_224.augreg_in21k_ft_in1k-imagenette-linf-4_255. A backbone whose weights have no name of their own
    carries the beginning of their sha256.

    Args:
        data: name of the data set, None where it is not known.
        threat: (norm, eps).

    Raises:
        UserError: the data set is not known.
    """
    if data is None:
        raise UserError("the adapter does not record which data it was trained on; give --data NAME, or --name")
    norm, eps = threat
    size = f"{eps * 255:.4g}_255" if norm == "linf" else f"{eps:.4g}"
    backbone = description.backbone
    named = "." in backbone.name and backbone.module is None
    base = backbone.name if named else f"{backbone.name}_{str(backbone.sha256)[:8]}"
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", f"{base}-{data}-{norm}-{size}")


def data_name(location: str) -> str:
    """Name of a data set by its folder or URL: s3://bucket/imagenet/train -> imagenet."""
    url = urlsplit(location) if "://" in location else None
    if url is None:
        path = os.path.abspath(location)
    else:  # without a query, which may be a signature; a bucket may be a name, a web server's address is none
        path = url.path if url.scheme.lower() in ("http", "https") else f"{url.netloc}/{url.path}"
    parts = [part for part in PurePosixPath(path).parts if part != "/"]
    named = [part for part in parts if part.lower() not in _SPLITS and not part.endswith(".safetensors")]
    return named[-1] if named else "data"


class Registry:
    """The registry of one MLflow store.

    Args:
        uri: tracking URI; None takes MLflow's own (MLFLOW_TRACKING_URI, or what was set).
        create: create a sqlite file that does not exist.

    Attributes:
        store: the MLflow client.
    """

    def __init__(self, uri: str | None = None, create: bool = False):
        self.store = Store(uri, create)

    def names(self) -> list[str]:
        """Registered models of adapters."""
        models = _pages(self.store.search_registered_models)
        return sorted(model.name for model in models if model.tags.get(KIND) == ADAPTER_KIND)

    def model(self, name: str) -> Any:
        """MLflow's registered model.

        Raises:
            UserError: there is none of that name; the message lists those that exist.
        """
        try:
            return self.store.get_registered_model(name)
        except StoreError as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            known = ", ".join(self.names()) or "none"
            raise UserError(f"there is no registered model {name}; there are: {known}") from None

    def versions(self, name: str) -> list[Version]:
        """Its versions, the oldest first."""
        aliases = self.aliases(name)
        entities = _pages(partial(self.store.search_model_versions, f"name = '{name}'"))
        versions = [_version(entity, aliases) for entity in entities if entity.status == "READY"]
        return sorted(versions, key=lambda version: version.number)

    def aliases(self, name: str) -> dict[str, int]:
        """{alias: version number}."""
        return {alias: int(number) for alias, number in self.model(name).aliases.items()}

    def find(self, reference: str) -> Version:
        """The version of NAME@ALIAS, NAME/NUMBER, or either behind models:/.

        Raises:
            UserError: there is none; the message lists the aliases and versions that exist.
        """
        match = re.fullmatch(r"(?:models:/)?([^/@:]+)(?:@([^/@]+)|/(\d+))", reference)
        if match is None:
            raise UserError(f"{reference!r} is not a version; write NAME@champion or NAME/3")
        name, alias, number = match.groups()
        aliases = self.aliases(name)
        if alias is not None and alias not in aliases:
            known = ", ".join(f"@{other} ({version})" for other, version in sorted(aliases.items())) or "no alias"
            raise UserError(f"{name} has no alias {alias}; it has {known}, {self._numbers(name)}")
        wanted = aliases[alias] if alias is not None else int(number)
        try:
            return _version(self.store.get_model_version(name, str(wanted)), aliases)
        except StoreError as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            raise UserError(f"{name} has no version {wanted}; it has {self._numbers(name)}") from None

    def _numbers(self, name: str) -> str:
        numbers = [version.number for version in self.versions(name)]
        return f"versions {', '.join(map(str, numbers))}" if numbers else "no version"

    def fetch(self, address: str, folder: str) -> str:
        """Download an adapter; returns its folder, in `folder`.

        Args:
            address: models:/NAME@ALIAS, models:/NAME/NUMBER, models:/m-ID, or runs:/ID/PATH.

        Raises:
            UserError: there is none, it is damaged, or it is not the adapter that was published.
        """
        from fulllora_dist.models.adapter_file import read_adapter  # listing versions needs no torch

        logged = re.fullmatch(r"models:/(m-[0-9a-f]+)", address)
        if address.startswith("runs:"):
            return self.store.download(address, folder)
        if logged:
            return self.store.download(self.store.get_logged_model(logged[1]).artifact_location, folder)
        version = self.find(address)
        downloaded = self.store.download(self._location(version), folder)
        try:
            sha256 = read_adapter(downloaded)[0].sha256
        except UserError as error:
            raise UserError(str(error).replace(downloaded, address)) from error
        if sha256 != version.tags.get(SHA256, sha256):
            raise UserError(f"adapter: {address} is not the one that was published: its sha256 differs from its tag")
        return downloaded

    def check(self, version: Version) -> None:
        """Raises UserError if its adapter cannot be downloaded, or is damaged."""
        with tempfile.TemporaryDirectory() as folder:
            self.fetch(version.address, folder)

    def evaluation(self, version: Version) -> "EvaluationReport | None":
        """Its evaluation.json; None if it was never evaluated.

        Raises:
            UserError: it is damaged.
        """
        from fulllora_dist.evaluation.report import parse_evaluation  # listing versions needs no scipy

        digest = version.tags.get(EVALUATION)
        if digest is None:
            return None
        with tempfile.TemporaryDirectory() as folder:
            file = self.store.download(f"{self._location(version)}/{evaluation_file(digest)}", folder)
            content = Path(file).read_bytes()
        name = f"{version.address}: {evaluation_file(digest)}"
        if hashlib.sha256(content).hexdigest() != digest:
            raise UserError(f"{name} is damaged: its sha256 is not that of the version's tag")
        return parse_evaluation(content, name)

    def _location(self, version: Version) -> str:
        return self.store.get_model_version_download_uri(version.name, str(version.number))


def accuracy_tag(attack: str) -> str:
    """Name of the tag with an attack's accuracy; MLflow does not accept a + in it (apgd-ce+square)."""
    return ACCURACY + allowed_name(attack)


def evaluation_file(digest: str) -> str:
    """Path among a version's artifacts of the evaluation.json with that sha256."""
    return f"{EVALUATIONS}/{digest[:16]}.json"


def content_of(evaluation: Mapping[str, Any]) -> bytes:
    """The bytes of evaluation.json, as a version keeps them."""
    return json.dumps(evaluation, sort_keys=True).encode()


def _pages(search: Callable[..., Any]) -> Iterator[Any]:
    """All results of an MLflow search, page by page."""
    token = None
    while True:
        page = search(max_results=100, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _version(entity: Any, aliases: Mapping[str, int]) -> Version:
    number = int(entity.version)
    own = tuple(sorted(alias for alias, of in aliases.items() if of == number))
    return Version(entity.name, number, own, dict(entity.tags), entity.run_id, entity.source, entity.creation_timestamp)
