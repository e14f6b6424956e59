"""What is done of an evaluation, on the disk of each rank, so that one that was killed goes on at its batch."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fulllora_dist.core.errors import UserError


def items_done(output: str | Path) -> int:
    """Lines of all evaluations under way whose evaluation*.json is to lie in a folder: whether they get on."""
    files = Path(output).glob("evaluation*.json.partial/*/rank-*.jsonl")
    return sum(file.read_bytes().count(b"\n") for file in files)


class ResumeLog:
    """Results of finished pieces of work by their names, a line each in a file of this rank alone.

    A line that was cut short by a kill is passed over. Files of other evaluations (another `fingerprint`) lie in other
    folders and are not looked at.

    Args:
        place: folder; made with the first result. None keeps nothing.
        fingerprint: hash of all that a result depends on besides its name.
        rank: of this process.
    """

    def __init__(self, place: str | Path | None, fingerprint: str, rank: int):
        self._folder = None if place is None else Path(place, fingerprint[:16])
        self._main = rank == 0
        self._file = None if self._folder is None else self._folder / f"rank-{rank}.jsonl"

    def found(self) -> dict[str, Any]:
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
                    line = b"\n" + line  # what a kill cut short ends here
                file.write(line)
        except OSError as error:
            raise UserError(f"--output: {self._file} cannot be written ({error.strerror or error})") from None

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
