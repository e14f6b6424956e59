"""Weights of a tag of timm from the Hugging Face hub, asked for once by all processes of a machine."""

import hashlib
import os
import tempfile
from pathlib import Path

import timm
from safetensors.torch import load_file
from torch import Tensor

from fulllora_dist.core.errors import UserError
from fulllora_dist.core.messages import one_line
from fulllora_dist.storage import store
from fulllora_dist.storage.machine_copy import one_at_a_time

_SAFE = {None: "model.safetensors", "open_clip_pytorch_model.bin": "open_clip_model.safetensors"}
"""What timm loads in place of a file of the hub."""
# of httpx, which are no OSError. A hub that is not reached at all is no passing matter: nodes may have no internet
_PASSING = {"ConnectTimeout", "ReadTimeout", "ReadError", "RemoteProtocolError", "TimeoutException"}


def download(name: str) -> dict[str, Tensor]:
    """The weights of a tag: out of the hub's cache on this machine, else from the hub, through timm. The hub is asked
    again for some minutes while it is overloaded.

    Raises:
        UserError: the tag has no weights on the hub, or they cannot be downloaded.
    """
    from huggingface_hub.utils import logging as hub_logging
    from timm.models import load_state_dict_from_hf

    location, filename = _place(name)

    def once() -> dict[str, Tensor]:
        try:
            return load_state_dict_from_hf(location, **({"filename": filename} if filename else {}), weights_only=True)
        except Exception as error:  # hub, proxy and disk errors have no common class
            sentence = one_line(error, 1000).partition(". ")[0][:200]
            raise (OSError if _may_pass(error) else UserError)(sentence) from None

    hub_logging.set_verbosity_error()  # a line a retry, to no use: the last error is told below
    lock = f"fulllora_dist-{os.getuid()}-{hashlib.sha256(location.encode()).hexdigest()}.lock"
    with one_at_a_time(Path(tempfile.gettempdir(), lock)):
        if (kept := kept_weights(name)) is None:
            try:
                return store.persistent(once, f"https://huggingface.co/{location}")
            except UserError as error:
                raise UserError(
                    f"model.backbone: cannot download the weights of {name} from the hub ({error}); "
                    "set checkpoint_path (model.checkpoint_path) to a local file"
                ) from None
    return load_file(kept)


def kept_weights(name: str) -> str | None:
    """The file with the weights of a tag in the hub's cache on this machine; None if there is none.

    Raises:
        UserError: the tag has no weights on the hub.
    """
    from huggingface_hub import try_to_load_from_cache

    location, filename = _place(name)
    repository, _, revision = location.partition("@")
    safe = _SAFE.get(filename, filename or "")
    found = try_to_load_from_cache(repository, safe, revision=revision or None)
    return found if isinstance(found, str) and safe.endswith(".safetensors") else None


def _place(name: str) -> tuple[str, str | None]:
    """The repository of a tag, and its file there; None for the default one."""
    config = timm.models.get_pretrained_cfg(name)
    if config is None or not config.hf_hub_id:
        raise UserError(
            f"model.backbone: {name} has no weights on the hub; set checkpoint_path (model.checkpoint_path) to a file"
        )
    location = config.hf_hub_id if "/" in config.hf_hub_id else f"timm/{config.hf_hub_id}"
    return location, config.hf_hub_filename or None


def _may_pass(error: BaseException) -> bool:
    """Whether the hub answered that it is overloaded, or broke off."""
    seen: BaseException | None = error
    while seen is not None:
        status = getattr(getattr(seen, "response", None), "status_code", None)
        if status is not None:
            return status in (408, 429) or status >= 500
        if type(seen).__name__ in _PASSING:
            return True
        seen = seen.__cause__ or seen.__context__
    return False
