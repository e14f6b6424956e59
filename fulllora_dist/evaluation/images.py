"""What an evaluation asks of its images."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from fulllora_dist.data.batch import Batch


class LabelsById(Protocol):
    """The labels of samples by their ids; an array is one."""

    def __getitem__(self, ids: np.ndarray, /) -> np.ndarray:
        """int64 [N], the labels of the ids, int64 [N]."""


class Labelled(Protocol):
    """Names and labels: `data.index.Index`, or anything alike.

    Attributes:
        classes: names of the labels, in order.
        labels: by id.
        hash: differs where classes, labels or images do.
    """

    @property
    def classes(self) -> Sequence[str]: ...
    @property
    def labels(self) -> LabelsById: ...
    @property
    def hash(self) -> str: ...


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
    digest: str
    settings: Mapping[str, Any]

    @property
    def index(self) -> Labelled: ...

    def read(self, ids: np.ndarray) -> Batch:
        """The images of these ids."""
