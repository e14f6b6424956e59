"""The typed content of adapter.json, for loading, the registry and the commands."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fulllora_dist.models.adapted_model import AdapterSpec
from fulllora_dist.models.backbone import BackboneInfo
from fulllora_dist.models.training_record import TrainingData, TrainingRecord


def backbone_content(info: BackboneInfo) -> dict[str, Any]:
    """The section `backbone`, without what few backbones have: readers refuse keys that they do not know."""
    rare = ("checkpoint_key", "head_sha256", "module")
    return {key: value for key, value in asdict(info).items() if value is not None or key not in rare}


def spec_content(spec: AdapterSpec) -> dict[str, Any]:
    """The section `adapter`, in the same way."""
    rare = ("target_modules", "blocks", "train_norms")
    return {key: value for key, value in asdict(spec).items() if value or key not in rare}


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
        backbone: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in content["backbone"].items()
        }
        return cls(
            BackboneInfo(**backbone),
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
        return TrainingRecord(self.training).threat

    @property
    def data(self) -> TrainingData | None:
        """The training data; None if not recorded."""
        return TrainingRecord(self.training).data
