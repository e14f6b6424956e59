"""Images in a folder or tar to WebDataset shards and their index, on disk or in a bucket.

The same images give the same bytes: the shuffle is keyed, times and owners are fixed. A shard gets its name once it
is whole, re-read and equal to what was to be written, and the index comes last, so a run that was cut short goes on
with what is missing.
"""

import hashlib
import io
import json
import math
import os
import re
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm
from webdataset import ShardWriter

from fulllora_dist.core.atomic import atomic_write
from fulllora_dist.core.errors import UserError
from fulllora_dist.core.rng import numpy_rng
from fulllora_dist.data.decode import centre_crop
from fulllora_dist.data.images import decode, image_format
from fulllora_dist.data.index import INDEX_NAME, Index
from fulllora_dist.data.plan import stratified_order
from fulllora_dist.data.shards.indexing import (
    ScanJob,
    forget_scan,
    record_scan,
    recorded_scan,
    scan_and_record,
    version_of,
)
from fulllora_dist.data.shards.labels import read_labels
from fulllora_dist.data.shards.pool import run_jobs
from fulllora_dist.data.shards.scan import ShardScan, scan_file
from fulllora_dist.data.shards.source import SourceImage, list_images
from fulllora_dist.storage import store, urls

_SOURCE_NAME = "source.json"
_CLASSES_NAME = "classes.txt"  # what --classes of index_shards takes
_JPEG_QUALITY = 95
_EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


@dataclass(frozen=True)
class _Split:
    """What one destination will hold: images in the order of their ids."""

    name: str
    folder: str
    images: tuple[SourceImage, ...]
    classes: tuple[str, ...]
    image_size: int | None
    samples_per_shard: int


@dataclass(frozen=True)
class _ShardJob:
    folder: str
    split_name: str
    number: int
    images: tuple[SourceImage, ...]
    labels: tuple[int, ...]
    image_size: int | None

    @property
    def pattern(self) -> str:
        return f"{self.split_name}-%06d.tar"

    @property
    def name(self) -> str:
        return self.pattern % self.number

    @property
    def url(self) -> str:
        return urls.join(self.folder, self.name)


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
        labels: where no folders tell the classes: a file that does, see `labels.read_labels`.
        image_size: resize the shorter side to so many pixels, cut out the centre square and encode anew (JPEG quality
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
        `classes`, `skipped_files` and `splits`: name, folder, samples, shards, bytes and index_hash of each; JSON fits.

    Raises:
        UserError: a bad setting or source, an unreadable image, a destination with shards of something else.
    """
    if not re.fullmatch(r"[\w-]+", split_name):
        raise UserError(f"split name {split_name!r}: letters, digits, - and _ are right")
    for name, value in {"image size": image_size, "samples per shard": samples_per_shard, "workers": workers}.items():
        if value is not None and value < 1:
            raise UserError(f"{name} {value}: 1 or more is right")
    if (holdout > 0) != (holdout_destination is not None) or holdout < 0 or (holdout > 1 and holdout % 1):
        raise UserError(
            f"holdout {holdout:g}: a share below 1, or a number of images, with a destination of its own is right"
        )
    destinations = [os.fspath(place) for place in (destination, holdout_destination) if place is not None]
    for place in destinations:
        store.refuse_read_only(place)
    if len({place if urls.is_remote(place) else os.path.realpath(place) for place in destinations}) < len(destinations):
        raise UserError(f"{destination}: the held-out images need a folder of their own")

    found, skipped = list_images(Path(source), None if labels is None else read_labels(Path(labels)))
    images, names = _choose(found, classes, limit)
    parts = [(split_name, destinations[0], images)]
    if holdout_destination is not None:
        kept, held_out = _hold_out(images, holdout)
        parts = [(split_name, destinations[0], kept), (f"{split_name}-holdout", destinations[1], held_out)]
    splits = [
        _Split(name, store.writable_folder(folder), tuple(part), names, image_size, samples_per_shard)
        for name, folder, part in parts
    ]
    for split in splits:
        _claim(split)
    return {
        "classes": list(names),
        "skipped_files": len(skipped),
        "splits": [_write_split(split, workers, progress) for split in splits],
    }


def _choose(
    images: list[SourceImage], classes: Sequence[str] | None, limit: int | None
) -> tuple[list[SourceImage], tuple[str, ...]]:
    """The images to take, shuffled so that every shard mixes classes, and the class names in label order."""
    present = {image.class_name for image in images}
    names = tuple(sorted(present) if classes is None else classes)
    if len(set(names)) < len(names):
        raise UserError(f"classes {','.join(names)}: a class is named twice")
    if missing := [name for name in names if name not in present]:
        raise UserError(f"classes: the source has no images of {', '.join(missing)}")
    position = {name: label for label, name in enumerate(names)}
    taken = [image for image in images if image.class_name in position]
    if limit is not None:
        if not len(names) <= limit <= len(taken):
            raise UserError(f"limit {limit}: between {len(names)} (one a class) and {len(taken)} is right")
        labels = np.array([position[image.class_name] for image in taken])
        taken = [taken[i] for i in np.sort(stratified_order(labels)[:limit])]
    shuffled = np.argsort(numpy_rng(0, "make_shards", 0).bit_generator.random_raw(len(taken)), kind="stable")
    return [taken[i] for i in shuffled], names


def _hold_out(images: list[SourceImage], amount: float) -> tuple[list[SourceImage], list[SourceImage]]:
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
    return [p for p in images if p.key not in held], [p for p in images if p.key in held]


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest())


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
        where = urls.redacted(split.folder)
        raise UserError(f"{where}: holds shards of another source or other options; name an empty folder")
    store.write(url, json.dumps(note, indent=2).encode())
    store.write(urls.join(split.folder, _CLASSES_NAME), "".join(f"{name}\n" for name in split.classes).encode())


def _write_split(split: _Split, workers: int, progress: bool) -> dict[str, Any]:
    label = {name: i for i, name in enumerate(split.classes)}
    jobs: list[_ShardJob] = []
    for start in range(0, len(split.images), split.samples_per_shard):
        part = split.images[start : start + split.samples_per_shard]
        labels = tuple(label[image.class_name] for image in part)
        jobs.append(_ShardJob(split.folder, split.name, len(jobs), part, labels, split.image_size))
    with tqdm(total=len(split.images), desc=split.name, unit="img", disable=not progress) as bar:
        made = run_jobs(_make_shard, jobs, workers, lambda job: bar.update(len(job.images)))
    index = Index.from_scans(split.folder, [scan for _, scan in made], split.classes)
    index.save()
    for scan_job, _ in made:
        forget_scan(scan_job)
    return {
        "name": split.name,
        "folder": split.folder,
        "samples": len(index),
        "shards": len(index.shards),
        "bytes": sum(shard.bytes for shard in index.shards),
        "index_hash": index.hash,
    }


def _make_shard(job: _ShardJob) -> tuple[ScanJob, ShardScan]:
    """Write the shard unless it is there, and re-read it. One that is there was wholly compared before it got its name:
    keys and labels are enough to know that it belongs here. What was read is recorded, for a run after this one."""
    expected: dict[str, list[Any]] = {"key": [image.key for image in job.images], "label": list(job.labels)}
    written = None if store.exists(job.url) else _publish(job, expected)
    scan_job = ScanJob(job.url, job.name, version_of(job.url))
    if written is not None:
        scan = ShardScan(replace(written.shard, etag=scan_job.version.etag), written.columns)
        record_scan(scan_job, scan)
        return scan_job, scan
    scan = recorded_scan(scan_job) or scan_and_record(scan_job)
    _compare(scan, expected, job.url)
    return scan_job, scan


def _publish(job: _ShardJob, expected: dict[str, list[Any]]) -> ShardScan:
    if not urls.is_remote(job.url):
        with atomic_write(Path(job.url)) as file:
            return _written(job, file, expected)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, job.name)
        with open(path, "wb") as file:
            scan = _written(job, file, expected)
        store.upload(path, job.url)
    return scan


def _written(job: _ShardJob, file: BinaryIO, expected: dict[str, list[Any]]) -> ShardScan:
    crc32 = _write_shard(job, file)
    file.flush()
    scan = scan_file(Path(file.name), job.name)
    _compare(scan, {**expected, "crc32": crc32}, job.url)
    return scan


def _compare(scan: ShardScan, expected: dict[str, list[Any]], url: str) -> None:
    for column, values in expected.items():
        found = scan.keys() if column == "key" else scan.columns[column].tolist()
        if found != values:
            raise UserError(f"{url}: its {column}s are not those of the source; remove the shard and run again")


def _write_shard(job: _ShardJob, file: BinaryIO) -> list[int]:
    """The crc32 of each image as it was handed to the writer."""
    written = []
    with ShardWriter(
        job.pattern, start_shard=job.number, maxcount=len(job.images), maxsize=math.inf, verbose=0,
        opener=lambda _: file, encoder=False, compress=False, mtime=0,
    ) as shard:  # fmt: skip
        for image, label in zip(job.images, job.labels, strict=True):
            extension, data = _encoded(image, job.image_size)
            shard.write({"__key__": image.key, extension: data, "cls": str(label).encode()})
            written.append(zlib.crc32(data))
    return written


def _encoded(image: SourceImage, image_size: int | None) -> tuple[str, bytes]:
    """(extension, bytes), by content: ImageNet has a PNG named .JPEG. Decoded even where bytes are kept."""
    data = image.read()
    try:
        decoded = decode(data)
    except UserError as error:
        raise UserError(f"{image.name}: {error}") from error
    kind = image_format(data)
    if image_size is None:
        return _EXTENSIONS[kind], data
    kind = "PNG" if kind == "PNG" else "JPEG"
    small = centre_crop(decoded, image_size, crop_pct=1.0, crop_mode="center", interpolation="bicubic")
    buffer = io.BytesIO()
    small.save(buffer, kind, quality=_JPEG_QUALITY)
    return _EXTENSIONS[kind], buffer.getvalue()
