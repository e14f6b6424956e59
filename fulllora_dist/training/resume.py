"""Whether a checkpoint belongs to the run that wants to resume from it."""

from typing import Any

from fulllora_dist.config.schema import Config
from fulllora_dist.config.training import GuardSettings
from fulllora_dist.core.errors import UserError
from fulllora_dist.models.adapter_file import read_adapter
from fulllora_dist.models.finetune import AdaptedModel

# what may change between the attempts of one run: the adapter it makes does not depend on it, or (paths) its content is
# checked by fingerprint
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
}


def check_same_run(config: Config, saved: dict[str, Any], output: str) -> None:
    """Raises:
    UserError: a state with the config `saved` is of another run.
    """

    def compare(now: dict[str, Any], before: dict[str, Any], prefix: str) -> None:
        for key in now.keys() | before.keys():
            name = prefix + key
            if name in _MAY_CHANGE:
                continue
            mine, theirs = now.get(key), before.get(key)
            if isinstance(mine, dict) and isinstance(theirs, dict):
                compare(mine, theirs, name + ".")
            elif mine != theirs:
                raise UserError(
                    f"run.output_dir: {output} holds a run with {name}={theirs}, now it is {mine}; "
                    "choose another output folder, or the same setting to resume"
                )

    now = config.model_dump(mode="json")
    compare(now, saved, "")
    if now["run"]["seed"] != saved["run"]["seed"]:
        raise UserError(
            f"run.output_dir: {output} holds a run with run.seed={saved['run']['seed']}; choose another folder"
        )


def _rollback_settings(settings: GuardSettings) -> dict[str, Any]:
    return settings.model_dump(mode="json", include={"rollback_method", "rollback_lr_factor", "rollback_eps"})


def check_rollback_settings(rollback: dict[str, Any], settings: GuardSettings) -> None:
    """Raises:
    UserError: the run went on from its last rollback with another safer setting than this.
    """
    for key, now in _rollback_settings(settings).items():
        then = rollback.get(key)  # earlier states have no rollback_eps
        if now != then:
            raise UserError(
                f"guard.{key}: the run went back to batch {rollback['to']} and on with {then}, now it is {now}; "
                "take that again"
            )


def _start_from(model: AdaptedModel, folder: str) -> None:
    description, tensors = read_adapter(folder)
    theirs = str(description.backbone.sha256)
    if theirs != model.info.sha256:
        ours = str(model.info.sha256)
        raise UserError(f"adapter.init_from: {folder} belongs to weights {theirs[:12]}, not {ours[:12]}")
    for section, mine in (("adapter", model.spec), ("backbone", model.info)):
        for key in ("alpha", "qkv", "patch_norm_eps", "classes", "image_size", "mean", "std"):
            now, then = getattr(mine, key, None), description.content[section].get(key)
            if now is not None and (list(now) if isinstance(now, tuple) else now) != then:
                raise UserError(f"adapter.init_from: {folder} was trained with {key} {then}, this run has {now}")
    model.load_trainable(tensors)
