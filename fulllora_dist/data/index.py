"""The index of a folder of WebDataset shards: one row a sample. A sample's id is its row."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, NamedTuple, Self

import numpy as np

from fulllora_dist.data.scan import COLUMNS, Shard, ShardScan, scan_shard
from fulllora_dist.errors import UserError

INDEX_NAME = "index.npz"
FORMAT_VERSION = 1


class Sample(NamedTuple):
    """Where the bytes of one picture lie. `offset` and `size` in bytes."""

    shard: str
    key: str
    offset: int
    size: int
    crc32: int

    def __str__(self) -> str:
        return f"{self.shard}: sample {self.key} at offset {self.offset}"


@contextmanager
def published(path: Path) -> Iterator[BinaryIO]:
    """A file to write that appears as `path` only once it is whole and on disk (temporary name, fsync, rename)."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@dataclass(frozen=True, eq=False)
class Index:
    """All samples of a folder of shards. A sample's id is its row, 0 <= id < len(index).

    Attributes:
        folder: where the shards lie.
        classes: class names; a label is a position in them.
        shards: the shards in id order.
        columns: [N] arrays: shard (int32, position in `shards`), key (bytes), label (int32), offset and size (int64,
            bytes), crc32 (uint32), ext (bytes).
    """

    folder: Path
    classes: tuple[str, ...]
    shards: tuple[Shard, ...]
    columns: dict[str, np.ndarray]

    @classmethod
    def build(cls, folder: str | Path, classes: Sequence[str] | None = None) -> Self:
        """Index every `*.tar` of `folder`, in name order, by one strict pass (`scan.scan_shard` lists what it refuses).

        Without `classes` the names are the label numbers. The file is not written: `save` does that.
        """
        folder = Path(folder)
        paths = sorted(folder.glob("*.tar"))
        if not paths:
            raise UserError(f"{folder}: no *.tar shards there")
        return cls.from_scans(folder, (scan_shard(path) for path in paths), classes)

    @classmethod
    def from_scans(cls, folder: Path, scans: Iterable[ShardScan], classes: Sequence[str] | None = None) -> Self:
        """Join the scans of all shards, in order. Refuses a key in two shards and a label without a class."""
        shards, parts = zip(*scans, strict=True)
        columns = {name: np.concatenate([part[name] for part in parts]) for name in COLUMNS}
        columns["shard"] = np.repeat(np.arange(len(shards), dtype="<i4"), [shard.samples for shard in shards])
        if classes is None:
            classes = [str(label) for label in range(int(columns["label"].max(initial=-1)) + 1)]
        index = cls(folder, tuple(classes), shards, columns)
        _, first, counts = np.unique(columns["key"], return_index=True, return_counts=True)
        if (counts > 1).any():
            row = int(first[counts > 1][0])
            same = columns["shard"][columns["key"] == columns["key"][row]]
            where = " and ".join(shards[i].name for i in same[:2])
            raise UserError(f"key {index.sample(row).key} occurs twice: in {where}")
        index._check_ranges()
        return index

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read `folder/index.npz`. Raises UserError where it is missing, damaged or of another format."""
        path = Path(folder) / INDEX_NAME
        if not path.is_file():
            raise UserError(f"{path}: no index there; tools/make_shards.py writes one beside the shards")
        try:
            with np.load(path, allow_pickle=False) as arrays:
                meta = json.loads(arrays["meta"].tobytes())
                if meta["version"] != FORMAT_VERSION:
                    raise UserError(f"{path}: index format {meta['version']!r}; this program reads {FORMAT_VERSION}")
                columns = {name: arrays[name] for name in [*COLUMNS, "shard"]}
            shards = tuple(Shard(**shard) for shard in meta["shards"])
            index = cls(Path(folder), tuple(meta["classes"]), shards, columns)
            intact = index.hash == meta["hash"]
        except UserError:
            raise
        except Exception as error:  # zipfile and numpy raise nearly anything on bad bytes
            raise UserError(f"{path}: the index is damaged ({error}); make it anew") from error
        if not intact:
            raise UserError(f"{path}: the index is damaged (its hash does not fit its rows); make it anew")
        index._check_ranges()
        return index

    def save(self) -> None:
        """Write `folder/index.npz`, whole or not at all. The same index always gives the same bytes."""
        meta = {
            "version": FORMAT_VERSION,
            "hash": self.hash,
            "classes": self.classes,
            "shards": [asdict(shard) for shard in self.shards],
        }
        text = np.frombuffer(json.dumps(meta, sort_keys=True).encode(), dtype=np.uint8)
        with published(self.folder / INDEX_NAME) as file:
            np.savez(file, meta=text, **self.columns)  # type: ignore[arg-type]

    def _check_ranges(self) -> None:
        labels, rows, lengths = self.columns["label"], self.columns["shard"], [shard.bytes for shard in self.shards]
        if len({len(column) for column in self.columns.values()}) != 1 or len(labels) == 0:
            raise UserError(f"{self.folder}: the index has no samples or columns of unequal length")
        if labels.min() < 0 or labels.max() >= len(self.classes):
            row = int(np.argmax((labels < 0) | (labels >= len(self.classes))))
            raise UserError(f"{self.sample(row)} has label {labels[row]}; there are {len(self.classes)} classes")
        ends = self.columns["offset"] + self.columns["size"]
        if rows.min() < 0 or rows.max() >= len(lengths) or (ends > np.array(lengths)[rows]).any():
            raise UserError(f"{self.folder / INDEX_NAME}: the index points outside its shards; make it anew")

    @cached_property
    def hash(self) -> str:
        """sha256 (hex) over what the ids mean: classes, and key, label, size and crc32 of each row in order.

        Offsets and shard names are left out: packing the same samples in the same order differently keeps the ids.
        """
        digest = hashlib.sha256(json.dumps(self.classes).encode())
        digest.update(b"\0".join(self.columns["key"].tolist()))
        for name in ("label", "size", "crc32"):
            digest.update(np.ascontiguousarray(self.columns[name], dtype=COLUMNS[name]).tobytes())
        return digest.hexdigest()

    @cached_property
    def labels(self) -> np.ndarray:
        """int64 [N]."""
        return self.columns["label"].astype(np.int64)

    def __len__(self) -> int:
        return len(self.columns["label"])

    def sample(self, sample_id: int) -> Sample:
        """Where the picture of `sample_id` lies."""
        row = {name: column[sample_id] for name, column in self.columns.items()}
        key = row["key"].decode("utf-8", "surrogateescape")
        shard = self.shards[row["shard"]].name
        return Sample(shard, key, int(row["offset"]), int(row["size"]), int(row["crc32"]))
