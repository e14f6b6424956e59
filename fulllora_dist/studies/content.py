"""What a run is, as far as its result depends on it. By this a finished run is found, whatever it is called, wherever
its files are and whichever commit made it."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from fulllora_dist.config.schema import Config
from fulllora_dist.data.index import Index

_WHOLE = ("tracking", "evaluation", "distributed")
"""Sections that change no adapter, beyond rounding."""
_PLACES = ("checkpoint_path", "train", "validation", "held_out", "cache_dir", "cache_gb")
_RUNNING = ("compile", "num_workers", "connections", "request_timeout_s", "retry_timeout_s", "max_bad_samples")
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
        if not isinstance(values, Mapping) or section in _FREE:
            found[section] = values
            continue
        kept = ("seed",) if section == "run" else values.keys() - {*_PLACES, *_RUNNING}
        found |= {f"{section}.{key}": values[key] for key in sorted(kept)}
    return found


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[str]:
    """How two contents differ, "optim.lr 0.001, now 0.002". A setting that only one of them knows is of another version
    of the package, whose default is what the older version did."""
    for name in one.keys() & other.keys():
        if one[name] != other[name]:
            yield f"{name} {one[name]}, now {other[name]}"


def key_of(settings: Mapping[str, Any]) -> str:
    """A short hash, for names of folders."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def inputs_of(config: Config) -> dict[str, str]:
    """{setting: hash of the content} of what the training reads.

    Raises:
        UserError: an index that cannot be read.
    """
    found = {"data.train": Index.load(config.data.train).hash}
    path = config.model.checkpoint_path
    if path is not None and "://" not in path:
        with open(path, "rb") as file:
            found["model.checkpoint_path"] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
