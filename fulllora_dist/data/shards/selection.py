"""Which images of a source become shards, in which order, and which of them are held out."""

import hashlib
from collections.abc import Sequence

import numpy as np

from fulllora_dist.core.errors import UserError
from fulllora_dist.core.rng import numpy_rng
from fulllora_dist.data.plan import stratified_order
from fulllora_dist.data.shards.source import SourceImage


def choose(images: list[SourceImage], names: Sequence[str], limit: int | None, skip: int) -> list[SourceImage]:
    """The images of these classes, shuffled so that every shard mixes classes: in the order in which limits take them,
    which is balanced over the classes, `limit` of them after the first `skip`."""
    position = {name: label for label, name in enumerate(names)}
    taken = [image for image in images if image.class_name in position]
    if limit is not None or skip:
        labels = np.array([position[image.class_name] for image in taken])
        present = len(np.unique(labels))
        if not 0 <= skip <= len(taken) - present:
            raise UserError(f"skip must be between 0 and {len(taken) - present}, got {skip}")
        left = len(taken) - skip
        if limit is not None and not present <= limit <= left:
            raise UserError(f"limit must be between {present} (one a class) and {left}, got {limit}")
        taken = [taken[i] for i in np.sort(stratified_order(labels)[skip:][:limit])]
    shuffled = np.argsort(numpy_rng(0, "make_shards", 0).bit_generator.random_raw(len(taken)), kind="stable")
    return [taken[i] for i in shuffled]


def hold_out(images: list[SourceImage], amount: float) -> tuple[list[SourceImage], list[SourceImage]]:
    """(kept, held out), both in the order given. The least sha256 of the keys of a class are held out: so many of them,
    or those in the lowest share of all values; at least one, and never all."""
    members: dict[str, list[str]] = {}
    for image in images:
        members.setdefault(image.class_name, []).append(image.key)
    held: set[str] = set()
    for name, keys in members.items():
        keys.sort(key=_hash)
        count = int(amount)
        if amount < 1:
            count = min(max(1, sum(_hash(key) < amount * 2**256 for key in keys)), len(keys) - 1)
        if not 0 < count < len(keys):
            raise UserError(f"holdout {amount:g}: class {name} has only {len(keys)} images")
        held.update(keys[:count])
    return [i for i in images if i.key not in held], [i for i in images if i.key in held]


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest())
