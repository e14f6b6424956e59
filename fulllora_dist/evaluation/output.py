"""Where an evaluation is to be written: it must be writable, and nothing may be lost that another one found."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fulllora_dist.core.errors import UserError
from fulllora_dist.evaluation.report import EvaluationReport, Key, attack_names, read_evaluation, scores


def check_output(path: str | Path) -> None:
    """Refuse what `write_evaluation` could not write in the end; changes nothing.

    Raises:
        UserError: naming --output.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"--output: {path} is a folder; name a file, e.g. {path / 'evaluation.json'}")
    if path.parent.is_dir() and not os.access(path.parent, os.W_OK):
        raise UserError(f"--output: {path.parent} is not writable; name a file in another folder")
    there = next(parent for parent in path.parents if os.path.lexists(parent))
    try:  # nothing else tells whether the folder can be made; under a name of its own, as all ranks try it at once
        with tempfile.TemporaryDirectory(prefix=".", dir=there) as trial:
            Path(trial, path.parent.relative_to(there)).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output: cannot create {path.parent} ({error.strerror or error})") from None


def read_replaced(path: str | Path) -> EvaluationReport | None:
    """The evaluation that a new one would overwrite; None where there is none.

    Raises:
        UserError: the file there is not an evaluation, naming --output.
    """
    if not Path(path).exists():
        return None
    try:
        return read_evaluation(path)
    except UserError as error:
        raise UserError(f"--output: {error}; name another file") from None


def check_replaced(path: str | Path, attacks: Sequence[Key], norm: str, n: int, sha256: str | None) -> None:
    """Refuse to overwrite an evaluation that has what the new one would not have, or a file that is not an evaluation.

    Args:
        path: where the new one is to be written.
        attacks: of the new one.
        norm, n, sha256: its norm, number of images, and adapter.

    Raises:
        UserError: naming --output.
    """
    old = read_replaced(path)
    if old is None:
        return
    lost = attack_names(old["norm"], [key for key in scores(old) if key not in attacks])
    lost += [] if len(old["ids"]) <= n else [f"{len(old['ids'])} images"]
    lost += [] if old["norm"] == norm else [old["norm"]]
    lost += [] if old.get("adapter_sha256") == sha256 else ["another adapter"]
    if lost:
        raise UserError(f"--output: {path} holds an evaluation of {', '.join(lost)}; name another file, or delete it")
