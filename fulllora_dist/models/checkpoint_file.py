"""Checkpoints as they come: one set of tensors out of a file that may hold a whole training run.

`read_weights` reads the tensors; `unwrapped` removes the prefixes of modules around the model. Nothing but tensors,
plain values and the classes of `_allowed` is unpickled.
"""

import argparse
import io
import logging
import os
import pathlib
import re
import types
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import IO, Any

import fsspec
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor

from fulllora_dist.core.errors import UserError
from fulllora_dist.core.messages import one_line, redacted
from fulllora_dist.models.checkpoint_header import refuse_folder, weights_format
from fulllora_dist.storage import store
from fulllora_dist.storage.machine_copy import cache_folder, machine_copy
from fulllora_dist.storage.urls import classify_error, refuse_credentials

_logger = logging.getLogger(__name__)
_UNSIGNED = "?***"  # the query of a URL after `redacted`
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
WRAPPERS = {"module", "_orig_mod", "model", "base_model", "backbone", "encoder", "base_encoder", "momentum_encoder"}
WRAPPERS |= {"encoder_q", "encoder_k", "student", "teacher", "net", "network", "vit", "0", "1"}
"""Names of modules around a model: of DDP, torch.compile, peft, DINO, MoCo, Lightning, a normaliser and others."""
_OWN_STATES = ("master", "ema")  # of a run's checkpoint.safetensors, in front of a slash
_NORMALISER = {"mean": "mean", "mu": "mean", "std": "std", "sigma": "std"}


def _allowed() -> list[Any]:
    """Classes of plain values that training programs put beside their weights: arguments, paths, NumPy's numbers."""
    scalar = np.float64(0).__reduce__()[0]
    dtypes = [type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8", "?")]
    named = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    path = (pathlib.PosixPath, "pathlib.PosixPath")
    return [argparse.Namespace, types.SimpleNamespace, path, np.dtype, *dtypes, *named]


def read_weights(path: str, key: str | None = None) -> dict[str, Tensor]:
    """Read the tensors of a .safetensors file, or of one that torch.save wrote, at a local path or fsspec URL.

    Args:
        key: which set of weights to take where the file has several, such as "state_dict_ema"; a path with dots.

    Raises:
        UserError: the file is missing, damaged or no weights file, needs a class that is not allowed, or has several
            sets of weights and no `key`.
    """
    url, path = path, redacted(path)
    content = _load(url, path)
    return _chosen(content, key, path)


def _load(url: str, path: str) -> Any:
    """The content of a file, whatever its ending."""
    try:
        refuse_credentials(url)
    except UserError as error:
        raise UserError(f"model.checkpoint_path: {error}") from None
    if url.endswith(_UNSIGNED):
        raise UserError(
            f"model.checkpoint_path: {path} was saved without its signature; set it to a readable path or URL"
        )
    refuse_folder(url)
    try:
        with _opened(url) as file:
            if weights_format(file, path) == "safetensors":
                return load_safetensors(file.read())
            with torch.serialization.safe_globals(_allowed()), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Detected pickle protocol")
                return torch.load(file, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"model.checkpoint_path: {path} does not exist; give a .safetensors or .pth file") from None
    except SafetensorError as error:
        raise UserError(f"model.checkpoint_path: {path} is not a complete safetensors file ({error})") from None
    except OSError as error:
        raise UserError(f"model.checkpoint_path: {classify_error(error, url)}") from None
    except Exception as error:  # torch.load may raise anything on damaged files
        text = _ANSI.sub("", str(error))
        named = re.search(r"GLOBAL (\S+)", text)
        if named is not None:
            raise UserError(
                f"model.checkpoint_path: {path} does not load with weights_only=True, as it holds "
                f"{named[1].rstrip('.,')}; save the weights alone where that is trusted: "
                "torch.save(model.state_dict(), FILE)"
            ) from None
        reason = re.search(r"WeightsUnpickler error:\s+(.+)", text)  # torch's advice around it is to trust the file
        raise UserError(
            f"model.checkpoint_path: {path} does not load with weights_only=True "
            f"({one_line(reason[1] if reason else text)}); it must be a "
            "complete file that torch.save wrote"
        ) from None


def _opened(url: str) -> IO[bytes]:
    """A file that can seek. Of a store: this machine's copy, or where none can be kept, what the store sends."""
    if url.partition("://")[0].lower() not in ("s3", "gs", "http", "https"):
        if "://" not in url:
            return open(os.path.expanduser(url), "rb")
        with fsspec.open(url, "rb") as opened:
            return io.BytesIO(opened.read())
    try:
        try:
            return open(machine_copy(url, "weights", ""), "rb")
        except OSError as error:
            _logger.warning("%s: the weights are not kept (%s); set XDG_CACHE_HOME", cache_folder(), error.strerror)
            return io.BytesIO(store.read(url))
    except UserError as error:
        raise UserError(f"model.checkpoint_path: {error}") from None


def _is_set(value: object) -> bool:
    """Whether it is the state dict of a model, and not an optimizer's state or a few statistics."""
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        return False
    return any("." in name for name in value) and all(isinstance(tensor, Tensor) for tensor in value.values())


def _sets(content: Mapping[Any, Any], depth: int = 2) -> dict[str, dict[str, Tensor]]:
    """The sets of weights in nested dictionaries, by their path."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, value in content.items():
        if _is_set(value):
            found[str(name)] = dict(value)
        elif isinstance(value, Mapping) and depth > 1:
            found |= {f"{name}.{inner}": weights for inner, weights in _sets(value, depth - 1).items()}
    return found


def _chosen(content: Any, key: str | None, path: str) -> dict[str, Tensor]:
    """The one set of weights, or the one that `key` names."""
    if isinstance(content, Mapping) and content and all(isinstance(value, Tensor) for value in content.values()):
        own = {
            kind: {name.removeprefix(f"{kind}/"): v for name, v in content.items() if name.startswith(f"{kind}/")}
            for kind in _OWN_STATES
            if any(name.startswith(f"{kind}/") for name in content)
        }
        if key is None and not own:
            return dict(content)
        sets = own or _by_prefix(dict(content), key or "")
        if not sets:
            raise UserError(
                f"model.checkpoint_key: {path} holds a single set of weights, and no {key!r} in it; remove it"
            )
    else:
        flat = isinstance(content, Mapping) and any("." in str(k) and isinstance(v, Tensor) for k, v in content.items())
        sets = _sets(content) if isinstance(content, Mapping) and not flat else {}
        if not sets:
            held = f" (it has {', '.join(map(str, list(content)[:5]))})" if isinstance(content, Mapping) else ""
            raise UserError(
                f"model.checkpoint_path: {path} must contain only tensors, or a dictionary that holds them by their "
                f"names{held}; save the state dict alone"
            )
        if key is not None and key not in sets:  # a set, and a prefix in it
            alone = len(sets) == 1
            for name in [name for name in sets if alone or key.startswith(f"{name}.")]:
                for weights in _by_prefix(sets[name], key.removeprefix(f"{name}.")).values():
                    sets[key] = weights
    if key is None and len(sets) == 1:
        return next(iter(sets.values()))
    if key is None:
        raise UserError(f"model.checkpoint_key: {path} holds several sets of weights; choose one of: {', '.join(sets)}")
    if key not in sets:
        raise UserError(f"model.checkpoint_key: {path} has no weights {key!r}; it has: {', '.join(sets)}")
    return sets[key]


def _by_prefix(weights: dict[str, Tensor], prefix: str) -> dict[str, dict[str, Tensor]]:
    """{prefix: the tensors below it}; empty if there are none."""
    below = {name.removeprefix(f"{prefix}."): t for name, t in weights.items() if name.startswith(f"{prefix}.")}
    return {prefix: below} if below else {}


def check_values(weights: Mapping[str, Tensor], source: str) -> None:
    """Refuse what is no backbone's weights: the tensors of an adapter, values that are not finite, quantized ones.

    Raises:
        UserError: see above.
    """
    names = sorted(weights)  # safetensors reads them in any order
    adapter = next((name for name in names if "lnlora" in name.split(".")), None)
    if adapter is not None:
        raise UserError(
            f"model.checkpoint_path: {source} holds the branches of an adapter ({adapter}), which a backbone has none "
            "of; save it with save_adapter, and give that folder to load or adapter.init_from"
        )
    lora = next((name for name in names if ".lora_A." in name or ".base_layer." in name), None)
    if lora is not None:
        raise UserError(
            f"model.checkpoint_path: {source} holds an adapter of peft ({lora}); merge it first: "
            "torch.save(model.merge_and_unload().state_dict(), FILE)"
        )
    broken = [n for n in names if weights[n].is_floating_point() and not torch.isfinite(weights[n]).all()]
    if broken:
        count = int((~torch.isfinite(weights[broken[0]])).sum())
        raise UserError(
            f"model.checkpoint_path: {source} has values that are not finite in {len(broken)} of {len(weights)} "
            f"tensors, e.g. {count} in {broken[0]}; give weights from before the training diverged"
        )


def unwrapped(
    weights: dict[str, Tensor], names: Callable[[], Collection[str]], source: str, key: str | None = None
) -> tuple[dict[str, Tensor], dict[str, tuple[float, ...]]]:
    """Remove the prefix of the modules around a model, such as "module." or "model.1.".

    Args:
        names: returns the names of the model's tensors; called only if there may be a prefix.
        key: see `read_weights`.

    Returns:
        The weights, and {"mean": ..., "std": ...} of a normaliser beside the model, in units of [0, 1] pixels.

    Raises:
        UserError: two models in the file.
    """
    if not any(name.partition(".")[0] in WRAPPERS for name in weights):
        return weights, {}
    own = set(names())
    counts = Counter(
        name[: len(name) - len(rest)] for name in weights for rest in _rests(name) if rest in own
    )  # {prefix: tensors of the model below it}
    best = sorted(prefix for prefix, count in counts.items() if count == max(counts.values()))
    if not best or 2 * counts[best[0]] < min(len(own), len(weights)):  # other keys, which timm may convert
        while all(name.startswith(("module.", "_orig_mod.")) for name in weights):
            weights = {name.partition(".")[2]: tensor for name, tensor in weights.items()}
        return weights, {}
    if len(best) > 1:
        shown = ", ".join(f"{key}.{prefix}".removeprefix("None.").rstrip(".") for prefix in best)
        raise UserError(f"model.checkpoint_key: {source} holds several models; choose one of: {shown}")
    prefix = best[0]
    if not prefix:
        return weights, {}
    inside = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    around = prefix[: prefix.rstrip(".").rfind(".") + 1]  # a head may stand beside the backbone
    normaliser: dict[str, tuple[float, ...]] = {}
    unused = []
    for name, tensor in weights.items():
        beside, last = name.removeprefix(around), name.rpartition(".")[2]
        if name.startswith(prefix):
            continue
        if beside in own and beside not in inside:
            inside[beside] = tensor
        elif last in _NORMALISER and tensor.numel() == 3:
            normaliser[_NORMALISER[last]] = tuple(tensor.flatten().tolist())
        else:
            unused.append(name)
    if unused:
        warnings.warn(
            f"model.checkpoint_path: {source}: what is outside of {prefix.rstrip('.')} is not used, {len(unused)} "
            f"tensors, e.g. {min(unused)}",
            stacklevel=2,
        )
    return inside, normaliser


def _rests(name: str) -> list[str]:
    """What follows the wrappers at the start of a name, after each of them."""
    rests = [name]
    while (parts := rests[-1].partition("."))[0] in WRAPPERS:
        rests.append(parts[2])
    return rests


def check_normaliser(
    normaliser: Mapping[str, tuple[float, ...]], used: Mapping[str, tuple[float, ...]], source: str
) -> None:
    """Check that the model normalises as the checkpoint's own normaliser does.

    Raises:
        UserError: mean or std differ; the message says what to set.
    """
    for kind, values in normaliser.items():
        if any(abs(a - b) > 1e-4 for a, b in zip(values, used[kind], strict=True)):
            shown = ", ".join(f"{value:.6g}" for value in values)
            now = ", ".join(f"{value:.6g}" for value in used[kind])
            raise UserError(
                f"model.{kind}: the normaliser in {source} has {kind} [{shown}], the model has [{now}]; set "
                f"model.{kind}=[{shown}]"
            )
