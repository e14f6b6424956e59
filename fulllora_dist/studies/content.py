"""What a run is, as far as its result depends on it. By this a finished run is found, whatever it is called, wherever
its files are and whichever commit made it."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

from fulllora_dist.config.schema import Config
from fulllora_dist.data.index import Index
from fulllora_dist.data.settings import RUNNING

_WHOLE = ("tracking", "evaluation", "distributed")
"""Sections that change no adapter, beyond rounding."""
_NOT_COUNTED = {"checkpoint_path", "train", "validation", "held_out", "compile", *RUNNING}
"""Places, whose content counts (`inputs_of`), and what changes no adapter beyond rounding."""
_FREE = ("deepspeed",)
"""Sections without settings of their own, which are compared as a whole."""


def content(config: Mapping[str, Any]) -> dict[str, Any]:
    """{name: value} of the settings that decide what a training makes.

    Args:
        config: `Config.model_dump(mode="json")`.
    """

    found: dict[str, Any] = {}
    for section, values in config.items():
        if section in _WHOLE:
            continue
        if section == "plugins":
            found[section] = [os.path.basename(name) for name in values]  # of a file the content counts
            continue
        if not isinstance(values, Mapping) or section in _FREE:
            found[section] = values
            continue
        kept = values.keys() & {"seed"} if section == "run" else values.keys() - _NOT_COUNTED
        found |= {f"{section}.{key}": values[key] for key in sorted(kept)}
    return found


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[str]:
    """How two contents differ, "optim.lr 0.001, now 0.002"."""
    for name in sorted(one.keys() | other.keys()):
        before, now = one.get(name, "unset"), other.get(name, "unset")  # as another method's
        if before != now:
            yield f"{name} {before}, now {now}"


def folder_key(config: Config) -> str:
    """A short hash of what is not at its default, for the folder of a run: versions that only add settings keep it."""
    phases = [phase.method and phase.method.name for phase in config.phases]
    rollback = config.guard.rollback_method
    names = [config.method.name, *phases, rollback and rollback.name]  # pydantic takes a method's name for a default
    return key_of(content(config.model_dump(mode="json", exclude_defaults=True)) | {"methods": names})


def key_of(settings: Mapping[str, Any]) -> str:
    """A short hash, for names of folders."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def read_by(config: Config) -> tuple[tuple[str, str], ...]:
    """(setting, place) of what the training reads."""
    found = [("data.train", config.data.train)]
    if config.guard.on_collapse == "rollback" and config.data.held_out is not None:
        found.append(("data.held_out", config.data.held_out))
    path = config.model.checkpoint_path
    if path is not None and "://" not in path:
        found.append(("model.checkpoint_path", path))
    files = [name for name in config.plugins if name.endswith(".py")]
    return (*found, *((f"plugins {os.path.basename(name)}", os.path.expanduser(name)) for name in files))


def inputs_of(config: Config) -> dict[str, str]:
    """{setting: hash of the content} of what the training reads.

    Raises:
        UserError: an index that cannot be read.
    """
    return {
        name: Index.load(place).hash if name.startswith("data.") else _sha256(place) for name, place in read_by(config)
    }


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
