"""What a run may start from: a checkpoint of the same run, or an adapter of the same backbone."""

from typing import Any

from fulllora_dist.config.schema import Config
from fulllora_dist.core.errors import UserError
from fulllora_dist.distributed.zero_state import TrainableState
from fulllora_dist.models.adapted_model import AdaptedModel
from fulllora_dist.models.adapter_file import read_adapter

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


def check_backbone(model: AdaptedModel, sha256: str | None) -> None:
    """Raises:
    UserError: a checkpoint of a run with the backbone `sha256` belongs to other weights than the model's.
    """
    if sha256 != model.info.sha256:
        raise UserError(
            f"model.checkpoint_path: the run began with weights {str(sha256)[:12]}, these have "
            f"{str(model.info.sha256)[:12]}; give the same backbone to resume"
        )


def state_of_adapter(model: AdaptedModel, folder: str) -> TrainableState:
    """The start from a saved adapter: its tensors, no moments, no update made.

    Raises:
        UserError: naming adapter.init_from, where it is of another backbone or kind.
    """
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
    return TrainableState(0, {"master": tensors})
