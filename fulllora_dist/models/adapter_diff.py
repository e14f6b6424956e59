"""Differences between two adapters: their settings, and the update that each layer adds to the backbone."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fulllora_dist.core.settings import flattened
from fulllora_dist.models.adapter_description import AdapterDescription

_NOT_SETTINGS = ("trainable", "trainable_share", "format_version", "sha256", "checksum")


def differing_settings(a: AdapterDescription, b: AdapterDescription) -> list[tuple[str, Any, Any]]:
    """(name, value in A, value in B) of all settings that differ; None if a description (`read_adapter`) lacks one."""
    flat_a, flat_b = (
        dict(flattened({key: value for key, value in one.content.items() if key not in _NOT_SETTINGS}))
        for one in (a, b)
    )
    names = sorted(flat_a.keys() | flat_b.keys())
    return [(name, flat_a.get(name), flat_b.get(name)) for name in names if flat_a.get(name) != flat_b.get(name)]


def layer_differences(
    a: tuple[AdapterDescription, Mapping[str, Tensor]], b: tuple[AdapterDescription, Mapping[str, Tensor]]
) -> list[dict[str, Any]]:
    """Frobenius norms of each branch and each trained tensor in both adapters, and of their difference.

    A branch is compared as the matrix that it applies to the normalised input, (alpha / r) B A diag(w), as different
    A and B, also of different ranks, can have the same product. `A`, `B` and the bias of LN have no rows of their own.

    Args:
        a, b: (description, tensors) as returned by `read_adapter`.

    Returns:
        [{"layer", "a", "b", "difference"}] sorted by name; None if one adapter lacks the layer or has it in another
        shape.
    """
    effect_a, effect_b = _effects(*a), _effects(*b)
    rows = []
    for layer in sorted(effect_a.keys() | effect_b.keys()):
        first, second = effect_a.get(layer), effect_b.get(layer)
        difference = None
        if first is not None and second is not None and first.shape == second.shape:
            difference = float((second - first).norm())
        rows.append(
            {
                "layer": layer,
                "a": None if first is None else float(first.norm()),
                "b": None if second is None else float(second.norm()),
                "difference": difference,
            }
        )
    return rows


def _effects(description: AdapterDescription, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    spec = description.spec
    scale = 1.0 if spec.alpha is None or spec.rank is None else spec.alpha / spec.rank
    effects: dict[str, Tensor] = {}
    for name, tensor in state.items():
        branch, _, part = name.rpartition(".")
        if "lnlora" not in name.split("."):
            effects[name] = tensor.double()
        elif part == "A":
            weight = state.get(f"{branch}.norm.weight")
            scaled = tensor.double() if weight is None else tensor.double() * weight.double()
            effects[branch] = scale * (state[f"{branch}.B"].double() @ scaled)
    return effects


def summed(rows: list[dict[str, Any]]) -> dict[str, float]:
    """{"a", "b", "difference"}: total norms over all layers that both adapters have."""
    both = [row for row in rows if row["difference"] is not None]
    squares = {key: torch.tensor([row[key] for row in both], dtype=torch.float64) for key in ("a", "b", "difference")}
    return {key: float(values.norm()) for key, values in squares.items()}
