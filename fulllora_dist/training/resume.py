"""Whether the run that is found in a folder is the one that the config describes, and whether nobody else runs it."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fulllora_dist.checkpoints.format import CheckpointMetadata, list_checkpoints, read_metadata
from fulllora_dist.checkpoints.manager import checkpoint_places
from fulllora_dist.config.schema import Config
from fulllora_dist.core.errors import UserError
from fulllora_dist.core.messages import redacted
from fulllora_dist.data.position import StreamPosition
from fulllora_dist.data.settings import RUNNING
from fulllora_dist.storage import urls
from fulllora_dist.storage.folder_lock import FolderLock
from fulllora_dist.training import rollback
from fulllora_dist.training.inputs import load_index

LOCK = "run.lock"
"""Lock of a run's folders (`storage/folder_lock.py`)."""

# settings that may change on resume: the trained adapter does not depend on them, or (paths) their content is checked
# by its fingerprint
_MAY_CHANGE = {
    "distributed",
    "deepspeed",
    "run",
    "guard",
    "evaluation",
    "tracking",
    "plugins",
    "data.train",
    "data.validation",
    "data.held_out",
    *(f"data.{name}" for name in RUNNING),
    "model.checkpoint_path",
    "model.checkpoint_key",
}


def check_same_run(config: Config, saved: dict[str, Any], its_own: bool = True) -> None:
    """Check that a checkpoint with the config `saved` belongs to the same run as `config`.

    Args:
        its_own: whether it was found in the run's own folders, else it is that of `run.resume_from`.

    Raises:
        UserError: a setting that must not change on resume differs.
    """

    def compare(now: dict[str, Any], before: dict[str, Any], prefix: str) -> None:
        for key in now.keys() | before.keys():
            name = prefix + key
            if name in _MAY_CHANGE:
                continue
            new, old = now.get(key), before.get(key)
            if isinstance(new, dict) and isinstance(old, dict):
                compare(new, old, name + ".")
            elif new != old:
                raise UserError(_differs(config, its_own, name, old, new))

    now = config.model_dump(mode="json")
    compare(now, saved, "")
    if now["run"]["seed"] != saved["run"]["seed"]:
        raise UserError(_differs(config, its_own, "run.seed", saved["run"]["seed"], now["run"]["seed"]))


def _differs(config: Config, its_own: bool, name: str, old: object, new: object) -> str:
    if its_own:
        place, other = f"run.output_dir: {config.run.output_dir} holds", "another output folder"
    else:
        place, other = f"run.resume_from: {config.run.resume_from} is of", "remove run.resume_from"
    if name == "optim.epochs":  # learning rate, phases and warm-ups are fractions of the whole run
        other += " and, to train its adapter for longer on a new schedule, adapter.init_from=ADAPTER"
    return f"{place} a run with {name}={old}, got {new}; use the same setting to resume, or {other}"


def check_resumable(config: Config, metadata: CheckpointMetadata, its_own: bool = True) -> None:
    """Check that a run with this config can resume from a checkpoint of this metadata.

    Args:
        its_own: see `check_same_run`.

    Raises:
        UserError: other settings, other data, or other settings than at its last rollback.
    """
    check_same_run(config, metadata["config"], its_own)
    index, began_with = load_index(config.data.train, "data.train"), metadata["stream"]["index_hash"]
    if index.hash != began_with:
        raise UserError(
            f"data.train: {redacted(config.data.train)} is not the data that the run in {config.run.output_dir} "
            f"began with (index {index.hash[:12]}, not {began_with[:12]}); use the same data to resume, or another "
            "run.output_dir"
        )
    StreamPosition(index, config.run.seed, config.optim.batch_size).load_state_dict(metadata["stream"])
    if metadata["rollbacks"]:
        rollback.check_settings(metadata["rollbacks"][-1], config.guard)


def check_saved(config: Config) -> None:
    """`check_resumable` with the newest checkpoint, or else `run.resume_from`, as far as they are on a disk: before
    torch is imported, and before a job waits in a queue. What is unreadable or in a bucket is left to the start itself.

    Raises:
        UserError: see `check_resumable`.
    """
    places = [place for place in checkpoint_places(config.run) if not urls.is_remote(place)]
    metadata = read_metadata(places, config.run.resume_from)
    if metadata is not None:
        check_resumable(config, metadata, its_own=bool(list_checkpoints(*places)))


def run_locks(config: Config, say: Callable[[str], None]) -> list[FolderLock]:
    """The locks of a run's folders. A bucket has none."""
    folders = {"run.output_dir": config.run.output_dir, "run.checkpoint_dir": config.run.checkpoint_dir}
    local = {
        setting: urls.local_path(folder)
        for setting, folder in folders.items()
        if folder is not None and not urls.is_remote(folder)
    }
    if len({os.path.realpath(folder) for folder in local.values()}) < len(local):
        del local["run.checkpoint_dir"]
    return [FolderLock(Path(folder, LOCK), setting, say) for setting, folder in local.items()]


def check_unlocked(config: Config, say: Callable[[str], None]) -> None:
    """Raise UserError if another process trains in the run's folders; nothing is changed."""
    for lock in run_locks(config, say):
        lock.check()
