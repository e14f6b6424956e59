"""Predictions for a folder of images or for shards, one line each; a second call resumes."""

import csv
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from fulllora_dist.core.errors import UserError
from fulllora_dist.data.class_names import match_classes
from fulllora_dist.data.index import Index
from fulllora_dist.data.reader import ShardReader
from fulllora_dist.data.shards.leftovers import leftover
from fulllora_dist.data.shards.scan import IMAGE_EXTENSIONS
from fulllora_dist.data.transforms import EvalTransform

COLUMNS = ("picture", "class", "label", "probability", "error", "adapter")
Read = Callable[[], bytes]


def predict(
    model: nn.Module,
    source: str,
    output: str,
    transform: EvalTransform,
    classes: Sequence[str],
    *,
    batch_size: int = 64,
    workers: int = 2,
    adapter: str | None = None,
    progress: bool = True,
) -> dict[str, int]:
    """Write the most likely class of each image to `output`.

    Images that have a line already are skipped; a line that a kill truncated is written again. An image that cannot be
    read, or whose logits are not finite, gets a line with the error.

    Args:
        model: pixels in [0, 1] -> logits, in evaluation mode, on the device where its parameters are.
        source: folder of images, searched recursively, or folder or URL of shards with an index.
        output: .jsonl or .csv with the columns `COLUMNS`: name of the image, name and number of its class, softmax
            probability, why there is no prediction, and `adapter`.
        transform: the model's evaluation crop.
        classes: names of the outputs.
        workers: decoding threads.
        adapter: sha256 that identifies the model, kept with each line; one output never mixes two.

    Returns:
        {"pictures": number of images of the source, "predicted": by this call, "unreadable": of those, without a
        prediction}.

    Raises:
        UserError: no images; an output of another format or adapter, or that cannot be written.
    """
    images = _images(source)
    table = _Table(output, adapter)
    remaining = [(name, read) for name, read in images if name not in table.done]
    device = next(model.parameters()).device
    unreadable = 0

    def decode(image: tuple[str, Read]) -> tuple[str, Tensor | None, str | None]:
        name, read = image
        try:
            return name, transform(read()), None
        except UserError as error:
            return name, None, str(error)

    bar = tqdm(
        total=len(images), initial=len(images) - len(remaining), unit="img", desc="predict", disable=not progress
    )
    with table, bar, ThreadPoolExecutor(max(1, workers)) as threads:
        for batch in _ahead(remaining, batch_size, lambda part: threads.map(decode, part)):
            readable = [pixels for _, pixels, _ in batch if pixels is not None]
            scores = iter(_probabilities(model, readable, device))
            rows: list[tuple[Any, ...]] = []
            for name, pixels, error in batch:
                if pixels is None:
                    unreadable += 1
                    rows.append((name, None, None, None, error, adapter))
                    continue
                score = next(scores)
                if np.isfinite(score).all():
                    label = int(score.argmax())
                    rows.append((name, classes[label], label, round(float(score[label]), 6), None, adapter))
                else:
                    unreadable += 1
                    rows.append((name, None, None, None, "the model's logits are not finite", adapter))
            table.write(rows)
            bar.update(len(batch))
    return {"pictures": len(images), "predicted": len(remaining), "unreadable": unreadable}


def compare_labels(source: str, classes: Sequence[str]) -> str:
    """How the labels of shards relate to the predictions, where they are not the same numbers; empty for images.

    Args:
        source: see `predict`.
        classes: names of the outputs that the adapter records; empty where it does not.
    """
    unnamed = "" if classes else "the adapter records no class names: class is the number of the output"
    if _files(source):
        return unnamed
    try:
        match = match_classes(classes, Index.load(source).classes)
    except UserError as error:
        return f"classes are the adapter's, not the data's: {error}"
    if match.outputs is None:
        return unnamed or (match.note and f"classes: {match.note}")
    return "classes: the data numbers them in another order; compare the names (class), not the numbers (label)"


def _ahead(items: list, size: int, start: Callable[[list], Iterator]) -> Iterator[list]:
    """Batches; the next one is decoded while one is used."""
    parts = (items[i : i + size] for i in range(0, len(items), size))
    started = [start(part) for part in islice(parts, 2)]
    while started:
        batch = list(started.pop(0))
        started += [start(part) for part in islice(parts, 1)]
        yield batch


def _probabilities(model: nn.Module, images: list[Tensor], device: torch.device) -> np.ndarray:
    if not images:
        return np.empty((0, 0))
    with torch.inference_mode():
        logits = model(torch.stack(images).to(device).float() / 255)
        finite = logits.isfinite().all(dim=1, keepdim=True)
        return torch.where(finite, logits.softmax(dim=1), torch.nan).cpu().numpy()


def _images(source: str) -> list[tuple[str, Read]]:
    """(name, function that reads its bytes), in the order of names or of the index."""
    if files := _files(source):
        return [(path.relative_to(source).as_posix(), _reader(path)) for path in files]
    try:
        index = Index.load(source)
    except UserError as error:
        raise UserError(f"{source} holds no images ({', '.join(IMAGE_EXTENSIONS)}) and no shards: {error}") from None
    shards = ShardReader(index)
    return [(index.key(i), lambda i=i: shards.read(i)) for i in range(len(index))]  # type: ignore[misc]


def _files(source: str) -> list[Path]:
    """The images in a folder, sorted by name; none where it is no folder."""
    if not Path(source).is_dir():
        return []
    files = (path for path in Path(source).rglob("*") if path.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS)
    return sorted(path for path in files if leftover(path.relative_to(source).as_posix()) is None)


def passed_over(source: str) -> str:
    """How many files of a folder of images get no line, as they are hidden, of tools, or of another format; empty
    where there are none."""
    taken = len(_files(source))
    others = sum(path.is_file() for path in Path(source).rglob("*")) - taken if taken else 0
    return f"passed over {others} other files ({', '.join(IMAGE_EXTENSIONS)} are read, hidden ones are not)" * bool(
        others
    )


def _reader(path: Path) -> Read:
    def read() -> bytes:
        try:
            return path.read_bytes()
        except OSError as error:
            raise UserError(f"cannot be read ({error.strerror})") from None

    return read


class _Table:
    """The output, appended to batch by batch. A file with other content is not touched.

    Attributes:
        done: names of the images with a whole line.
    """

    def __init__(self, path: str, adapter: str | None):
        self._path, self._adapter = path, adapter
        self._csv = path.endswith(".csv")
        if not self._csv and not path.endswith(".jsonl"):
            raise UserError(f"--output must end in .jsonl or .csv, got {path}")
        with self._writable():
            os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
            content = Path(path).read_bytes() if os.path.exists(path) else b""
        whole = content[: content.rfind(b"\n") + 1]
        self._length = len(whole)
        self.done = self._read_names(whole.decode(errors="surrogateescape"), content[len(whole) :])

    def _read_names(self, whole: str, cut: bytes) -> set[str]:
        """Names in whole lines; `cut` is what a kill left of the next one."""
        try:
            rows = self._rows(whole)
            if not whole and not self._begins_a_line(cut):
                raise ValueError
        except (ValueError, csv.Error):
            raise UserError(f"--output: {self._path} does not hold predictions; choose another file") from None
        for row in rows:
            if (adapter := row.get("adapter") or None) != self._adapter:
                raise UserError(
                    f"--output: {self._path} holds predictions of the adapter {str(adapter)[:12]}, this one is "
                    f"{str(self._adapter)[:12]}; choose another file"
                )
        return {row["picture"] for row in rows}

    def _rows(self, whole: str) -> list[dict[str, Any]]:
        """Raises ValueError if a line is not a prediction."""
        if self._csv:
            head, *cells = list(csv.reader(io.StringIO(whole, newline=""))) or [list(COLUMNS)]
            rows = [dict(zip(COLUMNS, row, strict=True)) for row in cells]
            ours = tuple(head) == COLUMNS
        else:
            rows = [json.loads(line) for line in whole.split("\n")[:-1]]
            ours = all(isinstance(row, dict) and row.keys() <= set(COLUMNS) for row in rows)
            ours = ours and all(isinstance(row.get("picture"), str) for row in rows)
        if not ours:
            raise ValueError
        return rows

    def _begins_a_line(self, cut: bytes) -> bool:
        begin = ",".join(COLUMNS) if self._csv else json.dumps({COLUMNS[0]: ""})[:-2]
        return begin.encode().startswith(cut) or (not self._csv and cut.startswith(begin.encode()))

    @contextmanager
    def _writable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"--output: {self._path} cannot be written ({error.strerror or error})") from None

    def __enter__(self) -> "_Table":
        with self._writable():
            self._file = open(self._path, "a", newline="", encoding="utf-8", errors="surrogateescape")
            self._file.truncate(self._length)
        if self._csv and not self._length:
            csv.writer(self._file).writerow(COLUMNS)
        return self

    def __exit__(self, *_: object) -> None:
        with self._writable():
            self._file.close()

    def write(self, rows: list[tuple[Any, ...]]) -> None:
        """Append whole lines and flush."""
        with self._writable():
            if self._csv:
                csv.writer(self._file).writerows(rows)
            else:
                for row in rows:
                    present = {key: value for key, value in zip(COLUMNS, row, strict=True) if value is not None}
                    self._file.write(json.dumps(present) + "\n")
            self._file.flush()
