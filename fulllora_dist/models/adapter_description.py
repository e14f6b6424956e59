"""The typed content of adapter.json, for loading, the registry and the commands."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fulllora_dist.models.adapted_model import AdapterSpec
from fulllora_dist.models.backbone import BackboneInfo


def backbone_content(info: BackboneInfo) -> dict[str, Any]:
    """The section `backbone`, without what few backbones have: readers refuse keys that they do not know."""
    rare = ("checkpoint_key", "head_sha256")
    return {key: value for key, value in asdict(info).items() if value is not None or key not in rare}


@dataclass(frozen=True)
class TrainingData:
    """The data that an adapter was trained on; values that were not recorded are None or empty.

    Attributes:
        name: name of the data set.
        index: fingerprint of the index of its shards.
        classes: names of the classes, in label order.
        augment: training augmentation.
        crop_pct, interpolation: the evaluation crop, if it differs from the backbone's own.
    """

    name: str | None = None
    index: str | None = None
    classes: tuple[str, ...] = ()
    augment: str | None = None
    crop_pct: float | None = None
    interpolation: str | None = None


@dataclass(frozen=True)
class AdapterDescription:
    """The content of an adapter.json.

    Attributes:
        backbone: the backbone that it belongs to.
        spec: how the backbone is adapted.
        sha256: checksum of adapter.safetensors.
        trainable, trainable_share: number of trained parameters, and their fraction of the model's.
        training: how it was trained, as passed to `save_adapter`; may be empty.
        content: the whole file.
    """

    backbone: BackboneInfo
    spec: AdapterSpec
    sha256: str
    trainable: int
    trainable_share: float
    training: Mapping[str, Any]
    content: Mapping[str, Any]

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> "AdapterDescription":
        """Parse the content of an adapter.json.

        Raises:
            KeyError, TypeError: a field is missing or unknown.
        """
        return cls(
            BackboneInfo(**content["backbone"]),
            AdapterSpec(**content["adapter"]),
            content["sha256"],
            content["trainable"],
            content["trainable_share"],
            content["training"],
            content,
        )

    @property
    def threat(self) -> tuple[str, float] | None:
        """(norm, eps) that it was trained with; None if not recorded."""
        threat = self.training.get("threat")
        return threat and (threat["norm"], threat["eps"])

    @property
    def data(self) -> TrainingData | None:
        """The training data; None if not recorded."""
        data = self.training.get("data")
        if data is None:
            return None
        known = {key: data[key] for key in TrainingData.__dataclass_fields__ if key in data}
        return TrainingData(**known | {"classes": tuple(data.get("classes", ()))})
