"""What the tracker is told of a run and of its data. Not a Config: nothing here depends on the settings of training."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fulllora_dist.tracking.settings import TrackingSettings


@dataclass(frozen=True)
class RunSummary:
    """A run, for its tracker and for the registry.

    Attributes:
        output_dir: its output folder.
        settings: how it is tracked and published.
        uri: MLflow's tracking store.
        name: of the MLflow run, where it is created.
        params: all settings of the run; {section: {key: value}}.
    """

    output_dir: str
    settings: TrackingSettings
    uri: str
    name: str
    params: Mapping[str, Any]


@dataclass(frozen=True)
class DatasetInfo:
    """One split of the data that a run sees.

    Attributes:
        split: train, validation or held_out.
        source: folder or URL of the shards.
        digest: fingerprint of their index.
        images, classes: how many.
    """

    split: str
    source: str
    digest: str
    images: int
    classes: int
