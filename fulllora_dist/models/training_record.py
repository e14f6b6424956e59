"""What an adapter remembers of its training: the data with its class names and crop, the threat model, the seed."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fulllora_dist.core.errors import UserError


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
class TrainingRecord:
    """The record of a training, as `save_adapter` takes it; empty where nothing is known.

    Attributes:
        content: JSON-able, of which `threat` (norm and eps), `data` (see `TrainingData`) and `seed` are read.

    Raises:
        UserError: one of these of another form.
    """

    content: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        threat, data, seed = (self.content.get(key) for key in ("threat", "data", "seed"))
        if threat is not None and not (isinstance(threat, Mapping) and {"norm", "eps"} <= threat.keys()):
            raise UserError(
                f'training: threat must be a mapping such as {{"norm": "linf", "eps": 0.016}}, got {threat!r}'
            )
        if data is not None and not isinstance(data, Mapping):
            raise UserError(f'training: data must be a mapping such as {{"classes": ["cat", "dog"]}}, got {data!r}')
        if not isinstance(seed, int | None):
            raise UserError(f"training: seed must be an integer, got {seed!r}")

    @property
    def threat(self) -> tuple[str, float] | None:
        """(norm, eps) that it was trained with; None if not recorded."""
        threat = self.content.get("threat")
        return threat and (threat["norm"], threat["eps"])

    @property
    def seed(self) -> int | None:
        """Of the run; None if not recorded."""
        return self.content.get("seed")

    @property
    def data(self) -> TrainingData | None:
        """The training data; None if not recorded."""
        data = self.content.get("data")
        if data is None:
            return None
        known = {key: data[key] for key in TrainingData.__dataclass_fields__ if key in data}
        return TrainingData(**known | {"classes": tuple(data.get("classes", ()))})

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the outputs, in order; empty if not recorded."""
        return self.data.classes if self.data else ()
