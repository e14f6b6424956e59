"""Shards whose images are any bytes, and a transform that shows which ones arrived."""

import io
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from fulllora_dist.core.errors import UserError
from fulllora_dist.data.batch import Batch
from fulllora_dist.data.shards.indexing import index_shards

UNREADABLE = b"not an image"


class Checksum:
    """An image of 2 x 2 pixels that holds the crc32 of the bytes and 32 random bits; picklable."""

    size = 2

    def __call__(self, data: bytes, rng: np.random.Generator) -> torch.Tensor:
        if data.startswith(UNREADABLE):
            raise UserError("no readable image")
        numbers = [zlib.crc32(data), int(rng.integers(0, 2**32)), len(data)]
        return torch.frombuffer(bytearray(np.array(numbers, "<u4").tobytes()), dtype=torch.uint8).view(3, 2, 2)


def write_shards(folder: Path, lengths: Sequence[int], seed: int = 0, size: int = 300) -> Path:
    """One shard for each of `lengths`, sorted by class, and their index. Sizes of the images vary around `size`."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    total, done = sum(lengths), 0
    for number, length in enumerate(lengths):
        with tarfile.open(folder / f"part-{number:03d}.tar", "w") as tar:
            for i in range(length):
                data = rng.bytes(int(rng.integers(1, 2 * size)))
                for extension, content in (("jpg", data), ("cls", str(10 * done // total).encode())):
                    member = tarfile.TarInfo(f"d{number}/{i:04d}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
                done += 1
    index_shards([str(folder)], classes=10, progress=False)
    return folder


def in_tars(folder: Path) -> Counter:
    """(key, crc32) of every image, as tarfile reads them."""
    found: Counter = Counter()
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar.getmembers():
                if member.name.endswith(".jpg"):
                    found[member.name[:-4], zlib.crc32(tar.extractfile(member).read())] += 1  # type: ignore[union-attr]
    return found


def checksums(batch: Batch) -> list[int]:
    """crc32 of the bytes that each unmasked image was made of."""
    numbers = batch.images[batch.mask].reshape(-1, 12).numpy().copy().view("<u4")
    return numbers[:, 0].tolist()


def arrived(index, batches: Iterable[Batch]) -> Counter:
    """(key, crc32) of the unmasked samples."""
    found: Counter = Counter()
    for batch in batches:
        for sample, crc in zip(batch.ids[batch.mask].tolist(), checksums(batch), strict=True):
            found[index.key(sample), crc] += 1
    return found
