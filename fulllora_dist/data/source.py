"""The pictures that shards are made of: in a folder, or in a tar of one."""

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from fulllora_dist.data.scan import walk_tar
from fulllora_dist.errors import UserError

_SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class Picture:
    """One source file: `name` inside the source, and where its bytes lie (`offset` is 0 for a file of its own)."""

    name: str
    path: Path
    offset: int
    size: int

    @property
    def class_name(self) -> str:
        """The folder that it lies in."""
        return PurePosixPath(self.name).parent.name

    @property
    def key(self) -> str:
        """`class/name` without extension; a WebDataset key ends at the first dot, so it has none."""
        return f"{self.class_name}/{PurePosixPath(self.name).stem}".replace(".", "_")

    def read(self) -> bytes:
        """All its bytes, or UserError."""
        try:
            with open(self.path, "rb") as file:
                data = os.pread(file.fileno(), self.size, self.offset)
        except OSError as error:
            raise UserError(f"{self.name}: cannot be read ({error.strerror})") from error
        if len(data) != self.size:
            raise UserError(f"{self.name}: has changed since it was listed")
        return data


def list_pictures(source: Path) -> tuple[list[Picture], list[str]]:
    """(the JPEGs and PNGs sorted by key, the names of all other files).

    Raises:
        UserError: no such source, no pictures in class folders, class folders on different levels or of several
            roots (train/ and val/), two pictures with one key.
    """
    if source.is_dir():
        files = _in_folder(source)
    elif source.is_file():
        files = _in_tar(source)
    else:
        raise UserError(f"{source}: no such folder or tar")
    pictures, others = [], []
    for file in files:
        name = PurePosixPath(file.name)
        # "._x.jpg" is what macOS puts beside x.jpg
        if name.suffix.lower() in _SUFFIXES and not name.name.startswith("."):
            pictures.append(file)
        else:
            others.append(file.name)
    pictures.sort(key=lambda picture: picture.key)
    if not pictures:
        raise UserError(f"{source}: no .jpg, .jpeg or .png files there")
    roots = sorted({str(PurePosixPath(picture.name).parent.parent) for picture in pictures})
    if not pictures[0].class_name or len(roots) > 1:
        raise UserError(f"{source}: pictures must lie in class folders side by side; found {', '.join(roots[:4])}")
    for one, other in itertools.pairwise(pictures):
        if one.key == other.key:
            raise UserError(f"{source}: {one.name} and {other.name} would both be sample {one.key}; rename one")
    return pictures, others


def _in_folder(source: Path) -> Iterator[Picture]:
    for folder, _, names in os.walk(source, followlinks=True):
        for name in names:
            path = Path(folder, name)
            yield Picture(path.relative_to(source).as_posix(), path, 0, path.stat().st_size)


def _in_tar(source: Path) -> Iterator[Picture]:
    with open(source, "rb") as stream:
        for member in walk_tar(stream, str(source)):
            if member.isreg() and not member.issparse():
                yield Picture(member.name.removeprefix("./"), source, member.offset_data, member.size)
