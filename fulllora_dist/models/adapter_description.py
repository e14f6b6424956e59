"""What adapter.json says of an adapter, typed for those who read it: loading, the registry, the commands."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fulllora_dist.models.adapted_model import AdapterSpec
from fulllora_dist.models.backbone import BackboneInfo


@dataclass(frozen=True)
class TrainingData:
    """The data that an adapter was trained on; None (or no classes) where it was not recorded.

    Attributes:
        name: of the data set.
        index: fingerprint of the index of its shards.
        classes: names of the classes, in label order.
        augment: augmentation of the training.
        crop_pct, interpolation: the evaluation crop, where it is not the backbone's own.
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
        backbone: the model that it belongs to.
        spec: how that was made trainable.
        sha256: of adapter.safetensors.
        trainable, trainable_share: number of trained parameters, and their share of the model's.
        training: how it was trained, as `save_adapter` was given it; may be empty.
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
        """Raises:
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
        """(norm, eps) that it was trained against; None where it was not recorded."""
        threat = self.training.get("threat")
        return threat and (threat["norm"], threat["eps"])

    @property
    def data(self) -> TrainingData | None:
        """None where it was not recorded."""
        data = self.training.get("data")
        if data is None:
            return None
        known = {key: data[key] for key in TrainingData.__dataclass_fields__ if key in data}
        return TrainingData(**known | {"classes": tuple(data.get("classes", ()))})
