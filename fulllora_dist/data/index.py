"""The index of a set of WebDataset shards: one row a sample. A sample's id is its row."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Self
from urllib.parse import unquote

import numpy as np

from fulllora_dist.core.errors import UserError
from fulllora_dist.core.messages import redacted
from fulllora_dist.data.index_cache import fetched
from fulllora_dist.data.index_file import DamagedIndex, map_columns, pack_columns
from fulllora_dist.data.shards.scan import COLUMNS, IMAGE_EXTENSIONS, Shard, ShardScan
from fulllora_dist.storage import store, urls

INDEX_NAME = "index.safetensors"
FORMAT_VERSION = 2


class Sample(NamedTuple):
    """Where the bytes of one image lie. `offset` and `size` in bytes, `shard` a position in `Index.shards`."""

    id: int
    shard: int
    url: str
    key: str
    ext: str
    label: int
    offset: int
    size: int
    crc32: int

    def __str__(self) -> str:
        return f"{redacted(self.url)}: sample {self.key} at offset {self.offset}"


@dataclass(frozen=True, eq=False)
class Index:
    """All samples of a set of shards. A sample's id is its row, 0 <= id < len(index).

    Attributes:
        base: folder or URL that the shards' names are relative to; the index lies there.
        classes: class names; a label is a position in them.
        shards: the shards in id order.
        columns: read-only [N] arrays: shard (int32, position in `shards`), label (int64), offset and size (int64,
            bytes), crc32 (uint32), ext (uint8, position in `scan.IMAGE_EXTENSIONS`), key_end (int64); and keys (uint8
            [key_end[-1]], all keys in a row, each ending before its key_end).
        hash: sha256 (hex) over what the ids mean: classes, and key, label, size and crc32 of each row in order. Names,
            etags and packing are left out: a bucket that has moved keeps the ids.
    """

    base: str
    classes: tuple[str, ...]
    shards: tuple[Shard, ...]
    columns: Mapping[str, np.ndarray]
    hash: str
    _mapped: tuple[Path, bytes] | None = field(default=None, repr=False)

    @classmethod
    def from_scans(cls, base: str | Path, scans: Iterable[ShardScan], classes: Sequence[str] | None = None) -> Self:
        """Join the scans of all shards, in order. Refuses a key in two shards and a label without a class.

        Without `classes` the names are the label numbers.
        """
        shards, parts = zip(*((scan.shard, scan.columns) for scan in scans), strict=True)
        columns = {name: np.concatenate([part[name] for part in parts]) for name in COLUMNS if name != "key_end"}
        before = np.cumsum([0, *(len(part["keys"]) for part in parts)])
        columns["key_end"] = np.concatenate([part["key_end"] + n for part, n in zip(parts, before, strict=False)])
        columns["shard"] = np.repeat(np.arange(len(shards), dtype="<i4"), [shard.samples for shard in shards])
        if classes is None:
            classes = [str(label) for label in range(int(columns["label"].max(initial=-1)) + 1)]
        index = cls(str(base), tuple(classes), shards, columns, content_hash(classes, columns))
        index._check()
        index._check_keys()
        return index

    @classmethod
    def load(cls, address: str | Path) -> "Index":
        """Map an index. A process reads and checks a file once, and again only when it has changed.

        Args:
            address: the folder or URL that holds index.safetensors, or the path or URL of such a file under another
                name. A remote one is fetched into the user's cache folder and shared by all processes of the machine.

        Raises:
            UserError: missing, damaged, of another format, pointing outside its shards, or with another hash than its
                content has.
        """
        base, name = split_index(str(address))
        if _names_shards(base):
            raise UserError(f"{redacted(base)}: must be the folder of the shards or its index, not the shards")
        if urls.is_remote(base):
            url = urls.join(base, name)
            try:
                return _loaded(fetched(url), base)
            except DamagedIndex:
                return _loaded(fetched(url, again=True), base)
        path = Path(urls.local_path(base), name)
        if not path.is_file():
            raise UserError(
                f"{path}: no index there; fulllora shards writes one from images, fulllora index from shards"
            )
        return _loaded(path, base)

    @classmethod
    def _map(cls, path: Path, base: str, checksum: bytes | None = None) -> Self:
        """`checksum`: of a file that another process has read and checked."""
        meta, columns, file_checksum = map_columns(path, checksum)
        if meta.get("version") != FORMAT_VERSION:
            raise UserError(f"{path}: index format {meta.get('version')!r}; this program reads {FORMAT_VERSION}")
        try:
            shards = tuple(_shard(shard) for shard in meta["shards"])
            if not all(isinstance(name, str) for name in meta["classes"]):
                raise TypeError("class names must be strings")
            index = cls(base, tuple(meta["classes"]), shards, columns, meta["hash"], (path, file_checksum))
        except (KeyError, TypeError) as error:
            raise UserError(f"{path}: the index is damaged ({error}); rebuild it") from error
        if checksum is None:
            index._check()
            if index.hash != content_hash(index.classes, columns):
                raise UserError(f"{path}: the hash in the index is not that of its content; rebuild it")
        return index

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """A mapped index is pickled as the path of its file, so that worker processes share its pages."""
        if self._mapped is None:
            return Index, (self.base, self.classes, self.shards, self.columns, self.hash)
        path, checksum = self._mapped
        return Index._map, (path, self.base, checksum)

    def save(self, name: str = INDEX_NAME) -> None:
        """Write the index file in `base`, whole or not at all. The same index always gives the same bytes."""
        meta = {
            "version": FORMAT_VERSION,
            "hash": self.hash,
            "classes": self.classes,
            "shards": [asdict(shard) for shard in self.shards],
        }
        store.write(urls.join(self.base, name), pack_columns(meta, self.columns))

    def _check(self) -> None:
        """Refuse columns that do not fit each other, the classes or the shards."""
        columns, shards, base = self.columns, self.shards, redacted(self.base)
        for name, dtype in {**COLUMNS, "shard": "<i4"}.items():
            if name not in columns or columns[name].dtype != dtype:
                raise UserError(f"{base}: the index has no column {name} of type {dtype}; rebuild it")
        rows, labels = columns["shard"], columns["label"]
        if len({len(column) for name, column in columns.items() if name != "keys"}) != 1 or len(rows) == 0:
            raise UserError(f"{base}: the index has no samples or columns of unequal length")
        inside = rows.min() >= 0 and rows.max() < len(shards)  # asked first: bincount is as long as the largest number
        if (
            not inside
            or np.bincount(rows, minlength=len(shards)).tolist() != [shard.samples for shard in shards]
            or (np.diff(rows) < 0).any()
            or columns["offset"].min() < 0
            or columns["size"].min() < 0
            # the sum of offset and size might not fit into 64 bits
            or (columns["size"] > np.array([shard.bytes for shard in shards])[rows] - columns["offset"]).any()
            or (np.diff(columns["key_end"], prepend=0) < 0).any()
            or columns["key_end"][-1] != len(columns["keys"])
            or columns["ext"].max() >= len(IMAGE_EXTENSIONS)
        ):
            raise UserError(f"{base}: the index points outside its shards; rebuild it")
        if _has_controls(columns["keys"]):
            raise UserError(f"{base}: the index has control characters in its keys")
        for shard in shards:
            urls.scheme_of(shard.url)
            if ".." in shard.url.split("/") or (urls.is_remote(self.base) and not _stays_remote(shard.url)):
                raise UserError(f"{base}: the index names a shard {shard.url!r} outside its folder")
        outside = (labels < 0) | (labels >= len(self.classes))
        if outside.any():
            row = int(np.argmax(outside))
            raise UserError(f"{self.sample(row)} has label {labels[row]}; there are {len(self.classes)} classes")

    def _check_keys(self) -> None:
        first: dict[str, int] = {}
        for row in range(len(self)):
            if (earlier := first.setdefault(self.key(row), row)) != row:
                raise UserError(f"{self.sample(row)}: the key is also that of {self.sample(earlier)}")

    @property
    def labels(self) -> np.ndarray:
        """int64 [N], mapped."""
        return self.columns["label"]

    def __len__(self) -> int:
        return len(self.columns["label"])

    def summary(self) -> dict[str, Any]:
        """JSON-able: samples, shards, bytes of all shards, index_hash."""
        size = sum(shard.bytes for shard in self.shards)
        return {"samples": len(self), "shards": len(self.shards), "bytes": size, "index_hash": self.hash}

    def images_in(self, other: "Index") -> int:
        """How many of these images are in `other` too, byte for byte, as far as size and checksum tell."""
        ours, theirs = (i.columns["size"].astype(np.uint64) << 32 | i.columns["crc32"] for i in (self, other))
        return int(np.isin(ours, theirs).sum())

    def shard_url(self, shard: int) -> str:
        """Path or URL of shard number `shard`."""
        return urls.join(self.base, self.shards[shard].url)

    def key(self, sample_id: int) -> str:
        """The WebDataset key of a sample."""
        ends = self.columns["key_end"]
        start = int(ends[sample_id - 1]) if sample_id else 0
        return self.columns["keys"][start : int(ends[sample_id])].tobytes().decode("utf-8", "surrogateescape")

    def sample(self, sample_id: int) -> Sample:
        """Where the image of `sample_id` lies."""
        names = ("shard", "ext", "label", "offset", "size", "crc32")
        shard, ext, *numbers = (int(self.columns[name][sample_id]) for name in names)
        return Sample(sample_id, shard, self.shard_url(shard), self.key(sample_id), IMAGE_EXTENSIONS[ext], *numbers)


@lru_cache(maxsize=16)
def _load_once(path: Path, base: str, version: tuple[int, ...]) -> Index:
    """`version` tells one file under this name from another; who maps a file keeps its inode from being used again."""
    return Index._map(path, base)


def _loaded(path: Path, base: str) -> Index:
    status = path.stat()
    return _load_once(path, base, (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size))


def _shard(metadata: dict[str, Any]) -> Shard:
    shard = Shard(**metadata)
    numbers = (shard.bytes, shard.samples)
    texts = (shard.url, shard.sha256, shard.etag or "")
    if not (all(type(n) is int and 0 <= n < 2**63 for n in numbers) and all(isinstance(t, str) for t in texts)):
        raise TypeError(f"not a shard: {metadata}")
    return shard


def _has_controls(keys: np.ndarray) -> bool:
    """Those of ASCII and the C1 ones, which UTF-8 begins with 0xC2: keys are logged."""
    after = keys[np.flatnonzero(keys[:-1] == 0xC2) + 1]
    return bool(keys.min(initial=255) < 0x20 or (keys == 0x7F).any() or ((after >= 0x80) & (after < 0xA0)).any())


def _stays_remote(name: str) -> bool:
    """Refuse a file of this machine: an index from a bucket must not point to local files."""
    return urls.is_remote(name) if "://" in name else not os.path.isabs(name)


def split_index(address: str) -> tuple[str, str]:
    """(folder, file name) of an index: `address` is the folder itself unless it ends in .safetensors. A
    signature goes to the folder, from where `urls.join` gives it to every file."""
    web = urls.scheme_of(address) in ("http", "https")
    path, mark, query = (
        address.partition("?" if web else "?versionId=") if urls.is_remote(address) else (address, "", "")
    )
    if not path.endswith(".safetensors"):
        return address, INDEX_NAME
    folder, _, name = path.rpartition("/")
    if web:
        return folder + mark + query, unquote(name)
    return folder or ".", name + mark + query


def _names_shards(base: str) -> bool:
    """Whether it is a shard or a pattern of them, and no folder that is called so."""
    path = base.partition("?")[0] if base.lower().startswith("http") else base
    return bool(re.search(r"[*{]|\.tar$", path)) and (urls.is_remote(base) or not os.path.isdir(urls.local_path(base)))


def content_hash(classes: Sequence[str], columns: Mapping[str, np.ndarray]) -> str:
    """`Index.hash` of an index of such parts."""
    digest = hashlib.sha256(json.dumps(list(classes)).encode())
    for name in ("keys", "key_end", "label", "size", "crc32"):
        digest.update(np.ascontiguousarray(columns[name]).data)
    return digest.hexdigest()
