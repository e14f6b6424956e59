"""Checkpointing saves memory and recomputes where it should, leaves the attack alone, and loses no gradient."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CHECKPOINTING, Case, batches, build_engine, build_method, build_model, state_everywhere, train
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from fulllora_dist.attacks.pgd import attack_mode
from fulllora_dist.distributed.comm import Comm
from tests.ranks import RankServer

DEPTH = 6
PLACEMENTS = {"with the patch embedding": ("patch_embed", "q", "k", "v", "proj", "fc1", "fc2"), "without": ("q", "fc2")}


@dataclass
class Cost:
    saved: int
    forward: int
    backward: int


def _measure(engine: Any, pixels: torch.Tensor, labels: torch.Tensor, attack: bool) -> Cost:
    """Bytes saved for backward (activations only), and FLOPs of both passes."""
    own = {p.data_ptr() for p in engine.model.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in own:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    pixels = pixels.requires_grad_(attack)
    with FlopCounterMode(display=False) as forward, saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = F.cross_entropy((engine.attack_view if attack else engine)(pixels), labels)
    with FlopCounterMode(display=False) as backward:
        if attack:
            torch.autograd.grad(loss, pixels)
        else:
            engine.backward(loss)
    return Cost(sum(saved.values()), forward.get_total_flops(), backward.get_total_flops())


def _costs(comm: Comm, stage: int) -> dict[str, tuple[Cost, Cost]]:
    """{checkpointing: (attack pass, weight step)}"""
    found = {}
    batch = batches(1)[0]
    for checkpointing in CHECKPOINTING:
        engine = build_engine(comm, Case("pgd", stage, checkpointing), build_model(depth=DEPTH))
        weights = _measure(engine, batch.pixels(), batch.labels, attack=False)
        with attack_mode(engine.attack_view):  # after a weight step, which must leave no switch behind
            found[checkpointing] = _measure(engine, batch.pixels(), batch.labels, attack=True), weights
    return found


@pytest.mark.parametrize("stage", [0, 1])
def test_saves_and_recomputes(server: RankServer, stage: int) -> None:
    costs = server.run(1, _costs, stage)[0]
    plain_attack, plain = costs["off"]
    # the inputs of adapted layers serve their own gradients and the adapter's; a weight step keeps little more
    assert plain_attack.saved < plain.saved < 1.02 * plain_attack.saved
    assert plain_attack.backward < plain.backward
    for checkpointing, (attack, weights) in costs.items():
        assert attack.forward == plain_attack.forward
        assert weights.forward == plain.forward
        recomputing = (checkpointing == "all", checkpointing != "off")
        for cost, reference, recomputes in zip((attack, weights), (plain_attack, plain), recomputing, strict=True):
            if recomputes:
                assert cost.saved < 0.3 * reference.saved, checkpointing  # a block's input instead of its inside
                # the blocks are all but the stem and the head of the forward pass
                assert 0.9 < (cost.backward - reference.backward) / reference.forward < 1, checkpointing
            else:
                assert cost == reference, checkpointing


def _first_gradients(comm: Comm, checkpointing: Any) -> dict[tuple[str, int], dict[str, float]]:
    """{(placement, stage): {tensor: largest first moment after two updates from B = 0}}"""
    found = {}
    for name, placement in PLACEMENTS.items():
        for stage in (1, 3):
            model = build_model(random_b=False, components=placement)
            engine = build_engine(comm, Case("pgd", stage, checkpointing), model)
            train(comm, engine, build_method("pgd"), batches(2))
            moments = state_everywhere(comm, engine).tensors["exp_avg"]
            found[name, stage] = {n: t.abs().max().item() for n, t in moments.items()}
    return found


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_every_tensor_learns(server: RankServer, checkpointing: str) -> None:
    """Reentrant checkpointing would drop the gradients behind an input that asks for none, and the attack hides it."""
    for case, moments in server.run(1, _first_gradients, checkpointing)[0].items():
        # the gradient of the bias of k's LN is zero but for rounding (test_parity.py), below 1e-12
        still = {n: m for n, m in moments.items() if m < 1e-10 and not n.endswith("k.norm.bias")}
        assert not still, case
