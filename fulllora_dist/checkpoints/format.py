"""Checkpoints of a run, on a disk or in a bucket: safetensors and JSON.

A checkpoint is a folder `<place>/<step>` with checkpoint.safetensors and checkpoint.json, which holds the checksum of
both. On a disk it is written under a temporary name, flushed and renamed, so that a folder of the right name is
complete. A bucket cannot rename: there the description is written last, and a folder without one is not a checkpoint.
Nothing in it is bound to a number of ranks or a ZeRO stage, and nothing is pickled. The backbone is never in it.
What others keep in the same place stays as it is, folders with numbers for names too.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from safetensors import SafetensorError

from fulllora_dist.core.errors import UserError
from fulllora_dist.storage import store, urls

if TYPE_CHECKING:
    from torch import Tensor

FORMAT_VERSION = 1
TENSORS = "checkpoint.safetensors"
DESCRIPTION = "checkpoint.json"
_STEP = r"\d{8,}"


class CheckpointMetadata(TypedDict):
    """What checkpoint.json holds beside its format version and checksum.

    Attributes:
        step: batches trained on.
        updates, skipped: optimizer updates made, and those that were skipped as not finite.
        stream: position in the data, and the bad samples so far.
        best, guard: the guard's best check, and the rest of its state.
        rollbacks: each rollback of the run after a collapse.
        mlflow_run_id: of the run that it is tracked in.
        config: all settings of the run.
        backbone_sha256: fingerprint of the frozen weights.
    """

    step: int
    updates: int
    skipped: int
    stream: dict[str, Any]
    best: dict[str, Any] | None
    guard: dict[str, Any]
    rollbacks: list[dict[str, Any]]
    mlflow_run_id: str | None
    config: dict[str, Any]
    backbone_sha256: str | None


Checkpoint = tuple[dict[str, "Tensor"], CheckpointMetadata]
"""Tensors {"<kind>/<name>": host}, and metadata."""


class DamagedCheckpoint(Exception):
    """A checkpoint that is incomplete or whose bytes changed; the message says what and where."""


def _write(path: str, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(path: str) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(content: bytes, metadata: Mapping[str, Any]) -> str:
    """sha256 of the tensors' file and the metadata: a damaged digit in the latter is damage too."""
    digest = hashlib.sha256(content)
    digest.update(json.dumps(metadata, sort_keys=True).encode())
    return digest.hexdigest()


def write_checkpoint(
    place: str,
    step: int,
    tensors: "Mapping[str, Tensor]",
    metadata: CheckpointMetadata,
    keep: int,
    spared: Collection[int],
) -> str:
    """Write the checkpoint of `step` under `place`. Of the older ones delete all but the `keep` - 1 newest and those of
    the steps `spared`. Returns its path or URL.

    Args:
        place: a folder, or an s3:// or gs:// URL.
        tensors: on the host.

    Raises:
        OSError, UserError: it cannot be written there; older checkpoints are as they were.
    """
    from safetensors.torch import save as save_safetensors

    content = save_safetensors({name: tensor.contiguous() for name, tensor in tensors.items()})
    description = {"format_version": FORMAT_VERSION, **metadata, "step": step}
    description["sha256"] = _digest(content, description)
    final = f"{place.rstrip('/')}/{step:08d}"
    write = _write_objects if urls.is_remote(place) else _write_folder
    write(place, final, {TENSORS: content, DESCRIPTION: (json.dumps(description, indent=1) + "\n").encode()})
    # newer ones were passed over as damaged: they do not count, or they would push this one out
    older = [path for path in list_checkpoints(place) if step_of(path) < step and step_of(path) not in spared]
    for old in older[keep - 1 :]:
        with contextlib.suppress(OSError, UserError):  # the new one is whole; the next one tries again
            delete_checkpoint(old)
    return final


def _write_folder(place: str, final: str, files: Mapping[str, bytes]) -> None:
    os.makedirs(place, exist_ok=True)
    for name in os.listdir(place):
        if re.fullmatch(rf"\.tmp-{_STEP}", name):  # unfinished
            shutil.rmtree(os.path.join(place, name))
    temporary = os.path.join(place, f".tmp-{os.path.basename(final)}")
    try:
        os.makedirs(temporary)
        for name, content in files.items():
            _write(os.path.join(temporary, name), content)
        _flush_folder(temporary)
        if _is_checkpoint(final):  # a run that rolled back to an older checkpoint makes this step again
            shutil.rmtree(final)
        os.rename(temporary, final)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)  # a full disk needs the space
        raise
    _flush_folder(place)


def _write_objects(place: str, final: str, files: Mapping[str, bytes]) -> None:
    for path, names in _folders(place).items():
        if names == {TENSORS} or path == final:  # unfinished, or damaged and made again
            delete_checkpoint(path, names & {DESCRIPTION, TENSORS})
    for name in (TENSORS, DESCRIPTION):
        store.write(f"{final}/{name}", files[name])


def delete_checkpoint(path: str, names: Collection[str] = (DESCRIPTION, TENSORS)) -> None:
    """Delete a checkpoint by its path or URL; `names`: those of its two files that are in a bucket.

    Raises:
        OSError, UserError: it cannot be deleted.
    """
    if not urls.is_remote(path):
        shutil.rmtree(path)
        return
    fs = urls.filesystem(path)
    for name in sorted(names):  # without its description it is not a checkpoint any more, whatever happens next
        url = f"{path}/{name}"
        store.persistent(lambda url=url: fs.rm_file(url), path)  # type: ignore[misc]


def _folders(place: str) -> dict[str, set[str]]:
    """What lies in a bucket under `place`: the URL of each folder named like a step, and all files in it."""
    fs, place = urls.filesystem(place), place.rstrip("/")
    inside = re.compile(re.escape(fs._strip_protocol(place)) + rf"/({_STEP})/([^/]+)")
    folders: dict[str, set[str]] = {}
    for key in store.persistent(lambda: fs.find(place), place):
        if match := inside.fullmatch(key):
            folders.setdefault(f"{place}/{match[1]}", set()).add(match[2])
    return folders


def _is_checkpoint(path: str) -> bool:
    """Whether a folder on a disk is a checkpoint's, damaged or not: one that lost its files is, too, or a run would
    start over unnoticed."""
    try:
        names = set(os.listdir(path))
    except (FileNotFoundError, NotADirectoryError):
        return False
    return DESCRIPTION in names or names <= {TENSORS}


def list_checkpoints(*places: str) -> list[str]:
    """Paths or URLs of the complete checkpoints, newest first."""
    paths: list[str] = []
    for place in places:
        if urls.is_remote(place):
            paths += [path for path, names in _folders(place).items() if DESCRIPTION in names]
        else:
            with contextlib.suppress(FileNotFoundError):
                named = [os.path.join(place, name) for name in os.listdir(place) if re.fullmatch(_STEP, name)]
                paths += filter(_is_checkpoint, named)
    return sorted(paths, key=step_of, reverse=True)


def address(place: str) -> str:
    """A folder's path, of a file:// URL too, or its URL in a bucket, without a slash at the end."""
    return (place if urls.is_remote(place) else urls.local_path(place)).rstrip("/") or "/"


def step_of(path: str) -> int:
    """The step of a checkpoint's path or URL."""
    return int(os.path.basename(path))


def read_checkpoint(path: str) -> Checkpoint:
    """Tensors and metadata of a checkpoint, checked.

    Raises:
        DamagedCheckpoint: missing files, changed bytes.
        UserError: a format version this program does not know, a bucket that does not answer.
        OSError: a disk that does not answer: that is not damage, and a restart may find it whole.
    """
    from safetensors.torch import load as load_safetensors

    path = address(path)
    try:
        files = _read_files(path)
        metadata, content = json.loads(files[DESCRIPTION]), files[TENSORS]
        version, sha256 = metadata["format_version"], metadata.pop("sha256")
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"{path} is incomplete ({error})") from None
    if version != FORMAT_VERSION:
        raise UserError(f"{path} has format version {version}; this program reads {FORMAT_VERSION}")
    if _digest(content, metadata) != sha256:
        raise DamagedCheckpoint(f"{path} is damaged: its sha256 is not the one in {DESCRIPTION}")
    try:
        return load_safetensors(content), metadata
    except SafetensorError as error:
        raise DamagedCheckpoint(f"{path}/{TENSORS} is damaged ({error})") from None


def read_metadata(places: Sequence[str], instead: str | None) -> CheckpointMetadata | None:
    """The metadata of the newest checkpoint of `places`, or else of the checkpoint `instead`, which are folders;
    without its tensors or torch. None where there is none, or it is not readable."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        path = next(iter(list_checkpoints(*places)), instead)
        if path is not None and not urls.is_remote(path):
            metadata = json.loads(Path(address(path), DESCRIPTION).read_text())
            return metadata if metadata["format_version"] == FORMAT_VERSION else None
    return None


def _read_files(path: str) -> dict[str, bytes]:
    """The two files; of a bucket those that are there: one that does not answer is a UserError, not a missing file."""
    if not urls.is_remote(path):
        return {name: Path(path, name).read_bytes() for name in (DESCRIPTION, TENSORS)}
    fs = urls.filesystem(path)
    names = {key.rpartition("/")[2] for key in store.persistent(lambda: fs.find(path), path)}
    return {name: store.read(f"{path}/{name}") for name in (DESCRIPTION, TENSORS) if name in names}


def read_newest_checkpoint(*places: str) -> tuple[Checkpoint | None, dict[str, str]]:
    """The newest whole checkpoint, or None; and of each damaged one that was passed over its path and a line."""
    return read_whole_checkpoint(list_checkpoints(*places))


def read_whole_checkpoint(paths: Sequence[str]) -> tuple[Checkpoint | None, dict[str, str]]:
    """As `read_newest_checkpoint`, the first whole one of these paths."""
    damaged: dict[str, str] = {}
    for path in paths:
        try:
            return read_checkpoint(path), damaged
        except DamagedCheckpoint as error:
            damaged[path] = str(error)
    return None, damaged
