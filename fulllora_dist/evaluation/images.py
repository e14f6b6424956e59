"""What an evaluation asks of its images."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

from fulllora_dist.data.batch import Batch
from fulllora_dist.data.index import Index


@runtime_checkable
class EvalImages(Protocol):
    """The evaluated images: `data.loader.EvalStream`, or anything alike.

    Attributes:
        batches: int64 arrays, the ids of each batch; every sample in exactly one of them.
        index: class names and the labels by id.
        digest: differs where the images of these ids or the batches do.
        settings: how they are made from the data, for the report; JSON-able.
    """

    batches: list[np.ndarray]
    index: Index
    digest: str
    settings: Mapping[str, Any]

    def read(self, ids: np.ndarray) -> Batch:
        """The images of these ids."""
