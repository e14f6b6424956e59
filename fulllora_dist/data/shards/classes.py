"""Class names in label order: by number, by text or as they are given, and what to tell the user about it."""

import itertools
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

from fulllora_dist.core.errors import UserError

MAX_CLASSES = 1_000_000  # above any real set; a wild label must not make a name for each number below it
_NAMED = 5  # names that a message shows
_NUMBER = re.compile(r"-?[0-9]{1,18}")
_WORDNET_LINE = re.compile(r"(n[0-9]{8})[ \t,]+\S.*")  # synset_words.txt, LOC_synset_mapping.txt

CLASSES_NAME = "classes.txt"
"""Beside shards: the names of their classes, one a line in label order."""


def read_classes(path: Path) -> list[str]:
    """Names of a UTF-8 text file, one a line in label order. Of lines `n01440764 tench, ...` the WordNet ids.

    Raises:
        UserError: unreadable, or JSON; an empty line between others, a name twice.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _no_names(path) from error
    return names_in(content, path)


def names_in(content: bytes, path: object) -> list[str]:
    """What `read_classes` returns, of the content of the file `path`."""
    try:
        lines = [line.strip() for line in content.decode("utf-8-sig").rstrip().split("\n")]
    except UnicodeDecodeError as error:
        raise _no_names(path) from error
    if lines[0][:1] in ("{", "["):
        raise UserError(f"--classes: {path} is JSON; it must have one class name per line, in label order")
    if all(_WORDNET_LINE.fullmatch(line) for line in lines):
        lines = [line[:9] for line in lines]
    check_names(lines)
    return lines


def _no_names(path: object) -> UserError:
    return UserError(f"--classes: {path} cannot be read as UTF-8 text with one class name per line")


def check_names(names: Sequence[str]) -> None:
    """Raise UserError unless each label has a name of its own."""
    first: dict[str, int] = {}
    for label, name in enumerate(names):
        if not name.strip() or first.setdefault(name, label) != label:
            raise UserError(f"classes: number {label} is {name!r}; each label needs a name of its own")


def check_count(classes: int) -> None:
    """Raise UserError for an impossible number of classes."""
    if not 1 <= classes <= MAX_CLASSES:
        raise UserError(f"classes must be between 1 and {MAX_CLASSES}, got {classes}")


def order_classes(
    present: Collection[str], known: Collection[str], classes: int | Sequence[str] | None
) -> tuple[tuple[str, ...], list[str]]:
    """(names in label order, notes for the user).

    Args:
        present: classes with images.
        known: these, and the ones without: empty folders, classes that only the labels file has.
        classes: names in label order, or how many where the names are the numbers below that.

    Raises:
        UserError: a class without images, unless `classes` names it; numbers that are not those from 0 on; a name of
            `classes` that is not known.
    """
    if isinstance(classes, int):
        names, notes = _numbered(known, classes), ["labels are the numbers that name the classes"]
    elif classes is not None:
        names, notes = _given(known, classes), []
    else:
        if empty := sorted(set(known) - set(present)):
            raise UserError(
                f"classes without images: {_some(empty)}; remove them, or give --classes: all classes in label order "
                "(one that is named there is kept)"
            )
        names, notes = _default_order(known)
    if empty := [name for name in names if name not in present]:
        notes.append(f"classes without images: {_some(empty)}")
    return names, notes


def _given(known: Collection[str], classes: Sequence[str]) -> tuple[str, ...]:
    if twice := [name for name, times in Counter(classes).items() if times > 1]:
        raise UserError(f"classes: {_some(twice)}: a class is named twice")
    if unknown := [name for name in classes if name not in known]:
        raise UserError(f"classes: the source has no images of {_some(unknown)}")
    return tuple(classes)


def _numbered(known: Collection[str], classes: int) -> tuple[str, ...]:
    check_count(classes)
    names = [str(label) for label in range(classes)]
    outside = sorted(name for name in known if not _NUMBER.fullmatch(name) or not 0 <= int(name) < classes)
    if outside:
        raise UserError(f"classes={classes}: class names must be numbers from 0 to {classes - 1}, got {_some(outside)}")
    for name in _distinct_numbers(known):
        names[int(name)] = name
    return tuple(names)


def _default_order(known: Collection[str]) -> tuple[tuple[str, ...], list[str]]:
    if all(_NUMBER.fullmatch(name) for name in known):
        names = _distinct_numbers(known)
        if [int(name) for name in names] != list(range(len(names))):
            raise UserError(
                f"class names are numbers, but not those from 0 to {len(names) - 1} ({_some(names)}): --classes "
                f"{max(1, int(names[-1]) + 1)} takes the numbers as labels, --classes {','.join(names[:3])},... or a "
                "file of names gives another order"
            )
        return tuple(names), ["class names are numbers: labels are in numeric order"]
    names = sorted(known)
    if all(re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", name) for name in names):
        raise UserError(
            f"class names are numbers, but not whole ones ({_some(names)}); --classes gives their order, as labels "
            "they must be whole"
        )
    numbers = [name for name in names if _NUMBER.fullmatch(name)]
    if numbers != sorted(numbers, key=int):
        others = [name for name in names if name not in numbers]
        raise UserError(
            f"some class names are numbers ({_some(numbers)}), others are not ({_some(others)}), so neither numeric "
            "nor text order is right; remove those, or give --classes"
        )
    notes = []
    if same := next((names_ for names_ in _alike(names) if len(names_) > 1), None):
        notes.append(f"classes {' and '.join(map(repr, same))} differ only in case or accents' encoding")
    timm = sorted(names, key=_natural)
    if timm != names:
        label = next(i for i, name in enumerate(names) if timm[i] != name)
        notes.append(
            "labels are in text order, capitals first, as torchvision's ImageFolder has them; timm's folder reader "
            f"would number the classes otherwise (label {label} is {names[label]!r} here, {timm[label]!r} there): "
            "--classes gives another order"
        )
    return tuple(names), notes


def _distinct_numbers(names: Collection[str]) -> list[str]:
    ordered = sorted(names, key=lambda name: (int(name), name))
    for one, other in itertools.pairwise(ordered):
        if int(one) == int(other):
            raise UserError(f"classes {one!r} and {other!r} are the same number; rename one, or give --classes")
    return ordered


def _alike(names: Sequence[str]) -> list[list[str]]:
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(unicodedata.normalize("NFC", name).casefold(), []).append(name)
    return list(groups.values())


def _natural(name: str) -> list[int | str]:
    """Digits by value, letters without case: the order of timm's ReaderImageFolder."""
    parts = re.split(r"(\d+)", name.lower())
    return [int(part) if i % 2 else part for i, part in enumerate(parts)]


def _some(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
