"""Images of one's own, of a DataLoader or of two tensors, as an evaluation asks for them: by id.

A loader is read once and its images are kept, as they must be the same ones under every attack: another pass might
augment or shuffle them anew.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from fulllora_dist.attacks.arguments import check_labels, check_precision, checked_count, dtype_name
from fulllora_dist.core.errors import UserError
from fulllora_dist.data.batch import Batch
from fulllora_dist.data.plan import stratified_order

BATCH_SIZE = 64


class OwnImages:
    """`EvalImages` of what a notebook has, in host memory, in the order of their ids.

    Args:
        data: a pair (x, y), or a DataLoader or another iterable of such pairs; with ids (x, y, ids), or a `Batch` each.
            x float32, float64 [B, C, H, W] in [0, 1] or uint8; y and ids integers [B]. Without ids, an image's
            position is its id.
        classes: names of the labels, in order; None takes those of the loader's data set, if it has any.
        num_samples: how many images, drawn evenly over the classes; None takes all.
        batch_size: None is a loader's own, of a pair 64.

    Raises:
        UserError: something else, images or labels that `Batch.of` refuses, of which it names the batch; images of
            several shapes or dtypes; a loader that shuffles and yields no ids.
    """

    def __init__(self, data: Any, classes: Sequence[str] | None, num_samples: int | None, batch_size: int | None):
        parts = list(_parts(data))
        if not parts:
            raise UserError("data has no images")
        _check_alike(parts)
        ids, labels = (np.concatenate([getattr(p, name).numpy() for p in parts]) for name in ("ids", "labels"))
        rows = [image for part in parts for image in part.images]
        order = np.argsort(ids, kind="stable")
        if num_samples is not None:
            if checked_count("num_samples", num_samples, 1) > len(ids):
                raise UserError(f"num_samples must be between 1 and the {len(ids)} images of data, got {num_samples}")
            order = order[np.sort(stratified_order(labels[order])[:num_samples])]
        self.ids, self._labels, self._images = ids[order], labels[order], [rows[row] for row in order]
        size = batch_size or (BATCH_SIZE if _is_pair(data) else max(map(len, parts)))
        self.batches = [self.ids[start : start + size] for start in range(0, len(self.ids), size)]
        self.settings: Mapping[str, Any] = {"batch_size": size}
        if isinstance(classes, str) or not all(isinstance(name, str) for name in classes or ()):
            raise UserError(f"classes must be a list of names, in the order of the labels, got {classes!r}")
        self._names = tuple(classes) if classes is not None else _names_in(data)

    def label(self, outputs: int) -> None:
        """Name the classes, once it is known how many outputs the model has.

        Raises:
            UserError: labels beyond the names or the outputs.
        """
        names = self._names or tuple(map(str, range(outputs)))
        of = f"{len(names)} class names" if self._names else f"the model's {outputs} outputs"
        check_labels(int(self._labels.max()) + 1, len(names), of)
        self.index = OwnIndex(names, _Labels(self.ids, self._labels), self._hash(names))
        self.digest = f"{self.index.hash} {self.settings}"

    def read(self, ids: np.ndarray) -> Batch:
        """The images of these ids."""
        rows = np.searchsorted(self.ids, ids)
        images, labels = torch.stack([self._images[row] for row in rows]), torch.from_numpy(self._labels[rows])
        return Batch(images, labels, torch.from_numpy(ids), torch.ones(len(ids), dtype=torch.bool))

    def _hash(self, names: Sequence[str]) -> str:
        digest = hashlib.sha256(json.dumps([names, list(self._images[0].shape)]).encode())
        digest.update(self.ids.tobytes() + self._labels.tobytes())
        for batch in self.batches:
            digest.update(self.read(batch).pixels().numpy().data)
        return digest.hexdigest()


@dataclass(frozen=True)
class OwnIndex:
    """See `images.Labelled`; the hash is of names, ids, labels and pixels."""

    classes: tuple[str, ...]
    labels: "_Labels"
    hash: str


@dataclass(frozen=True)
class _Labels:
    ids: np.ndarray  # ascending
    of_rows: np.ndarray

    def __getitem__(self, ids: np.ndarray, /) -> np.ndarray:
        return self.of_rows[np.searchsorted(self.ids, ids)]


def _is_pair(data: Any) -> bool:
    """One batch, not a list of batches."""
    return isinstance(data, (tuple, list)) and len(data) in (2, 3) and not isinstance(data[0], (tuple, list, Batch))


def _parts(data: Any) -> Iterator[Batch]:
    """Every batch on the host, checked, with an id for each image."""
    if isinstance(data, (Tensor, np.ndarray, Mapping)) or not isinstance(data, Iterable):
        wrap = "; wrap it in a DataLoader" if isinstance(data, Dataset) else ""
        raise UserError(
            "data must be a folder of shards, an EvalStream, a DataLoader or a pair of tensors (x, y), got "
            f"{type(data).__name__}{wrap}"
        )
    if _is_pair(data):
        yield _checked(data, 0, "")
        return
    seen = 0
    for number, item in enumerate(data):
        if not isinstance(item, Batch) and (not isinstance(item, (tuple, list)) or len(item) not in (2, 3)):
            shown = f"{len(item)} values" if isinstance(item, (tuple, list)) else type(item).__name__
            raise UserError(f"data must yield (x, y) or (x, y, ids), got {shown}")
        if not isinstance(item, Batch) and len(item) == 2 and _shuffles(data):
            raise UserError(
                "data: the DataLoader shuffles, so that an image's position does not tell which one it is; set "
                "shuffle=False, or yield (x, y, ids)"
            )
        part = _checked(item, seen, f"data: batch {number}: ")
        seen += len(part)
        yield part


def _checked(item: Any, first_id: int, prefix: str) -> Batch:
    """A batch of images, labels and, perhaps, ids, without padding."""
    if isinstance(item, Batch):
        item = [tensor[item.mask] for tensor in (item.images, item.labels, item.ids)]
    x, y, *ids = item
    if isinstance(x, Tensor) and not x.numel():
        raise UserError(f"{prefix}x has no images, got {list(x.shape)}")
    try:
        batch = Batch.of(x, y, *ids)
        if x.is_floating_point():
            check_precision(x)
    except UserError as error:
        raise UserError(f"{prefix}{error}") from None
    known = batch.ids if ids else torch.arange(first_id, first_id + len(x))
    return Batch(batch.images, batch.labels, known, batch.mask).to("cpu")


def _check_alike(parts: Sequence[Batch]) -> None:
    """Raises UserError: images of another shape or dtype than the first ones."""
    kinds = [f"{dtype_name(part.images)} {list(part.images.shape[1:])}" for part in parts]
    if other := next((number for number, kind in enumerate(kinds) if kind != kinds[0]), None):
        raise UserError(f"data: images must be alike, got {kinds[other]} in batch {other}, {kinds[0]} before")


def _shuffles(loader: Any) -> bool:
    sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
    if isinstance(sampler, DistributedSampler):
        return sampler.shuffle
    return isinstance(sampler, (RandomSampler, SubsetRandomSampler, WeightedRandomSampler))


def _names_in(loader: Any) -> tuple[str, ...]:
    """Class names of a loader's data set, as torchvision's have them, a `Subset` of them too; empty where none are."""
    data = getattr(loader, "dataset", None)
    while data is not None and not hasattr(data, "classes"):
        data = getattr(data, "dataset", None)
    names = getattr(data, "classes", ())
    named = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
    return tuple(names) if named else ()
