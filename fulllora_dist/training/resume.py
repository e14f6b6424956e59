"""Checks on what a run starts from: a checkpoint of the same run, or an adapter of the same backbone."""

from typing import Any

from fulllora_dist.checkpoints.format import Checkpoint
from fulllora_dist.config.schema import Config
from fulllora_dist.core.errors import UserError
from fulllora_dist.distributed.zero_state import TrainableState
from fulllora_dist.models.adapted_model import AdaptedModel, check_tensors
from fulllora_dist.models.adapter_file import read_adapter

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
    "data.num_workers",
    "data.train",
    "data.validation",
    "data.held_out",
    "data.max_bad_samples",
    "data.connections",
    "data.request_timeout_s",
    "data.retry_timeout_s",
    "data.cache_dir",
    "data.cache_gb",
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


def initial_state(model: AdaptedModel, saved: Checkpoint | None, init_from: str | None) -> TrainableState | None:
    """The state of the adapter `init_from`; None without one, and if the run resumes from the checkpoint `saved`.

    Called before DeepSpeed starts, which takes seconds.

    Raises:
        UserError: the checkpoint or the adapter has a different backbone, or the adapter different settings.
    """
    if saved is not None:
        check_backbone(model, saved[1]["backbone_sha256"])
        return None
    return state_of_adapter(model, init_from) if init_from else None


def check_backbone(model: AdaptedModel, sha256: str | None) -> None:
    """Check that the model has the backbone that the run started from.

    Args:
        sha256: fingerprint of the backbone, from the checkpoint.

    Raises:
        UserError: the model has a different backbone.
    """
    if sha256 != model.info.sha256:
        raise UserError(
            f"model.checkpoint_path: the run started from weights with fingerprint {str(sha256)[:12]}, got "
            f"{str(model.info.sha256)[:12]}; use the same backbone to resume"
        )


def state_of_adapter(model: AdaptedModel, folder: str) -> TrainableState:
    """The initial state from a saved adapter: its tensors, without moments and at update 0.

    Raises:
        UserError: the adapter has a different backbone or different settings; the message names adapter.init_from.
    """
    description, tensors = read_adapter(folder)
    adapter_backbone, backbone = str(description.backbone.sha256), str(model.info.sha256)
    if adapter_backbone != backbone:
        raise UserError(
            f"adapter.init_from: {folder} belongs to a backbone with fingerprint {adapter_backbone[:12]}, got "
            f"{backbone[:12]}; use the backbone it was trained on"
        )
    for section, current in (("adapter", model.spec), ("backbone", model.info)):
        for key in ("alpha", "qkv", "patch_norm_eps", "classes", "image_size", "mean", "std"):
            now, then = getattr(current, key, None), description.content[section].get(key)
            if now is not None and (list(now) if isinstance(now, tuple) else now) != then:
                raise UserError(
                    f"adapter.init_from: {folder} was trained with {key}={then}, got {now}; use the same setting"
                )
    try:
        check_tensors(model.held(), tensors)
    except UserError as error:
        raise UserError(f"adapter.init_from: {folder}: {str(error).removeprefix('adapter: ')}") from None
    return TrainableState(0, {"master": tensors})
