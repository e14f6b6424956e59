"""The images that shards are made of: in a folder, in a tar of one, or in a tar of tars."""

import itertools
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NoReturn

from fulllora_dist.core.errors import UserError
from fulllora_dist.data.shards.fields import IMAGE_EXTENSIONS
from fulllora_dist.data.shards.labels import bare_name
from fulllora_dist.data.shards.leftovers import leftover
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


@dataclass(frozen=True)
class Listing:
    """What a source holds.

    Attributes:
        images: sorted by key.
        classes: of the images, and those without any: empty folders, classes that only the labels file has.
        others: the names of all other files.
        leftovers: hidden folders and those of tools, which were not looked into.
        unused_labels: names in the labels file that no image has.
    """

    images: list[SourceImage]
    classes: frozenset[str]
    others: list[str]
    leftovers: list[str]
    unused_labels: int = 0


def list_images(source: Path, labels: Mapping[str, str] | None) -> Listing:
    """List a source.

    Args:
        source: a folder; an uncompressed tar of one; or an uncompressed tar of such tars, one a class, as ImageNet's
            training part comes.
        labels: image name without extension -> class (`labels.read_labels`). None: the folder (or inner tar) is
            the class.

    Raises:
        UserError: no such source, no images, class folders on different levels or of several roots (train/ and val/),
            an image that `labels` does not know, two images with one key, what cannot be read.
    """
    folders: set[str] = set()
    if source.is_dir():
        files = _in_folder(source, folders)
    elif source.is_file():
        files = _in_tar(source, folders)
    else:
        raise UserError(f"{source}: no such folder or tar")
    images: list[SourceImage] = []
    others: list[str] = []
    for file in files:
        name = PurePosixPath(file.name)
        folders.add(str(name.parent))
        if leftover(str(name.parent)) is None:
            if name.suffix.lower() in _SUFFIXES and leftover(name.name) is None:
                images.append(file)
            else:
                others.append(file.name)
    if not images:
        raise UserError(f"{source}: no {', '.join(_SUFFIXES)} files")
    leftovers = {path for folder in folders if (path := leftover(folder)) is not None}
    unused = 0
    if labels is None:
        classes = _class_folders(source, images, folders)
    else:
        images, unused = _labelled(images, labels)
        classes = frozenset(labels.values())
    images.sort(key=lambda image: image.key)
    for image in images:
        if not re.fullmatch(r"[^\x00-\x1f\x7f-\x9f\ud800-\udfff]+", image.key):
            raise UserError(f"{source}: {image.name!r}: a name must be UTF-8 without control characters; rename it")
    for one, other in itertools.pairwise(images):
        if one.key == other.key:
            raise UserError(f"{source}: {one.name} and {other.name} would both be sample {one.key}; rename one")
    return Listing(images, classes, others, sorted(leftovers), unused)


def _class_folders(source: Path, images: list[SourceImage], folders: set[str]) -> frozenset[str]:
    """Those with images, and the empty ones beside them."""
    roots = sorted({str(PurePosixPath(image.name).parent.parent) for image in images})
    if any(not image.class_name for image in images) or len(roots) > 1:
        raise UserError(
            f"{source}: images must lie in class folders side by side (or --labels names their classes); "
            f"found {', '.join(roots[:4])}"
        )
    paths = [PurePosixPath(folder) for folder in folders if leftover(folder) is None]
    return frozenset(path.name for path in paths if path.name and str(path.parent) == roots[0])


def _labelled(images: list[SourceImage], labels: Mapping[str, str]) -> tuple[list[SourceImage], int]:
    """The images with their classes, and how many labels are left. A label whose name has fewer folders than the image,
    or more, is its label if those that both have are the same."""
    by_stem: dict[str, list[str]] = {}
    for name in labels:
        by_stem.setdefault(PurePosixPath(name).name, []).append(name)
    found, unlabelled = [], []
    used: set[str] = set()
    for image in images:
        name = bare_name(image.name)
        candidates = by_stem.get(PurePosixPath(name).name, [])
        names = [name] if name in labels else [label for label in candidates if _same_end(label, name)]
        classes = {labels[label] for label in names}
        if len(classes) > 1:
            raise UserError(f"{image.name}: the labels file has several classes for it ({', '.join(names[:3])})")
        used.update(names)
        found += [replace(image, class_name=class_name) for class_name in classes]
        unlabelled += [] if classes else [name]
    if unlabelled:
        more = f" and {len(unlabelled) - 5} other images" if len(unlabelled) > 5 else ""
        raise UserError(f"the labels file has no class for {', '.join(sorted(unlabelled)[:5])}{more}")
    return found, len(labels) - len(used)


def _same_end(one: str, other: str) -> bool:
    return f"/{one}".endswith(f"/{other}") or f"/{other}".endswith(f"/{one}")


def _image(name: str, path: Path, offset: int, size: int) -> SourceImage:
    return SourceImage(name, path, offset, size, PurePosixPath(name).parent.name)


def _in_folder(source: Path, folders: set[str]) -> Iterator[SourceImage]:
    """Its files; all folders go to `folders`."""

    def refuse(error: OSError) -> NoReturn:  # os.walk would leave the folder out
        raise _unreadable(error.filename, error) from error

    for folder, inner, names in os.walk(source, onerror=refuse, followlinks=True):
        folders.update(Path(folder, name).relative_to(source).as_posix() for name in inner)
        inner[:] = [name for name in inner if leftover(name) is None]
        for name in names:
            path = Path(folder, name)
            try:
                size = path.stat().st_size
            except OSError as error:
                raise _unreadable(path, error) from error
            yield _image(path.relative_to(source).as_posix(), path, 0, size)


def _unreadable(path: str | Path, error: OSError) -> UserError:
    return UserError(f"{path}: cannot be read ({error.strerror}); fix its permissions or link, or remove it")


def _in_tar(source: Path, folders: set[str]) -> Iterator[SourceImage]:
    try:
        with open(source, "rb") as file:
            for member in _plain_files(file, str(source), os.fstat(file.fileno()).st_size, folders):
                name = member.name.removeprefix("./")
                if name.endswith(".tar") and leftover(name) is None:
                    folders.add(name.removesuffix(".tar"))
                    yield from _in_inner_tar(source, name, member.offset_data, member.size, folders)
                else:
                    yield _image(name, source, member.offset_data, member.size)
    except OSError as error:
        raise _unreadable(source, error) from error


def _in_inner_tar(source: Path, name: str, start: int, size: int, folders: set[str]) -> Iterator[SourceImage]:
    """Its images, as if they lay in a folder of the tar's name."""
    folder = name.removesuffix(".tar")
    with open(source, "rb") as file:
        for member in _plain_files(_Section(file, start, size), f"{source}: {name}", size, set()):
            inner = PurePosixPath(member.name)
            if part := leftover(str(inner.parent)):
                folders.add(f"{folder}/{part}")
            else:
                yield _image(f"{folder}/{inner.name}", source, start + member.offset_data, member.size)


def _plain_files(stream: Readable, name: str, length: int, folders: set[str]) -> Iterator[Member]:
    for member in walk_tar(stream, name, length):
        if member.is_folder:
            folders.add(str(PurePosixPath(member.name)))
        elif member.is_file:
            yield member
        elif leftover(member.name) is None:
            raise UserError(f"{name}: member {member.name!r} is a link or a device; pack plain files")


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
