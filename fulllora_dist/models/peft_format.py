"""Plain LoRA in peft's files, adapter_model.safetensors and adapter_config.json, written and read without peft.

peft has one pair of matrices for a layer. Separate branches for q, k and v of a fused projection become one of three
times the rank, with their A below each other and their B on the diagonal, which is exact:

    A = [A_q; A_k; A_v]  [3 r, d_in],    B = diag(B_q, B_k, B_v)  [3 d, 3 r],    alpha and r three times as large

In the other direction each pair becomes one branch. Where ranks differ, smaller ones are filled up: with rows of A as
they start, and columns of zeros in B.
"""

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from fulllora_dist.core.errors import UserError
from fulllora_dist.core.messages import redacted
from fulllora_dist.models.adapt import adapt
from fulllora_dist.models.adapted_model import AdaptedModel
from fulllora_dist.models.attaching import LAYER_NORMS
from fulllora_dist.models.branches import Branch, branches_of
from fulllora_dist.models.given_module import check_given
from fulllora_dist.models.lnlora import LNLoRAOuterBiasLinear
from fulllora_dist.storage.small_files import read_files, write_files

TENSORS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."
_PLAIN = {"use_dora": False, "bias": "none", "fan_in_fan_out": False, "lora_bias": False}
_OFF = (
    *("use_qalora", "use_bdlora", "alora_invocation_tokens", "layer_replication", "arrow_config", "kasa_config"),
    *("monteclora_config", "target_parameters", "trainable_token_indices"),
)
"""Options of LoraConfig with which LoRA is something else than B A beside a layer: what the common ones must be, and
those that must be off."""
_STARTS = (True, False, "gaussian", "eva", "orthogonal", "mica")
"""Values of init_lora_weights that leave W as it is; with others peft subtracts the start of B A from it."""


def save_peft(model: AdaptedModel, folder: str | os.PathLike[str]) -> None:
    """Save plain LoRA (finetune: lora) for `peft.PeftModel.from_pretrained(module, folder)`, a trained head included.

    The module there is the bare backbone, as of `unload`: its images are normalised.

    Args:
        folder: local path or fsspec URL; created if it does not exist.

    Raises:
        UserError: branches with LN, no branches; an attention that never calls its projection, beside which peft's
            branch would have no effect; as for `save_adapter`.

    Example:
        fd.save_peft(model, "lora/")
        lora = peft.PeftModel.from_pretrained(timm.create_model(name, pretrained=True), "lora/")
    """
    if not isinstance(model, AdaptedModel) or model.spec.finetune != "lora":
        given = f"finetune: {model.spec.finetune}" if isinstance(model, AdaptedModel) else type(model).__name__
        raise UserError(f"save_peft: peft's format holds plain LoRA, a model of finetune='lora', got {given}")
    model.check_savable()
    rank, alpha = model.spec.rank, model.spec.alpha
    assert rank is not None
    assert alpha is not None
    by_layer: dict[str, list[Branch]] = {}
    for branch in branches_of(model):
        by_layer.setdefault(branch.name.partition(".lnlora")[0], []).append(branch)
    tensors, ranks = {}, {}
    for path, branches in by_layer.items():
        layer = branches[0].layer
        if isinstance(layer, LNLoRAOuterBiasLinear):
            raise UserError(
                f"save_peft: {model.info.name} never calls {path}, but reads its weight, so that peft's branch beside "
                "it would have no effect; leave q, k and v out of components"
            )
        down, up = _joined(branches, len(layer.weight))  # type: ignore[arg-type]
        tensors[f"{_PREFIX}{path}.lora_A.weight"] = _shaped(down, layer)
        tensors[f"{_PREFIX}{path}.lora_B.weight"] = up[..., None, None] if isinstance(layer, nn.Conv2d) else up
        ranks[path] = len(down)
    own = {name: value for name, value in model.trainable().items() if ".lnlora." not in name}
    tensors |= {f"{_PREFIX}{name}": value.detach() for name, value in own.items()}
    # peft looks for these behind any names, so that "fc" would also mean "sub.fc"
    others = {f"^{re.escape(path)}": r for path, r in ranks.items() if r != rank}
    saved = sorted({name.rpartition(".")[0] for name in own})
    if hidden := [path for path in by_layer for name in saved if re.search(rf"(^|\.){re.escape(name)}($|\.)", path)]:
        raise UserError(
            f"save_peft: peft takes {hidden[0]}, which has a branch, for the trained {', '.join(saved)} by its name; "
            "use save_adapter, or leave that branch out"
        )
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": model.info.name if hasattr(model.backbone, "config") else None,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": others,
        "alpha_pattern": {path: alpha * r / rank for path, r in others.items()},
        "target_modules": _whole_names(by_layer),
        "modules_to_save": saved or None,
        "lora_dropout": 0.0,
        "inference_mode": True,
        **_PLAIN,
    }
    content = save_safetensors({name: value.cpu().contiguous() for name, value in tensors.items()}, {"format": "pt"})
    write_files(folder, {TENSORS: content, CONFIG: (json.dumps(config, indent=2) + "\n").encode()}, "save_peft")


def _whole_names(paths: Iterable[str]) -> str:
    """A pattern for these layers alone: a list would be of ends of names."""
    return "|".join(map(re.escape, paths))


def _joined(branches: Sequence[Branch], outputs: int) -> tuple[Tensor, Tensor]:
    """The branches of a layer as one: A [k, d_in], B [outputs, k], with k the sum of their ranks."""
    down = torch.cat([branch.module.A.detach() for branch in branches])
    up = down.new_zeros(outputs, len(down))
    first = 0
    for branch in branches:
        end = first + len(branch.module.A)
        up[branch.rows, first:end] = branch.module.B.detach()
        first = end
    return down, up


def _shaped(down: Tensor, layer: nn.Module) -> Tensor:
    """A as peft has it beside a convolution, [r, C, kh, kw]."""
    return down.view(-1, *layer.weight.shape[1:]) if isinstance(layer, nn.Conv2d) else down


def load_peft(folder: str | os.PathLike[str], module: nn.Module, **settings: Any) -> AdaptedModel:
    """Adapt a module in place with LoRA that peft saved. (Its dropout, which acts in training alone, is left out.)

    Args:
        folder: local path or fsspec URL of adapter_config.json and adapter_model.safetensors.
        module: the bare model that it belongs to.
        settings: mean, std, image_size and name, see `adapt`.

    Returns:
        The adapted model: pixels in [0, 1] -> logits.

    Raises:
        UserError: files that are missing or damaged, another kind of adapter, tensors that do not fit the module, which
            is then as it was.

    Example:
        model = fd.load_peft("lora/", vit, mean=processor.image_mean, std=processor.image_std)
    """
    if wrong := sorted(settings.keys() - {"mean", "std", "image_size", "name"}):
        raise UserError(f"load_peft: {wrong[0]} is what the adapter says; give mean, std, image_size and name alone")
    config, tensors = _read(folder)
    pairs: dict[str, dict[str, Tensor]] = {}
    own: dict[str, Tensor] = {}
    for key, tensor in sorted(tensors.items()):
        name = key.removeprefix(_PREFIX)
        if match := re.fullmatch(r"(.+)\.lora_(A|B)\.weight", name):
            pairs.setdefault(match[1], {})[match[2]] = tensor.float()
        else:
            own[name.replace(".modules_to_save.", ".")] = tensor.float()
    if not pairs or any(pair.keys() != {"A", "B"} for pair in pairs.values()):
        raise UserError(f"load_peft: {redacted(folder)}/{TENSORS} must have lora_A and lora_B of each layer")
    if unknown := sorted(pairs.keys() - dict(module.named_modules()).keys()):
        raise UserError(f"load_peft: {redacted(folder)} does not fit the module, which has no {unknown[0]}")
    scales = {path: _scale(config, path, len(pair["A"])) for path, pair in pairs.items()}
    rank = max(len(pair["A"]) for pair in pairs.values())
    scale = next(iter(scales.values()))
    check_given(module)
    parts = dict(module.named_modules())
    norms = {name for name in own if isinstance(parts.get(name.rpartition(".")[0]), LAYER_NORMS)}
    settings |= {"rank": rank, "alpha": scale * rank, "train_norms": bool(norms)}
    settings["head"] = "trained" if own.keys() - norms else "frozen"
    model = adapt(module, target_modules=_whole_names(pairs), finetune="lora", **settings)
    try:
        model.load_trainable(_filled(model, pairs, {path: s / scale for path, s in scales.items()}) | own)
    except BaseException as error:
        model.original.restore(module)
        if isinstance(error, UserError):
            raise UserError(f"load_peft: {redacted(folder)} does not fit the module: {error}") from None
        raise
    return model


def _filled(
    model: AdaptedModel, pairs: Mapping[str, Mapping[str, Tensor]], factors: Mapping[str, float]
) -> dict[str, Tensor]:
    """The branches' tensors, smaller ranks filled up.

    Raises:
        UserError: another shape.
    """
    trainable = model.trainable()
    filled: dict[str, Tensor] = {}
    for path, pair in pairs.items():
        down, up = pair["A"].flatten(1), pair["B"].flatten(1)
        a, b = (trainable[f"{path}.lnlora.{name}"].detach().cpu().clone() for name in "AB")
        if down.shape[1] != a.shape[1] or up.shape != (len(b), len(down)):
            raise UserError(
                f"{path} takes A [r, {a.shape[1]}] and B [{len(b)}, r], got {list(down.shape)}, {list(up.shape)}"
            )
        a[: len(down)] = down
        b.zero_()[:, : len(down)] = up * factors[path]
        filled |= {f"{path}.lnlora.A": a, f"{path}.lnlora.B": b}
    return filled


def _scale(config: Mapping[str, Any], path: str, rank: int) -> float:
    """By what peft multiplies B A of a layer."""
    patterns = config.get("alpha_pattern") or {}
    alpha = next((a for key, a in patterns.items() if re.match(rf"(.*\.)?({key})$", path)), config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _read(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    remedy = "give a folder that peft's save_pretrained wrote"
    config_file, tensors_file = read_files(folder, (CONFIG, TENSORS), "load_peft", remedy)
    shown = redacted(folder)
    try:
        config, tensors = json.loads(config_file), load_safetensors(tensors_file)
        kind, _ = config["peft_type"], float(config["lora_alpha"])
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"load_peft: {shown} is damaged, or no LoRA adapter of peft ({error})") from None
    if kind != "LORA":
        raise UserError(f"load_peft: {shown} must be LoRA, got {kind}")
    for key, value in _PLAIN.items():
        if config.get(key, value) != value:
            raise UserError(f"load_peft: {shown} has {key}={config[key]!r}, which is no plain LoRA; must be {value!r}")
    if on := [key for key in _OFF if config.get(key)]:
        raise UserError(f"load_peft: {shown} has {on[0]}={config[on[0]]!r}, which is no plain LoRA; must be off")
    if (start := config.get("init_lora_weights", True)) not in _STARTS:
        raise UserError(
            f"load_peft: {shown} has init_lora_weights={start!r}, with which peft changes the layers' own weights; "
            "save it as plain LoRA with path_initial_model_for_weight_conversion of peft's save_pretrained"
        )
    _check_alphas(shown, config.get("alpha_pattern") or {})
    return config, tensors


def _check_alphas(shown: str, patterns: Any) -> None:
    try:
        for pattern, alpha in patterns.items():
            re.compile(pattern)
            float(alpha)
    except (AttributeError, TypeError, ValueError, re.error) as error:
        raise UserError(
            f"load_peft: {shown} must have regular expressions and numbers as alpha_pattern, got {patterns} ({error})"
        ) from None
