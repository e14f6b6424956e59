"""States of a run on disk: safetensors and JSON, published by a rename, found by themselves.

A state is a folder `states/<step>` with state.safetensors and state.json, which holds the checksum of both. It is
written under a temporary name, flushed to the disk and renamed, so that a folder of the right name is complete.
Nothing in it is bound to a number of ranks or a ZeRO stage, and nothing is pickled. The backbone is never in it.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from fulllora_dist.errors import UserError

FORMAT_VERSION = 1
TENSORS = "state.safetensors"
DESCRIPTION = "state.json"


class DamagedState(Exception):
    """A state that is incomplete or whose bytes changed; the message says what and where."""


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


def _digest(content: bytes, facts: Mapping[str, Any]) -> str:
    """sha256 of the tensors' file and the facts: one damaged digit in the latter is no state either."""
    digest = hashlib.sha256(content)
    digest.update(json.dumps(facts, sort_keys=True).encode())
    return digest.hexdigest()


def write_state(folder: str, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], keep: int) -> str:
    """Publish the state of `step` under `folder` and delete all but the `keep` newest. Returns its path.

    Args:
        tensors: on the host.
        facts: JSON-able.
    """
    os.makedirs(folder, exist_ok=True)
    _delete_unfinished(folder)
    final = os.path.join(folder, f"{step:08d}")
    temporary = os.path.join(folder, f".tmp-{step:08d}")
    os.makedirs(temporary)
    content = save_safetensors({name: tensor.contiguous() for name, tensor in tensors.items()})
    _write(os.path.join(temporary, TENSORS), content)
    description = {"format_version": FORMAT_VERSION, "step": step, **facts}
    description["sha256"] = _digest(content, description)
    _write(os.path.join(temporary, DESCRIPTION), (json.dumps(description, indent=1) + "\n").encode())
    _flush_folder(temporary)
    if os.path.exists(final):  # a run that went back to an older state makes this step again
        shutil.rmtree(final)
    os.rename(temporary, final)
    _flush_folder(folder)
    # newer ones were passed over as damaged: they do not count, or they would push this one out
    older = [path for path in list_states(folder) if int(os.path.basename(path)) < step]
    for old in older[keep - 1 :]:
        shutil.rmtree(old)
    return final


def _delete_unfinished(folder: str) -> None:
    for name in os.listdir(folder):
        if name.startswith(".tmp-"):
            shutil.rmtree(os.path.join(folder, name))


def list_states(folder: str) -> list[str]:
    """Paths of the published states, newest first."""
    names: list[str] = []
    with contextlib.suppress(FileNotFoundError):
        names = [name for name in os.listdir(folder) if name.isdigit()]
    return [os.path.join(folder, name) for name in sorted(names, key=int, reverse=True)]


def read_state(path: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of a state, checked.

    Raises:
        DamagedState: missing files, changed bytes.
        UserError: a format version this program does not know.
    """
    try:
        with open(os.path.join(path, DESCRIPTION), "rb") as file:
            facts = json.loads(file.read())
        with open(os.path.join(path, TENSORS), "rb") as file:
            content = file.read()
        version, sha256 = facts["format_version"], facts.pop("sha256")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedState(f"{path} is incomplete ({error})") from None
    if version != FORMAT_VERSION:
        raise UserError(f"{path} has format version {version}; this program reads {FORMAT_VERSION}")
    if _digest(content, facts) != sha256:
        raise DamagedState(f"{path} is damaged: its sha256 is not the one in {DESCRIPTION}")
    try:
        return load_safetensors(content), facts
    except SafetensorError as error:
        raise DamagedState(f"{path}/{TENSORS} is damaged ({error})") from None


def read_newest_state(folder: str) -> tuple[tuple[dict[str, Tensor], dict[str, Any]] | None, list[str]]:
    """The newest state that is whole, or None, and a line for each damaged one that was passed over."""
    damaged: list[str] = []
    for path in list_states(folder):
        try:
            return read_state(path), damaged
        except DamagedState as error:
            damaged.append(str(error))
    return None, damaged
