"""Predictions for a folder of pictures or for shards, one line each, that a second call goes on with."""

import csv
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from fulllora_dist.data.decode import EvalTransform
from fulllora_dist.data.index import Index
from fulllora_dist.data.reader import ShardReader
from fulllora_dist.data.scan import IMAGE_EXTENSIONS
from fulllora_dist.errors import UserError

COLUMNS = ("picture", "class", "label", "probability", "error")
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
    progress: bool = True,
) -> dict[str, int]:
    """Write the most likely class of each picture to `output`.

    Lines of pictures that are there already stay, and those pictures are passed over; a line that a kill cut short is
    made again. A picture that cannot be read gets a line with the error.

    Args:
        model: pixels in [0, 1] -> logits, in evaluation mode, on the device where its parameters are.
        source: folder of pictures, searched with all folders below, or folder or URL of shards with an index.
        output: .jsonl, or .csv; columns are `COLUMNS`: name of the picture, of its class, its number, the softmax
            probability, and why it could not be read.
        transform: the model's evaluation crop.
        classes: names of the outputs.
        workers: decoding threads.

    Returns:
        {"pictures": all of the source, "predicted": by this call, "unreadable": of those}.

    Raises:
        UserError: no pictures there, an output of another form.
    """
    table = _Table(output)
    pictures = _pictures(source)
    left = [(name, read) for name, read in pictures if name not in table.done]
    device = next(model.parameters()).device
    unreadable = 0

    def decode(picture: tuple[str, Read]) -> tuple[str, Tensor | None, str | None]:
        name, read = picture
        try:
            return name, transform(read()), None
        except UserError as error:
            return name, None, str(error)

    bar = tqdm(total=len(pictures), initial=len(pictures) - len(left), unit="img", desc="predict", disable=not progress)
    with table, bar, ThreadPoolExecutor(max(1, workers)) as threads:
        for batch in _ahead(left, batch_size, lambda part: threads.map(decode, part)):
            good = [pixels for _, pixels, _ in batch if pixels is not None]
            scores = iter(_probabilities(model, good, device))
            rows: list[tuple[Any, ...]] = []
            for name, pixels, error in batch:
                if pixels is None:
                    unreadable += 1
                    rows.append((name, None, None, None, error))
                else:
                    score = next(scores)
                    label = int(score.argmax())
                    rows.append((name, classes[label], label, round(float(score[label]), 6), None))
            table.write(rows)
            bar.update(len(batch))
    return {"pictures": len(pictures), "predicted": len(left), "unreadable": unreadable}


def _ahead(items: list, size: int, start: Callable[[list], Iterator]) -> Iterator[list]:
    """Batches; the next one is being decoded while one is used."""
    parts = (items[i : i + size] for i in range(0, len(items), size))
    coming = [start(part) for part in islice(parts, 2)]
    while coming:
        batch = list(coming.pop(0))
        coming += [start(part) for part in islice(parts, 1)]
        yield batch


def _probabilities(model: nn.Module, pictures: list[Tensor], device: torch.device) -> np.ndarray:
    if not pictures:
        return np.empty((0, 0))
    with torch.inference_mode():
        logits = model(torch.stack(pictures).to(device).float() / 255)
        return logits.softmax(dim=1).cpu().numpy()


def _pictures(source: str) -> list[tuple[str, Read]]:
    """(name, what reads its bytes), in the order of names or of the index."""
    if Path(source).is_dir():
        files = sorted(path for path in Path(source).rglob("*") if path.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS)
        if files:
            return [(path.relative_to(source).as_posix(), _reader(path)) for path in files]
    try:
        index = Index.load(source)
    except UserError as error:
        raise UserError(f"{source} holds no pictures ({', '.join(IMAGE_EXTENSIONS)}), nor shards: {error}") from None
    shards = ShardReader(index)
    return [(index.key(i), lambda i=i: shards.read(i)) for i in range(len(index))]  # type: ignore[misc]


def _reader(path: Path) -> Read:
    def read() -> bytes:
        try:
            return path.read_bytes()
        except OSError as error:
            raise UserError(f"cannot be read ({error.strerror})") from None

    return read


class _Table:
    """The output, appended to batch by batch.

    Attributes:
        done: names of the pictures that it has whole lines of.
    """

    def __init__(self, path: str):
        self._path = path
        self._csv = path.endswith(".csv")
        if not self._csv and not path.endswith(".jsonl"):
            raise UserError(f"--output: {path} is neither .jsonl nor .csv; one of them is right")
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        self.done = self._found() if os.path.exists(path) else set()

    def _found(self) -> set[str]:
        with open(self._path, "rb") as file:
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        os.truncate(self._path, len(whole))
        lines = whole.decode().splitlines()
        try:
            if self._csv:
                return {row["picture"] for row in csv.DictReader(lines)}
            return {json.loads(line)["picture"] for line in lines}
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"--output: {self._path} holds something else than predictions; choose another file"
            ) from None

    def __enter__(self) -> "_Table":
        self._file = open(self._path, "a", newline="")
        if self._csv and not self._file.tell():
            csv.writer(self._file).writerow(COLUMNS)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, rows: list[tuple[Any, ...]]) -> None:
        """Whole lines, on their way to the disk when it returns."""
        if self._csv:
            csv.writer(self._file).writerows(rows)
        else:
            for row in rows:
                present = {key: value for key, value in zip(COLUMNS, row, strict=True) if value is not None}
                self._file.write(json.dumps(present) + "\n")
        self._file.flush()
