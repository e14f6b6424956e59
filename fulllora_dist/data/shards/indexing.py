"""Existing shards to an index: each is read once, and its scan survives an interruption."""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from fulllora_dist.core.atomic import atomic_write
from fulllora_dist.core.errors import UserError
from fulllora_dist.core.messages import redacted
from fulllora_dist.data.index import Index, split_index
from fulllora_dist.data.index_file import map_columns, pack_columns
from fulllora_dist.data.shards.classes import CLASSES_NAME, check_count, check_names, names_in
from fulllora_dist.data.shards.fields import FieldNames
from fulllora_dist.data.shards.pool import run_jobs
from fulllora_dist.data.shards.scan import ANY_FIELDS, Shard, ShardScan, scan_file, scan_stream
from fulllora_dist.storage import store, urls
from fulllora_dist.storage.machine_copy import cache_folder

_ASKING = 16  # objects whose length is asked for at a time


def index_shards(
    shards: Sequence[str],
    output: str | None = None,
    *,
    classes: int | Sequence[str] | None = None,
    label_field: str = "label",
    image_field: str | None = None,
    workers: int = 1,
    progress: bool = True,
) -> dict[str, Any]:
    """Read every shard strictly (`scan.scan_stream` lists what is refused) and write one index of them all.

    Args:
        shards: paths and URLs, patterns among them (`store.expand`); their order is that of the sample ids.
        output: folder or URL for index.safetensors, or its full name. Without it, the folder that all shards share.
            Shards below it are recorded by their names within it, so that all can move together; others by their full
            paths or URLs.
        classes: how many, or their names in label order, which labels may be then instead of numbers. Without it,
            those of classes.txt in the folder of the shards (not over http), or else as many as the labels say.
        label_field: of JSON labels.
        image_field: the member of a sample that is the image, as webdataset names it (`png`, `input.jpg`), where there
            are several or none is called just jpg, jpeg, png or webp.
        workers: processes; each reads whole shards.
        progress: a bar on stderr.

    Returns:
        index, samples, shards, bytes, classes, empty_classes, index_hash, reused_shards, skipped_members (of no sample:
        what tools leave, README.md); JSON-able.

    Raises:
        UserError: see above; no index is written then. What was read is kept: the same command resumes.
    """
    if workers < 1:
        raise UserError(f"workers must be >= 1, got {workers}")
    names: list[str] | None = None
    if isinstance(classes, int):
        check_count(classes)
        names = [str(i) for i in range(classes)]
    elif classes is not None:
        names = list(classes)
        check_names(names)
    shard_urls = store.expand(shards)
    if not shard_urls:
        raise UserError("shards: must name at least one, got none")
    beside = _names_beside(shard_urls)
    if names is None:
        names = beside
    elif sorted(names) == sorted(beside or ()) and names != beside:
        raise UserError(
            f"--classes: {CLASSES_NAME} beside the shards has these names in another order; leave --classes out"
        )
    given = None if isinstance(classes, int) or names is None else tuple(names)
    wanted = FieldNames(label_field, image_field, None if names is None else len(names), given)
    wanted.check()
    base, file_name = split_index(output if output is not None else _common_folder(shard_urls))
    store.refuse_read_only(base)
    base = base if urls.is_remote(base) else urls.local_path(base)
    with ThreadPoolExecutor(_ASKING) as pool:
        versions = pool.map(version_of, shard_urls)
        jobs = [ScanJob(url, _recorded_name(url, base), v, wanted) for url, v in zip(shard_urls, versions, strict=True)]
    scans = {job.url: scan for job in jobs if (scan := recorded_scan(job)) is not None}
    reused = len(scans)
    missing = [job for job in jobs if job.url not in scans]
    total = sum(job.version.bytes for job in jobs)
    with tqdm(total=total, desc="shards", unit="B", unit_scale=True, delay=1, disable=not progress) as bar:
        bar.update(total - sum(job.version.bytes for job in missing))
        new = run_jobs(scan_and_record, missing, workers, lambda job: bar.update(job.version.bytes))
    scans |= {job.url: scan for job, scan in zip(missing, new, strict=True)}
    skipped = sum(scan.skipped for scan in scans.values())
    if skipped and not any(scan.shard.samples for scan in scans.values()):
        raise UserError(f"{redacted(shard_urls[0])}: no samples, only {skipped} other members")
    index = Index.from_scans(base, [scans[job.url] for job in jobs], names)
    store.writable_folder(base)
    index.save(file_name)
    for job in jobs:
        forget_scan(job)
    return {
        "index": redacted(urls.join(base, file_name)),
        **index.summary(),
        "classes": len(index.classes),
        "empty_classes": len(index.classes) - len(np.unique(index.labels)),
        "reused_shards": reused,
        "skipped_members": skipped,
    }


def _names_beside(shard_urls: Sequence[str]) -> list[str] | None:
    """Of classes.txt in the folder of all shards; None where there is none."""
    folder, *others = _folders(shard_urls)
    url = urls.join(folder, CLASSES_NAME)
    if others or urls.scheme_of(url) in ("http", "https"):
        return None
    try:
        there = store.exists(url)
    except UserError:  # a bucket that does not say what it lacks
        return None
    return names_in(store.read(url), redacted(url)) if there else None


def _common_folder(shard_urls: Sequence[str]) -> str:
    folders = _folders(shard_urls)
    if len(folders) > 1:
        one, other = sorted(folders)[:2]
        raise UserError(
            f"the shards lie in {len(folders)} folders ({redacted(one)}, {redacted(other)}, ...): "
            "give --output for the index"
        )
    return folders[0]


def _folders(shard_urls: Sequence[str]) -> list[str]:
    """Where the shards lie, each folder once, as it was given first."""
    folders: dict[str, str] = {}
    for url in shard_urls:
        if urls.is_remote(url):  # what signs it or names its version is no part of the path
            mark = "?" if urls.scheme_of(url) in ("http", "https") else "?versionId="
            folder = url.partition(mark)[0].rpartition("/")[0]
            folders.setdefault(folder, folder)
        else:
            folders.setdefault(os.path.dirname(os.path.abspath(url)), os.path.dirname(url) or ".")
    return list(folders.values())


def _recorded_name(url: str, base: str) -> str:
    """What the index calls a shard: its name below `base`, else in full."""
    if not urls.is_remote(url) and not urls.is_remote(base):
        path, folder = os.path.abspath(url), os.path.abspath(base)
        return os.path.relpath(path, folder) if os.path.commonpath([path, folder]) == folder else path
    folder = f"{base.rstrip('/')}/"
    if url.startswith(folder):
        return url[len(folder) :]
    if urls.scheme_of(url) in ("http", "https") and "?" in url:
        raise UserError(
            f"{redacted(url)}: the index would hold what follows the question mark, signatures too; name them "
            "without it, and give credentials to fsspec (docs/data.md)"
        )
    if urls.is_remote(url):
        return url
    raise UserError(f"{url}: an index in a bucket cannot point to local files; upload the shards first")


@dataclass(frozen=True)
class Version:
    """What tells one content of a shard from another without reading it. `mtime` in ns, of local files."""

    bytes: int
    etag: str | None
    mtime: int | None


def version_of(url: str) -> Version:
    """As the store reports it now. UserError where the shard is missing or the server does not report its length."""
    info = store.info(url)
    if info.bytes is None:
        raise UserError(f"{redacted(url)}: the server does not report its length, so byte ranges cannot be read")
    mtime = None if urls.is_remote(url) else os.stat(urls.local_path(url)).st_mtime_ns
    return Version(info.bytes, info.etag, mtime)


@dataclass(frozen=True)
class ScanJob:
    """A shard to read: where it is, what the index will call it, its version, which members are image and label."""

    url: str
    name: str
    version: Version
    wanted: FieldNames = ANY_FIELDS


def scan_and_record(job: ScanJob) -> ShardScan:
    """What the strict pass finds in a shard, which is recorded.

    Raises:
        UserError: what `scan_stream` refuses; the shard has changed while it was read.
    """
    if urls.is_remote(job.url):
        with store.ObjectStream(job.url, job.version.bytes) as stream:
            scan = scan_stream(
                stream, redacted(job.url), length=job.version.bytes, etag=job.version.etag, wanted=job.wanted
            )
    else:
        scan = scan_file(Path(urls.local_path(job.url)), job.url, job.wanted)
    if version_of(job.url) != job.version:
        raise UserError(f"{redacted(job.url)}: changed while it was read")
    scan = scan._replace(shard=replace(scan.shard, url=job.name))
    record_scan(job, scan)
    return scan


def recorded_scan(job: ScanJob) -> ShardScan | None:
    """The scan of an earlier pass over the same version of the shard."""
    path = _record(job)
    if not path.exists():
        return None
    try:
        meta, columns, _ = map_columns(path)
    except UserError:
        return None
    return ShardScan(replace(Shard(**meta["shard"]), url=job.name), columns, meta["skipped"])


def record_scan(job: ScanJob, scan: ShardScan) -> None:
    """Keep a scan in the user's cache folder until an index is written."""
    path = _record(job)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(pack_columns({"shard": asdict(scan.shard), "skipped": scan.skipped}, scan.columns))
    except OSError as error:
        raise UserError(f"{path.parent}: cannot be written ({error.strerror}); set XDG_CACHE_HOME") from error


def forget_scan(job: ScanJob) -> None:
    """An index holds it now."""
    _record(job).unlink(missing_ok=True)


def _record(job: ScanJob) -> Path:
    address = job.url if urls.is_remote(job.url) else os.path.abspath(urls.local_path(job.url))
    name = hashlib.sha256(repr((address, job.version, job.wanted)).encode()).hexdigest()
    return cache_folder() / "scans" / f"{name}.safetensors"
