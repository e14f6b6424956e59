"""Images in a folder or tar to WebDataset shards and their index, on disk or in a bucket.

The same images give the same bytes: the shuffle is keyed, times and owners are fixed. A shard gets its name once it
is whole, re-read and equal to what was to be written, and the index comes last, so the same command resumes an
interrupted run.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fulllora_dist.core.errors import UserError
from fulllora_dist.core.messages import redacted
from fulllora_dist.data.index import INDEX_NAME, Index
from fulllora_dist.data.shards.check import unreadable_images
from fulllora_dist.data.shards.classes import CLASSES_NAME, order_classes
from fulllora_dist.data.shards.indexing import forget_scan
from fulllora_dist.data.shards.labels import read_labels
from fulllora_dist.data.shards.pool import run_jobs
from fulllora_dist.data.shards.selection import choose, hold_out
from fulllora_dist.data.shards.source import Listing, SourceImage, list_images
from fulllora_dist.data.shards.write import ShardJob, make_shard
from fulllora_dist.storage import store, urls

_SOURCE_NAME = "source.json"


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
    classes: int | Sequence[str] | None = None,
    limit: int | None = None,
    skip: int = 0,
    holdout: float = 0.0,
    holdout_destination: str | Path | None = None,
    max_bad_samples: int = 0,
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
        classes: take only these, label i is classes[i]; or how many, where numbers name them, which then are the
            labels. Without it all: in numeric order where all names are numbers (from 0 on), else in text order.
        limit: take only so many images, balanced over the classes.
        skip: leave out as many images as a limit of so many takes.
        holdout, holdout_destination: what goes to a split of its own there, named `{split_name}-holdout`: a share of
            each class in (0, 1), or from 1 on so many images of each. Which ones follows from their keys: in a share
            each from its own, so that more images later move no other; of a number, a new one may displace one.
        max_bad_samples: leave out up to so many images that cannot be decoded.
        progress: bars on stderr.

    Returns:
        `classes`; `skipped_files` (a number); `unreadable`: the images that were left out; `notes`: sentences for the
        user; and `splits`: name, folder, samples, shards, bytes and index_hash of each; JSON-able.

    Raises:
        UserError: a bad setting or source, a class without images, more unreadable images than allowed (all are named),
            a destination with shards of something else. Nothing has been written then.
    """
    if not re.fullmatch(r"[\w-]+", split_name):
        raise UserError(f"split name may have letters, digits, - and _ only, got {split_name!r}")
    if max_bad_samples < 0:
        raise UserError(f"max_bad_samples must be >= 0, got {max_bad_samples}")
    for name, value in {"image size": image_size, "samples per shard": samples_per_shard, "workers": workers}.items():
        if value is not None and value < 1:
            raise UserError(f"{name} must be >= 1, got {value}")
    if holdout < 0 or (holdout > 1 and holdout % 1):
        raise UserError(f"holdout must be a share below 1 or a number of images, got {holdout:g}")
    if holdout and holdout_destination is None:
        raise UserError(f"holdout {holdout:g} needs a folder for what is held out: holdout_destination (--holdout-dst)")
    if not holdout and holdout_destination is not None:
        raise UserError("holdout_destination (--holdout-dst) needs a share or number of images: holdout (--holdout)")
    folders = [os.fspath(folder) for folder in (destination, holdout_destination) if folder is not None]
    for i, folder in enumerate(folders):
        store.refuse_read_only(folder)
        if not urls.is_remote(folder):
            folders[i] = urls.local_path(folder)
            _refuse_unwritable(folders[i])
    if len({folder if urls.is_remote(folder) else os.path.realpath(folder) for folder in folders}) < len(folders):
        raise UserError(f"{destination}: the held-out images need a folder of their own")

    listing = list_images(Path(source), None if labels is None else read_labels(Path(labels)))
    names, notes = order_classes({image.class_name for image in listing.images}, listing.classes, classes)
    notes += _about(listing, names)
    images = choose(listing.images, names, limit, skip)
    chosen = _digest(names, images)
    there = [_claim_in(folder, chosen) for folder in folders]
    if holdout_destination is not None:
        hold_out(images, holdout)  # what it refuses is refused before all images are decoded
    unreadable = next((claim["unreadable"] for claim in there if claim), None)  # of an interrupted run
    if unreadable is None:
        unreadable = unreadable_images(images, workers, progress)
    images = _without(images, unreadable, max_bad_samples)
    of_split = {split_name: images}
    if holdout_destination is not None:
        of_split[split_name], of_split[f"{split_name}-holdout"] = hold_out(images, holdout)
    splits = [
        _Split(name, folder, tuple(images), names, image_size, samples_per_shard)
        for folder, (name, images) in zip(folders, of_split.items(), strict=True)
    ]
    claims = [_claim(split, chosen, unreadable) for split in splits]
    for folder, old, new in zip(folders, there, claims, strict=True):
        if old is not None and old != new:
            raise _other_source(folder)
    for folder, claim in zip(folders, claims, strict=True):
        store.writable_folder(folder)
        store.write(urls.join(folder, _SOURCE_NAME), json.dumps(claim, indent=2).encode())
        store.write(urls.join(folder, CLASSES_NAME), "".join(f"{name}\n" for name in names).encode())
    return {
        "classes": list(names),
        "skipped_files": len(listing.others),
        "unreadable": list(unreadable),
        "notes": notes,
        "splits": [_write_split(split, workers, progress) for split in splits],
    }


def _refuse_unwritable(folder: str) -> None:
    """Where it could not be created: hours of decoding come first."""
    nearest = next(path for path in (Path(folder).absolute(), *Path(folder).absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(f"{folder}: cannot be created or written to ({nearest} is no folder that can be)")


def _about(listing: Listing, names: Sequence[str]) -> list[str]:
    """What was passed over, in sentences."""
    notes = []
    if listing.leftovers:
        more = ", ..." if len(listing.leftovers) > 5 else ""
        notes.append(
            f"passed over {len(listing.leftovers)} hidden or tool folders: {', '.join(listing.leftovers[:5])}{more}"
        )
    taken = set(names)
    if others := sum(image.class_name not in taken for image in listing.images):
        notes.append(f"left out {others} images of classes that --classes does not name")
    if listing.unused_labels:
        notes.append(f"{listing.unused_labels} names in the labels file have no image in the source")
    return notes


def _without(images: list[SourceImage], unreadable: Mapping[str, str], allowed: int) -> list[SourceImage]:
    if len(unreadable) > allowed:
        raise UserError(
            f"{len(unreadable)} of {len(images)} images are unreadable, which exceeds max_bad_samples={allowed} "
            f"(--max-bad-samples {len(unreadable)} leaves them out): "
            + "; ".join(f"{name}: {reason}" for name, reason in unreadable.items())
        )
    readable = [image for image in images if image.name not in unreadable]
    if lost := {image.class_name for image in images} - {image.class_name for image in readable}:
        raise UserError(f"all images of class {min(lost)} are unreadable: {', '.join(unreadable)}")
    return readable


def _digest(names: Sequence[str], images: Sequence[SourceImage]) -> str:
    rows = [(image.key, image.size) for image in images]
    return hashlib.sha256(json.dumps([names, rows]).encode()).hexdigest()


def _claim(split: _Split, chosen: str, unreadable: Mapping[str, str]) -> dict[str, Any]:
    """The note in a destination of what it will hold. `chosen` is the digest of the images before the unreadable ones
    were left out: a run that resumes need not look for these again."""
    return {
        "split": split.name,
        "image_size": split.image_size,
        "samples_per_shard": split.samples_per_shard,
        "samples": len(split.images),
        "sha256": _digest(split.classes, split.images),
        "chosen": chosen,
        "unreadable": dict(unreadable),
    }


def _claim_in(folder: str, chosen: str) -> dict[str, Any] | None:
    """The claim of an interrupted run over the same images. Refuses a folder that holds something else."""
    url = urls.join(folder, _SOURCE_NAME)
    if not store.exists(url):
        if store.shards_in(folder) or store.exists(urls.join(folder, INDEX_NAME)):
            raise _other_source(folder)
        return None
    try:
        claim = json.loads(store.read(url))
    except ValueError as error:
        raise UserError(f"{redacted(url)}: {error}") from error
    if not isinstance(claim, dict) or claim.get("chosen") != chosen:
        raise _other_source(folder)
    return claim


def _other_source(folder: str) -> UserError:
    return UserError(f"{redacted(folder)}: holds shards of another source or other options; give an empty folder")


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
