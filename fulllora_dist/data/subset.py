"""Which samples of an index are evaluated: all, the first n, n drawn evenly over the classes, or those of a file."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np

from fulllora_dist.core.errors import UserError
from fulllora_dist.core.messages import redacted
from fulllora_dist.data import plan
from fulllora_dist.data.index import Index
from fulllora_dist.data.shards.scan import IMAGE_EXTENSIONS
from fulllora_dist.storage import store


@dataclass(frozen=True)
class Subset:
    """At most one of the three is given; none is all samples.

    Attributes:
        n: so many, drawn evenly over the classes; always the same ones.
        first: the first so many in the order of the index.
        ids: path or URL of a text file with one sample a line: its id (a whole number), or the name of its image with
            or without folders and extension, as in RobustBench's list of 5,000 ImageNet images. What follows a blank
            in a line (a label), empty lines and lines that begin with # are passed over.
    """

    n: int | None = None
    first: int | None = None
    ids: str | None = None

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.n, self.first, self.ids)) > 1:
            raise UserError("at most one of evaluation.num_samples, evaluation.first and evaluation.ids may be set")

    def of(self, index: Index, name: str) -> np.ndarray:
        """int64 [n], ascending.

        Args:
            name: of the index, for messages.

        Raises:
            UserError: more samples than there are, a file that cannot be read, a line that fits no or several samples.
        """
        if self.ids is not None:
            return _listed(self.ids, index, name)
        for setting, n in (("num_samples", self.n), ("first", self.first)):
            if n is not None and not (isinstance(n, int) and 1 <= n <= len(index)):
                raise UserError(
                    f"evaluation.{setting} must be between 1 and the {len(index)} samples of {name}, got {n!r}"
                )
        if self.first is not None:
            return np.arange(self.first)
        order = plan.stratified_order(index.labels)
        return np.sort(order if self.n is None else order[: self.n])


def _listed(file: str, index: Index, index_name: str) -> np.ndarray:
    try:
        text = store.read(file).decode("utf-8-sig")
    except UserError as error:
        raise UserError(f"evaluation.ids: {error}") from None
    except UnicodeDecodeError:
        raise UserError(f"evaluation.ids: {redacted(file)} is not a text file with one sample per line") from None
    lines = [line.split()[0] for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    file = redacted(file)
    if not lines:
        raise UserError(f"evaluation.ids: {file} names no samples")
    numbers = all(line.isascii() and line.isdigit() for line in lines)
    if numbers:
        _refuse_names(set(lines), index, file, index_name)
    ids = [int(line) for line in lines] if numbers else _by_name(lines, index, file, index_name)
    if outside := [i for i in ids if i >= len(index)]:
        raise UserError(f"evaluation.ids: {file} has id {outside[0]}; {index_name} has {len(index)} samples")
    if len(set(ids)) < len(ids):
        twice = next(line for i, line in enumerate(lines) if ids.index(ids[i]) < i)
        raise UserError(f"evaluation.ids: {file} names {twice} twice")
    return np.array(sorted(ids), dtype=np.int64)


def _refuse_names(numbers: set[str], index: Index, file: str, index_name: str) -> None:
    """Refuse numbers that images are called by, too: as img2dataset's, or 0003 in a folder of a class, where no id has
    leading zeros."""
    padded = {number for number in numbers if number != str(int(number))}
    keys = map(index.key, range(len(index)))
    if key := next((key for key in keys if _bare(key) in (padded if "/" in key else numbers)), None):
        raise UserError(
            f"evaluation.ids: {file}: the images of {index_name} are named by numbers, so these may be ids or names; "
            f"give names with their folder or extension, e.g. {key if '/' in key else f'{key}.jpg'}"
        )


def _bare(name: str) -> str:
    """Without folders and the extension of an image."""
    path = PurePosixPath(name)
    return path.stem if path.suffix.lstrip(".").lower() in IMAGE_EXTENSIONS else path.name


def _by_name(names: Sequence[str], index: Index, file: str, index_name: str) -> list[int]:
    """By the key as it is written, or by the image's bare name where that is unique."""
    keys = {index.key(i): i for i in range(len(index))}
    bare: dict[str, int | None] = {}
    for key, i in keys.items():
        bare[_bare(key)] = None if _bare(key) in bare else i
    ids = []
    for name in names:
        sample_id = keys.get(name, bare.get(_bare(name)))
        if sample_id is None:
            what = "several samples" if _bare(name) in bare else "no sample"
            mixed = "; a file holds either ids or names" if name.isdigit() else ""
            raise UserError(f"evaluation.ids: {name} of {file} matches {what} of {index_name}{mixed}")
        ids.append(sample_id)
    return ids
