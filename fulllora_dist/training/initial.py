"""What training starts from beside a checkpoint: an adapter of the same backbone."""

from fulllora_dist.checkpoints.format import Checkpoint
from fulllora_dist.core.errors import UserError
from fulllora_dist.distributed.zero_state import TrainableState
from fulllora_dist.models.adapted_model import AdaptedModel, check_tensors
from fulllora_dist.models.adapter_file import read_adapter


def initial_state(model: AdaptedModel, saved: Checkpoint | None, init_from: str | None) -> TrainableState | None:
    """The state of the adapter `init_from`; None without one, and if the run resumes from the checkpoint `saved`.

    Called before DeepSpeed starts, which takes seconds.

    Raises:
        UserError: the checkpoint or the adapter has a different backbone, or the adapter different settings.
    """
    if saved is None:
        return state_of_adapter(model, init_from) if init_from else None
    sha256 = saved[1]["backbone_sha256"]
    if sha256 != model.info.sha256:
        raise UserError(
            f"model.checkpoint_path: the run started from weights with fingerprint {str(sha256)[:12]}, got "
            f"{str(model.info.sha256)[:12]}; use the same backbone to resume"
        )
    return None


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
