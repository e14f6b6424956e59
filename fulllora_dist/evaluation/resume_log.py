"""Finished work items of an evaluation, on the disk of each rank, so that one that was killed resumes at its batch."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fulllora_dist.core.errors import UserError
from fulllora_dist.evaluation.images import EvalImages
from fulllora_dist.evaluation.trained import record_of
from fulllora_dist.evaluation.transfer import Sources
from fulllora_dist.models.adapted_model import AdaptedModel


def items_done(output: str | Path, name: str = "evaluation*.json") -> int:
    """Finished work items of the evaluations under way whose file of that name (a pattern) is to lie in a folder."""
    files = Path(output).glob(f"{name}.partial/*/rank-*.jsonl")
    return sum(file.read_bytes().count(b"}\n") for file in files)  # whole lines, and not the empty ones before them


def fingerprint(predict: nn.Module, images: EvalImages, seed: int, sources: Sources | None = None) -> str:
    """Hash of all that the result of a work item depends on besides its name."""
    digest = hashlib.sha256(f"{images.digest} {seed} {record_of(predict).classes}".encode())
    for model in (predict, *(sources or {}).values()):
        for module in model.modules():  # a source is wrapped
            if isinstance(module, AdaptedModel):  # alpha, heads and normalisation are in no tensor of its state_dict
                digest.update(f"{module.info} {module.spec}".encode())
        for name, tensor in chain(model.named_parameters(), model.named_buffers()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class ResumeLog:
    """Results of finished work items by their names, a line each in a file of this rank alone.

    A line that a kill truncated is skipped. Files of other evaluations (another `fingerprint`) lie in other
    folders and are not touched.

    Args:
        folder: made with the first result. None keeps nothing.
        fingerprint: see the function of that name.
        rank: of this process.
    """

    def __init__(self, folder: str | Path | None, fingerprint: str, rank: int):
        self._folder = None if folder is None else Path(folder, fingerprint[:16])
        self._main = rank == 0
        self._file = None if self._folder is None else self._folder / f"rank-{rank}.jsonl"

    def results(self) -> dict[str, Any]:
        """Results of all ranks whose files this machine sees."""
        return dict(self._lines())

    def _lines(self) -> Iterator[tuple[str, Any]]:
        if self._folder is None or not self._folder.is_dir():
            return
        for path in sorted(self._folder.glob("rank-*.jsonl")):
            for line in path.read_bytes().splitlines():
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    entry = json.loads(line)
                    yield entry["name"], entry["result"]

    def keep(self, name: str, result: Any) -> None:
        """Append a result; it is in the file when this returns.

        Raises:
            UserError: the disk does not take it.
        """
        if self._file is None:
            return
        line = (json.dumps({"name": name, "result": result}) + "\n").encode()
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with open(self._file, "ab") as file:
                if file.tell():
                    line = b"\n" + line  # a line that a kill truncated ends here
                file.write(line)
        except OSError as error:
            raise UserError(f"--output: cannot write {self._file} ({error.strerror or error})") from None

    def forget(self) -> None:
        """The evaluation is written: remove this rank's file, on rank 0 also those of ranks that are no more, and the
        folders that are empty then."""
        if self._file is None or self._folder is None:
            return
        for file in [self._file, *(self._folder.glob("rank-*.jsonl") if self._main else ())]:
            file.unlink(missing_ok=True)
        for folder in (self._folder, self._folder.parent):
            with contextlib.suppress(OSError):
                os.rmdir(folder)
