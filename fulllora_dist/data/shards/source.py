"""The images that shards are made of: in a folder, in a tar of one, or in a tar of tars."""

import itertools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NoReturn

from fulllora_dist.core.errors import UserError
from fulllora_dist.data.shards.scan import IMAGE_EXTENSIONS
from fulllora_dist.data.shards.tar import Member, Readable, walk_tar

_SUFFIXES = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)


@dataclass(frozen=True)
class SourceImage:
    """One source file: `name` inside the source, and where its bytes lie (`offset` is 0 for a file of its own)."""

    name: str
    path: Path
    offset: int
    size: int
    class_name: str

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
            raise UserError(f"{self.name}: changed since it was listed")
        return data


def list_images(source: Path, labels: Mapping[str, str] | None = None) -> tuple[list[SourceImage], list[str]]:
    """(the images sorted by key, the names of all other files).

    Args:
        source: a folder; an uncompressed tar of one; or an uncompressed tar of such tars, one a class, as ImageNet's
            training part comes.
        labels: file name without extension -> class. Without it, the folder (or inner tar) is the class.

    Raises:
        UserError: no such source, no images, class folders on different levels or of several roots (train/ and val/),
            an image that `labels` does not know, two images with one key, what cannot be read.
    """
    if source.is_dir():
        files = _in_folder(source)
    elif source.is_file():
        files = _in_tar(source)
    else:
        raise UserError(f"{source}: no such folder or tar")
    images: list[SourceImage] = []
    others: list[str] = []
    for file in files:
        name = PurePosixPath(file.name)
        # "._x.jpg" is what macOS puts beside x.jpg
        if name.suffix.lower() in _SUFFIXES and not name.name.startswith("."):
            images.append(file if labels is None else _labelled(file, labels))
        else:
            others.append(file.name)
    images.sort(key=lambda image: image.key)
    if not images:
        raise UserError(f"{source}: no {', '.join(_SUFFIXES)} files")
    if labels is None:
        roots = sorted({str(PurePosixPath(image.name).parent.parent) for image in images})
        if not images[0].class_name or len(roots) > 1:
            raise UserError(
                f"{source}: images must lie in class folders side by side (or --labels names their classes); "
                f"found {', '.join(roots[:4])}"
            )
    for one, other in itertools.pairwise(images):
        if one.key == other.key:
            raise UserError(f"{source}: {one.name} and {other.name} would both be sample {one.key}; rename one")
    return images, others


def _labelled(image: SourceImage, labels: Mapping[str, str]) -> SourceImage:
    stem = PurePosixPath(image.name).stem
    if stem not in labels:
        raise UserError(f"{image.name}: the labels file has no class for {stem}")
    return replace(image, class_name=labels[stem])


def _image(name: str, path: Path, offset: int, size: int) -> SourceImage:
    return SourceImage(name, path, offset, size, PurePosixPath(name).parent.name)


def _in_folder(source: Path) -> Iterator[SourceImage]:
    def refuse(error: OSError) -> NoReturn:  # os.walk would leave the folder out
        raise _unreadable(error.filename, error) from error

    for folder, _, names in os.walk(source, onerror=refuse, followlinks=True):
        for name in names:
            path = Path(folder, name)
            try:
                size = path.stat().st_size
            except OSError as error:
                raise _unreadable(path, error) from error
            yield _image(path.relative_to(source).as_posix(), path, 0, size)


def _unreadable(path: str | Path, error: OSError) -> UserError:
    return UserError(f"{path}: cannot be read ({error.strerror}); fix its permissions or link, or remove it")


def _in_tar(source: Path) -> Iterator[SourceImage]:
    try:
        with open(source, "rb") as file:
            for member in _plain_files(file, str(source), os.fstat(file.fileno()).st_size):
                if member.name.endswith(".tar"):
                    yield from _in_inner_tar(source, member.name, member.offset_data, member.size)
                else:
                    yield _image(member.name.removeprefix("./"), source, member.offset_data, member.size)
    except OSError as error:
        raise _unreadable(source, error) from error


def _in_inner_tar(source: Path, name: str, start: int, size: int) -> Iterator[SourceImage]:
    """Its images, as if they lay in a folder of the tar's name."""
    folder = name.removesuffix(".tar")
    with open(source, "rb") as file:
        for member in _plain_files(_Section(file, start, size), f"{source}: {name}", size):
            inner = f"{folder}/{PurePosixPath(member.name).name}".removeprefix("./")
            yield _image(inner, source, start + member.offset_data, member.size)


def _plain_files(stream: Readable, name: str, length: int) -> Iterator[Member]:
    for member in walk_tar(stream, name, length):
        if member.is_folder:
            continue
        if not member.is_file:
            raise UserError(f"{name}: member {member.name!r} is a link or a device; pack plain files")
        yield member


class _Section:
    """Bytes [start, start + size) of a file, as a file."""

    def __init__(self, file: BinaryIO, start: int, size: int):
        self._file, self._start, self._size = file, start, size
        file.seek(start)

    def seek(self, position: int) -> int:
        return self._file.seek(self._start + position) - self._start

    def read(self, size: int) -> bytes:
        remaining = self._start + self._size - self._file.tell()
        return self._file.read(max(0, min(size, remaining)))
