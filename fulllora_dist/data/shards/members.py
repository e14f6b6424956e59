"""Tar members to samples by webdataset's rule, without what tools leave between them."""

import re
import zlib
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace

from fulllora_dist.core.errors import UserError
from fulllora_dist.data.shards.fields import IMAGE_EXTENSIONS, LABEL_EXTENSIONS, Field, FieldNames, last_extension
from fulllora_dist.data.shards.leftovers import leftover
from fulllora_dist.data.shards.tar import Member

_MAX_LABEL_BYTES = 1 << 20  # a JSON label is held in memory whole
_MAX_IMAGE_BYTES = 1 << 30  # so is an image, in each worker; one that may be decoded has far less
# webdataset's rule: the key ends at the first dot of the file name, folders belong to the key.
_MEMBER_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")  # keys are logged


class SampleGrouping:
    """Groups the members of one shard. Members that are neither image nor label (captions, README.md) may stand
    anywhere; the others of a sample must be neighbours, as for webdataset."""

    def __init__(self, shard: str, wanted: FieldNames):
        self._shard, self._wanted = shard, wanted
        self._leftovers = 0
        self._others: dict[str, list[str]] = {}  # key -> extensions of members that began no sample

    def samples(self, members: Iterable[Member]) -> Iterator[tuple[str, dict[str, Field]]]:
        """(key, fields by extension) of each run of neighbours that share a key.

        Raises:
            UserError: a link or a device; a name that leaves the shard; two members with one name, side by side; an
                image or label too large to be one.
        """
        current, fields = "", dict[str, Field]()
        for member in members:
            if member.is_folder:
                continue
            described = f"{self._shard}: member {member.name!r} at offset {member.offset}"
            if not member.is_file:
                raise UserError(f"{described} is not a plain file")
            if member.name.startswith("/") or ".." in member.name.split("/") or _CONTROL.search(member.name):
                raise UserError(f"{described}: a name must stay inside the shard and have no control characters")
            match = _MEMBER_NAME.fullmatch(member.name)
            if match is None or leftover(member.name) is not None:
                self._leftovers += 1
                continue
            key, extension = match[1], match[2].lower()
            if key != current or not fields:
                if last_extension(extension) not in (*IMAGE_EXTENSIONS, *LABEL_EXTENSIONS):
                    self._others.setdefault(key, []).append(extension)
                    continue
                if fields:
                    yield current, fields
                current, fields = key, {}
            if extension in fields:
                raise UserError(f"{described} occurs twice in its sample")
            fields[extension] = self._read(member, extension, described)
        if fields:
            yield current, fields

    def extensions(self, key: str, fields: Iterable[str]) -> list[str]:
        """All that has been seen under a key."""
        return [*self._others.get(key, ()), *fields]

    def skipped(self, keys: Collection[str]) -> int:
        """Members that belong to no sample, where `keys` are the samples'."""
        return self._leftovers + sum(len(names) for key, names in self._others.items() if key not in keys)

    def _read(self, member: Member, extension: str, described: str) -> Field:
        field = Field(extension, member.offset_data, member.size)
        if self._wanted.images((extension,)):
            if not 0 < member.size <= _MAX_IMAGE_BYTES:
                raise UserError(f"{described} has {member.size} bytes; an image has 1 to {_MAX_IMAGE_BYTES}")
            crc32 = 0
            for chunk in member.chunks():
                crc32 = zlib.crc32(chunk, crc32)
            return replace(field, crc32=crc32)
        if extension in LABEL_EXTENSIONS:
            if member.size > _MAX_LABEL_BYTES:
                raise UserError(f"{described} has {member.size} bytes; a label may have at most {_MAX_LABEL_BYTES}")
            return replace(field, text=b"".join(member.chunks()))
        return field
