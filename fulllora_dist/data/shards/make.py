"""Images in a folder or tar to WebDataset shards and their index, on disk or in a bucket.

The same images give the same bytes: the shuffle is keyed, times and owners are fixed. A shard gets its name once it
is whole, re-read and equal to what was to be written, and the index comes last, so the same command resumes an
interrupted run.
"""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fulllora_dist.core.errors import UserError
from fulllora_dist.data.index import INDEX_NAME, Index
from fulllora_dist.data.shards.indexing import forget_scan
from fulllora_dist.data.shards.labels import read_labels
from fulllora_dist.data.shards.pool import run_jobs
from fulllora_dist.data.shards.selection import choose, hold_out
from fulllora_dist.data.shards.source import SourceImage, list_images
from fulllora_dist.data.shards.write import ShardJob, make_shard
from fulllora_dist.storage import store, urls

_SOURCE_NAME = "source.json"
_CLASSES_NAME = "classes.txt"  # what --classes of index_shards takes


@dataclass(frozen=True)
class _Split:
    """What one destination will hold: images in the order of their ids."""

    name: str
    folder: str
    images: tuple[SourceImage, ...]
    classes: tuple[str, ...]
    image_size: int | None
    samples_per_shard: int


def make_shards(
    source: str | Path,
    destination: str | Path,
    *,
    labels: str | Path | None = None,
    split_name: str = "train",
    image_size: int | None = None,
    samples_per_shard: int = 1000,
    workers: int = 1,
    classes: Sequence[str] | None = None,
    limit: int | None = None,
    holdout: float = 0.0,
    holdout_destination: str | Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Write `{split_name}-000000.tar` ... and index.safetensors into `destination`.

    Args:
        source: a folder with one subfolder of JPEGs, PNGs and WebPs for each class, an uncompressed tar of such a
            folder, or an uncompressed tar of one tar a class. With `labels` in any folders or none.
        destination: folder, s3:// or gs:// URL; created; may hold what an interrupted run of the same command left.
        labels: where folders are not the classes: a file that names them, see `labels.read_labels`.
        image_size: resize the shorter side to so many pixels, crop the centre square and re-encode (JPEG quality
            95; PNG stays PNG, WebP becomes JPEG). Without it the bytes are kept as they are.
        samples_per_shard: the last shard of a split may hold fewer.
        workers: processes; each writes whole shards.
        classes: take only these, label i is classes[i]. Without it all, sorted by name.
        limit: take only so many images, balanced over the classes.
        holdout, holdout_destination: what goes to a split of its own there, named `{split_name}-holdout`: a share of
            each class in (0, 1), or from 1 on so many images of each. Which ones follows from their keys: in a share
            each from its own, so that more images later move no other; of a number, a new one may displace one.
        progress: bars on stderr.

    Returns:
        `classes`, `skipped_files` and `splits`: name, folder, samples, shards, bytes and index_hash of each; JSON-able.

    Raises:
        UserError: a bad setting or source, an unreadable image, a destination with shards of something else.
    """
    if not re.fullmatch(r"[\w-]+", split_name):
        raise UserError(f"split name may have letters, digits, - and _ only, got {split_name!r}")
    for name, value in {"image size": image_size, "samples per shard": samples_per_shard, "workers": workers}.items():
        if value is not None and value < 1:
            raise UserError(f"{name} must be >= 1, got {value}")
    if (holdout > 0) != (holdout_destination is not None) or holdout < 0 or (holdout > 1 and holdout % 1):
        raise UserError(
            f"holdout must be a share below 1 or a number of images, with a destination of its own; got {holdout:g}"
        )
    folders = [os.fspath(folder) for folder in (destination, holdout_destination) if folder is not None]
    for folder in folders:
        store.refuse_read_only(folder)
    if len({folder if urls.is_remote(folder) else os.path.realpath(folder) for folder in folders}) < len(folders):
        raise UserError(f"{destination}: the held-out images need a folder of their own")

    listed, skipped = list_images(Path(source), None if labels is None else read_labels(Path(labels)))
    images, names = choose(listed, classes, limit)
    of_split = {split_name: images}
    if holdout_destination is not None:
        of_split[split_name], of_split[f"{split_name}-holdout"] = hold_out(images, holdout)
    splits = [
        _Split(name, store.writable_folder(folder), tuple(chosen), names, image_size, samples_per_shard)
        for folder, (name, chosen) in zip(folders, of_split.items(), strict=True)
    ]
    for split in splits:
        _claim(split)
    return {
        "classes": list(names),
        "skipped_files": len(skipped),
        "splits": [_write_split(split, workers, progress) for split in splits],
    }


def _claim(split: _Split) -> None:
    """Leave a note in the destination of what it will hold, and refuse one that holds something else."""
    rows = [(image.key, image.size) for image in split.images]
    note = {
        "split": split.name,
        "image_size": split.image_size,
        "samples_per_shard": split.samples_per_shard,
        "samples": len(rows),
        "sha256": hashlib.sha256(json.dumps([split.classes, rows]).encode()).hexdigest(),
    }
    url = urls.join(split.folder, _SOURCE_NAME)
    if store.exists(url):
        try:
            same = json.loads(store.read(url)) == note
        except ValueError as error:
            raise UserError(f"{urls.redacted(url)}: {error}") from error
    else:
        same = not store.shards_in(split.folder) and not store.exists(urls.join(split.folder, INDEX_NAME))
    if not same:
        folder = urls.redacted(split.folder)
        raise UserError(f"{folder}: holds shards of another source or other options; give an empty folder")
    store.write(url, json.dumps(note, indent=2).encode())
    store.write(urls.join(split.folder, _CLASSES_NAME), "".join(f"{name}\n" for name in split.classes).encode())


def _write_split(split: _Split, workers: int, progress: bool) -> dict[str, Any]:
    label = {name: i for i, name in enumerate(split.classes)}
    jobs: list[ShardJob] = []
    for start in range(0, len(split.images), split.samples_per_shard):
        images = split.images[start : start + split.samples_per_shard]
        url = urls.join(split.folder, f"{split.name}-{len(jobs):06d}.tar")
        jobs.append(ShardJob(url, images, tuple(label[image.class_name] for image in images), split.image_size))
    with tqdm(total=len(split.images), desc=split.name, unit="img", disable=not progress) as bar:
        scans = run_jobs(make_shard, jobs, workers, lambda job: bar.update(len(job.images)))
    index = Index.from_scans(split.folder, [scan for _, scan in scans], split.classes)
    index.save()
    for scan_job, _ in scans:
        forget_scan(scan_job)
    return {"name": split.name, "folder": split.folder, **index.summary()}
