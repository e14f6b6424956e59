"""An image folder, or a tar of one, to WebDataset shards and their index.

The same pictures give the same bytes: the shuffle is seeded, times and owners are fixed. A shard gets its name once it
is whole, re-read and equal to what was to be written, so a run that was cut short goes on with what is missing.
"""

import hashlib
import io
import json
import re
import zlib
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from tqdm import tqdm
from webdataset.writer import TarWriter

from fulllora_dist.data.decode import decode, evaluation_box
from fulllora_dist.data.index import INDEX_NAME, Index, published
from fulllora_dist.data.plan import epoch_order, stratified_order
from fulllora_dist.data.scan import ShardScan, scan_shard
from fulllora_dist.data.source import Picture, list_pictures
from fulllora_dist.data.workers import fork_server, settle_in, signals_held
from fulllora_dist.errors import UserError

_SOURCE_NAME = "source.json"
_PNG = b"\x89PNG"
_JPEG_QUALITY = 95


@dataclass(frozen=True)
class _Split:
    """What one destination will hold: pictures in the order of their ids."""

    name: str
    folder: Path
    pictures: tuple[Picture, ...]
    classes: tuple[str, ...]
    image_size: int | None
    samples_per_shard: int


@dataclass(frozen=True)
class _ShardJob:
    path: Path
    pictures: tuple[Picture, ...]
    labels: tuple[int, ...]
    image_size: int | None


def make_shards(
    source: str | Path,
    destination: str | Path,
    *,
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
    """Write `{split_name}-000000.tar` ... and index.npz into `destination`.

    Args:
        source: a folder with one subfolder of JPEGs and PNGs for each class, or an uncompressed tar of such a folder.
        destination: created; may hold what an interrupted run of the same command left.
        image_size: resize the shorter side to so many pixels, cut out the centre square and encode anew (JPEG quality
            95, PNG stays PNG). Without it the bytes are kept as they are.
        samples_per_shard: the last shard of a split may hold fewer.
        workers: processes; each writes whole shards.
        classes: take only these, label i is classes[i]. Without it all, sorted by name.
        limit: take only so many pictures, balanced over the classes.
        holdout, holdout_destination: share of each class, in (0, 1), that goes to a split of its own there, named
            `{split_name}-holdout`.
        progress: bars on stderr.

    Returns:
        `classes`, `skipped_files` and `splits`: name, folder, samples, shards, bytes and index_hash of each; JSON fits.

    Raises:
        UserError: a bad setting or source, an unreadable picture, a destination with shards of something else.
    """
    if not re.fullmatch(r"[\w-]+", split_name):
        raise UserError(f"split name {split_name!r}: letters, digits, - and _ are right")
    for name, value in {"image size": image_size, "samples per shard": samples_per_shard, "workers": workers}.items():
        if value is not None and value < 1:
            raise UserError(f"{name} {value}: 1 or more is right")
    if (holdout > 0) != (holdout_destination is not None) or not 0 <= holdout < 1:
        raise UserError(f"holdout {holdout}: a share between 0 and 1 together with a destination of its own is right")

    found, skipped = list_pictures(Path(source))
    pictures, names = _choose(found, classes, limit)
    parts = [(split_name, Path(destination), pictures)]
    if holdout_destination is not None:
        kept, held_out = _hold_out(pictures, holdout)
        if Path(holdout_destination).resolve() == Path(destination).resolve():
            raise UserError(f"{destination}: the held-out pictures need a folder of their own")
        parts = [
            (split_name, Path(destination), kept),
            (f"{split_name}-holdout", Path(holdout_destination), held_out),
        ]
    splits = [_Split(name, folder, tuple(part), names, image_size, samples_per_shard) for name, folder, part in parts]
    for split in splits:
        _claim(split)
    return {
        "classes": list(names),
        "skipped_files": len(skipped),
        "splits": [_write_split(split, workers, progress) for split in splits],
    }


def _choose(
    pictures: list[Picture], classes: Sequence[str] | None, limit: int | None
) -> tuple[list[Picture], tuple[str, ...]]:
    """The pictures to take, shuffled so that every shard mixes classes, and the class names in label order."""
    present = {picture.class_name for picture in pictures}
    names = tuple(sorted(present) if classes is None else classes)
    if len(set(names)) < len(names):
        raise UserError(f"classes {','.join(names)}: a class is named twice")
    if missing := [name for name in names if name not in present]:
        raise UserError(f"classes: the source has no pictures of {', '.join(missing)}")
    position = {name: label for label, name in enumerate(names)}
    taken = [picture for picture in pictures if picture.class_name in position]
    if limit is not None:
        if not len(names) <= limit <= len(taken):
            raise UserError(f"limit {limit}: between {len(names)} (one a class) and {len(taken)} is right")
        labels = np.array([position[picture.class_name] for picture in taken])
        taken = [taken[i] for i in np.sort(stratified_order(labels)[:limit])]
    return [taken[i] for i in epoch_order(len(taken), seed=0, epoch=0)], names


def _hold_out(pictures: list[Picture], share: float) -> tuple[list[Picture], list[Picture]]:
    """(kept, held out), both in the order given. Each class gives its first round(share * size), at least one."""
    sizes: dict[str, int] = {}
    for picture in pictures:
        sizes[picture.class_name] = sizes.get(picture.class_name, 0) + 1
    if single := [name for name, size in sizes.items() if size < 2]:
        raise UserError(f"holdout {share}: class {single[0]} has one picture only; two or more are right")
    quota = {name: min(size - 1, max(1, round(share * size))) for name, size in sizes.items()}
    parts: tuple[list[Picture], list[Picture]] = ([], [])
    for picture in pictures:
        held = quota[picture.class_name] > 0
        quota[picture.class_name] -= held
        parts[held].append(picture)
    return parts


def _claim(split: _Split) -> None:
    """Leave a note in the destination of what it will hold, and refuse one that holds something else."""
    rows = [(picture.key, picture.size) for picture in split.pictures]
    note = {
        "split": split.name,
        "image_size": split.image_size,
        "samples_per_shard": split.samples_per_shard,
        "samples": len(rows),
        "sha256": hashlib.sha256(json.dumps([split.classes, rows]).encode()).hexdigest(),
    }
    path = split.folder / _SOURCE_NAME
    try:
        split.folder.mkdir(parents=True, exist_ok=True)
        if path.exists():
            same = json.loads(path.read_bytes()) == note
        else:
            same = not any(split.folder.glob("*.tar")) and not (split.folder / INDEX_NAME).exists()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}") from error
    if not same:
        raise UserError(f"{split.folder}: holds shards of another source or other options; name an empty folder")
    with published(path) as file:
        file.write(json.dumps(note, indent=2).encode())


def _write_split(split: _Split, workers: int, progress: bool) -> dict[str, Any]:
    label = {name: i for i, name in enumerate(split.classes)}
    jobs: list[_ShardJob] = []
    for start in range(0, len(split.pictures), split.samples_per_shard):
        part = split.pictures[start : start + split.samples_per_shard]
        path = split.folder / f"{split.name}-{len(jobs):06d}.tar"
        jobs.append(_ShardJob(path, part, tuple(label[picture.class_name] for picture in part), split.image_size))
    with tqdm(total=len(split.pictures), desc=split.name, unit="img", disable=not progress) as bar:
        index = Index.from_scans(split.folder, _run(jobs, workers, bar), split.classes)
    index.save()
    return {
        "name": split.name,
        "folder": str(split.folder),
        "samples": len(index),
        "shards": len(index.shards),
        "bytes": sum(shard.bytes for shard in index.shards),
        "index_hash": index.hash,
    }


def _run(jobs: list[_ShardJob], workers: int, bar: tqdm) -> list[ShardScan]:
    if workers == 1:
        scans = []
        for job in jobs:
            scans.append(_make_shard(job))
            bar.update(len(job.pictures))
        return scans
    with ProcessPoolExecutor(min(workers, len(jobs)), fork_server(__name__), initializer=settle_in) as pool:
        with signals_held():
            futures = {pool.submit(_make_shard, job): job for job in jobs}
        try:
            for future in as_completed(futures):
                future.result()
                bar.update(len(futures[future].pictures))
        except BrokenProcessPool as error:
            raise UserError("a worker died (out of memory?); the same command goes on with what is missing") from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        return [future.result() for future in futures]


def _make_shard(job: _ShardJob) -> ShardScan:
    """Write the shard unless it is there, and re-read it. One that is there was wholly compared before it got its name:
    keys and labels are enough to know that it belongs here."""
    expected: dict[str, list[Any]] = {
        "key": [picture.key.encode("utf-8", "surrogateescape") for picture in job.pictures],
        "label": list(job.labels),
    }
    if job.path.exists():
        scan = scan_shard(job.path)
        _compare(scan, expected, job.path)
        return scan
    with published(job.path) as file:
        expected["crc32"] = _write_shard(job, file)
        file.flush()
        scan = scan_shard(Path(file.name), job.path.name)
        _compare(scan, expected, job.path)
    return scan


def _compare(scan: ShardScan, expected: dict[str, list[Any]], path: Path) -> None:
    for column, values in expected.items():
        if scan.columns[column].tolist() != values:
            raise UserError(f"{path}: its {column}s are not those of the source; remove the shard and run again")


def _write_shard(job: _ShardJob, file: BinaryIO) -> list[int]:
    """The crc32 of each picture as it was handed to the writer."""
    written = []
    with TarWriter(file, encoder=False, compress=False, mtime=0) as tar:
        for picture, label in zip(job.pictures, job.labels, strict=True):
            extension, data = _encoded(picture, job.image_size)
            tar.write({"__key__": picture.key, extension: data, "cls": str(label).encode()})
            written.append(zlib.crc32(data))
    return written


def _encoded(picture: Picture, image_size: int | None) -> tuple[str, bytes]:
    """(extension, bytes), by content: ImageNet has a PNG named .JPEG. Decoded even where bytes are kept."""
    data = picture.read()
    try:
        image = decode(data)
    except UserError as error:
        raise UserError(f"{picture.name}: {error}") from error
    extension = "png" if data.startswith(_PNG) else "jpg"
    if image_size is None:
        return extension, data
    box = evaluation_box(*image.size, image_size, crop_pct=1.0, crop_mode="center")
    small = image.resize((image_size, image_size), Image.Resampling.BICUBIC, box=box)
    buffer = io.BytesIO()
    small.save(buffer, "PNG" if extension == "png" else "JPEG", quality=_JPEG_QUALITY)
    return extension, buffer.getvalue()
