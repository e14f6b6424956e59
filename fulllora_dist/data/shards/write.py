"""One shard: written from its images, read again, and compared with what was to be written."""

import io
import math
import tempfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from webdataset import ShardWriter

from fulllora_dist.core.atomic import atomic_write
from fulllora_dist.core.errors import UserError
from fulllora_dist.data.decode import decode, image_format
from fulllora_dist.data.shards.indexing import ScanJob, record_scan, recorded_scan, scan_and_record, version_of
from fulllora_dist.data.shards.scan import ShardScan, scan_file
from fulllora_dist.data.shards.source import SourceImage
from fulllora_dist.data.transforms import centre_crop
from fulllora_dist.storage import store, urls

_JPEG_QUALITY = 95
_EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


@dataclass(frozen=True)
class ShardJob:
    """A shard to write: its path or URL, and which images with which labels it will hold."""

    url: str
    images: tuple[SourceImage, ...]
    labels: tuple[int, ...]
    image_size: int | None

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


def make_shard(job: ShardJob) -> tuple[ScanJob, ShardScan]:
    """Write the shard unless it is there, and re-read it. One that is there was wholly compared before it got its name:
    keys and labels are enough to know that it belongs here. What was read is recorded, for a run after this one."""
    expected: dict[str, list[Any]] = {"key": [image.key for image in job.images], "label": list(job.labels)}
    scan = None if store.exists(job.url) else _write(job, expected)
    scan_job = ScanJob(job.url, job.name, version_of(job.url))
    if scan is not None:
        scan = scan._replace(shard=replace(scan.shard, etag=scan_job.version.etag))
        record_scan(scan_job, scan)
    else:
        scan = recorded_scan(scan_job) or scan_and_record(scan_job)
        _compare(scan, expected, job.url)
    return scan_job, scan


def _write(job: ShardJob, expected: dict[str, list[Any]]) -> ShardScan:
    if not urls.is_remote(job.url):
        with atomic_write(Path(job.url)) as file:
            return _write_checked(job, file, expected)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, job.name)
        with open(path, "wb") as file:
            scan = _write_checked(job, file, expected)
        store.upload(path, job.url)
    return scan


def _write_checked(job: ShardJob, file: BinaryIO, expected: dict[str, list[Any]]) -> ShardScan:
    crc32 = _write_samples(job, file)
    file.flush()
    scan = scan_file(Path(file.name), job.name)
    _compare(scan, {**expected, "crc32": crc32}, job.url)
    return scan


def _compare(scan: ShardScan, expected: dict[str, list[Any]], url: str) -> None:
    for column, values in expected.items():
        scanned = scan.keys() if column == "key" else scan.columns[column].tolist()
        if scanned != values:
            raise UserError(f"{url}: its {column}s are not those of the source; remove the shard and run again")


def _write_samples(job: ShardJob, file: BinaryIO) -> list[int]:
    """The crc32 of each image as it was handed to the writer."""
    checksums = []
    with ShardWriter(
        "%d", maxcount=len(job.images), maxsize=math.inf, verbose=0,
        opener=lambda _: file, encoder=False, compress=False, mtime=0,
    ) as shard:  # fmt: skip
        for image, label in zip(job.images, job.labels, strict=True):
            extension, data = _encoded(image, job.image_size)
            shard.write({"__key__": image.key, extension: data, "cls": str(label).encode()})
            checksums.append(zlib.crc32(data))
    return checksums


def _encoded(image: SourceImage, image_size: int | None) -> tuple[str, bytes]:
    """(extension, bytes), by content: ImageNet has a PNG named .JPEG."""
    data = image.read()
    kind = image_format(data)
    if image_size is None:
        return _EXTENSIONS[kind], data
    kind = "PNG" if kind == "PNG" else "JPEG"
    small = centre_crop(decode(data), image_size, crop_pct=1.0, crop_mode="center", interpolation="bicubic")
    buffer = io.BytesIO()
    small.save(buffer, kind, quality=_JPEG_QUALITY)
    return _EXTENSIONS[kind], buffer.getvalue()
