"""ZeRO shards what it says, communicates only the adapter, and leaves the backbone alone; in bf16 too."""

from collections import Counter
from typing import Any

import pytest
import torch
from cases import EPS, STAGES, Case, batches, build_engine, build_method, build_model, state_everywhere, train
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fulllora_dist.attacks.threat import Linf
from fulllora_dist.distributed.comm import Comm
from fulllora_dist.distributed.engine import Engine
from fulllora_dist.models.weights import fingerprint
from tests.ranks import RankServer

SCALARS = 256  # bytes: norms, flags, barriers


class Collectives(TorchDispatchMode):
    """Calls of each kind of c10d collective and the bytes that this rank puts into them, whoever calls it; and tensors
    that are copied."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.copies = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "c10d":
            # (outputs, inputs, ...) where they differ, (in place, ...) where not
            tensors = args[1] if isinstance(args[1], torch.Tensor | list) else args[0]
            flat = [tensors] if isinstance(tensors, torch.Tensor) else tensors
            flat = [t for item in flat for t in (item if isinstance(item, list) else [item])]
            name = func._schema.name.removeprefix("c10d::")
            self.bytes[name] += sum(t.numel() * t.element_size() for t in flat)
            self.calls[name] += 1
        self.copies += func is torch.ops.aten.clone.default
        return func(*args, **(kwargs or {}))


def _consolidated_backbone(engine: Engine) -> str:
    """Fingerprint of every frozen tensor, gathered where it is partitioned."""
    from deepspeed.runtime.zero import GatheredParameters

    frozen = {n: p for n, p in engine.model.backbone.named_parameters() if not p.requires_grad}
    frozen |= dict(engine.model.backbone.named_buffers())
    with GatheredParameters([p for p in frozen.values() if hasattr(p, "ds_id")]):
        return fingerprint(frozen)


def _optimizer_bytes(engine: Engine) -> int:
    zero = engine._engine.optimizer
    state = zero.state if engine._stage == 0 else zero.optimizer.state
    moments = [t for values in state.values() for key, t in values.items() if key != "step"]
    assert {t.dtype for t in moments} == {torch.float32}
    return sum(t.numel() * t.element_size() for t in moments)


def _by_deepspeed(engine: Engine) -> dict[str, Tensor]:
    """Masters and moments as DeepSpeed consolidates them, tensor by tensor."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    found = {}
    for name, p in engine.model.trainable().items():
        for key in ("exp_avg", "exp_avg_sq"):
            found[f"{key}/{name}"] = safe_get_full_optimizer_state(p, key)
        found[f"master/{name}"] = safe_get_full_fp32_param(p)
    return found


def _inspect(comm: Comm, precision: str) -> dict[int, dict[str, Any]]:
    found = {}
    for stage in STAGES:
        model = build_model(precision=precision)
        engine = build_engine(comm, Case("pgd", stage, "weight_step"), model)
        before = _consolidated_backbone(engine)
        losses = train(comm, engine, build_method("pgd"), batches(4))
        frozen = [p for n, p in model.backbone.named_parameters() if n not in model.trainable()]
        consolidated = state_everywhere(comm, engine)
        state = consolidated.tensors
        if stage > 0:
            mine, theirs = consolidated.named(), _by_deepspeed(engine)
            assert {name for name in mine if not name.startswith("ema/")} == theirs.keys()
            for name, tensor in theirs.items():
                assert torch.equal(mine[name].view(torch.int32), tensor.view(torch.int32)), (stage, name)
        model.check_savable(engine.adapter())  # what the engine does to the modules is no change
        found[stage] = {
            "losses": losses,
            "optimizer_bytes": _optimizer_bytes(engine),
            "frozen_here": sum(p.numel() for p in frozen),
            "frozen_partition": sum(p.ds_tensor.numel() for p in frozen) if stage == 3 else None,
            "frozen_dtypes": {p.dtype for p in frozen},
            "trainable_dtypes": {p.dtype for p in model.trainable().values()},
            "moved": max((t - build_model().trainable()[n]).abs().max().item() for n, t in state["master"].items()),
            "backbone": (before, _consolidated_backbone(engine)),
        }
    return found


@pytest.fixture(scope="module")
def fp32(server: RankServer) -> list[dict[int, dict[str, Any]]]:
    return server.run(2, _inspect, "fp32")


@pytest.fixture(scope="module")
def bf16(server: RankServer) -> list[dict[int, dict[str, Any]]]:
    return server.run(2, _inspect, "bf16")


@pytest.mark.parametrize("rank", [0, 1])
def test_state_and_weights_are_sharded(fp32: list, rank: int) -> None:
    seen = fp32[rank]
    trainable = sum(p.numel() for p in build_model().trainable().values())
    frozen = sum(p.numel() for p in build_model().parameters()) - trainable
    assert seen[0]["optimizer_bytes"] == trainable * 2 * 4
    for stage in (1, 2, 3):
        assert 0.49 <= seen[stage]["optimizer_bytes"] / seen[0]["optimizer_bytes"] <= 0.53, stage
    for stage in (0, 1, 2):
        assert seen[stage]["frozen_here"] == frozen
    assert seen[3]["frozen_here"] == 0  # every one is given back after its use, also after an attack
    assert 0.5 <= seen[3]["frozen_partition"] / frozen <= 0.51


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_backbone_never_changes(request: pytest.FixtureRequest, precision: str, stage: int) -> None:
    expected = build_model(precision=precision)
    own = expected.trainable()
    frozen = {n: t for n, t in expected.backbone.state_dict().items() if n not in own}
    for seen in request.getfixturevalue(precision):
        assert seen[stage]["backbone"] == (fingerprint(frozen), fingerprint(frozen))
        assert seen[stage]["moved"] > 1e-3  # while the adapter does


@pytest.mark.parametrize("stage", STAGES)
def test_bf16(fp32: list, bf16: list, stage: int) -> None:
    """Losses are those of fp32 up to bf16's 8 bits, and nothing that trains is bf16.

    Four updates: after more, the attack's sign() makes whole percents of a last bit, at one stage as between two.
    """
    for exact, rounded in zip(fp32, bf16, strict=True):
        assert rounded[stage]["frozen_dtypes"] == {torch.float32, torch.bfloat16}
        assert rounded[stage]["trainable_dtypes"] == {torch.float32}
        assert rounded[stage]["losses"] == pytest.approx(exact[stage]["losses"], rel=2**-8)
        assert rounded[stage]["losses"] != exact[stage]["losses"]
        assert rounded[stage]["losses"][0] == pytest.approx(rounded[0]["losses"][0], rel=1e-6)


def _communication(comm: Comm) -> dict[tuple[str, int], Counter[str]]:
    """What the third update sends: ("attack" | "weights" | "free", stage); the calls and copies for a checkpoint
    ("saving", stage)."""
    found = {}
    data = batches(3)
    last = data[2].split(comm.world)[comm.rank]
    for stage in STAGES:
        pgd, standard, free = (build_method(name) for name in ("pgd", "standard", "free"))
        engine = build_engine(comm, Case("pgd", stage))
        train(comm, engine, pgd, data[:2])
        with Collectives() as seen:
            pgd.perturb(engine.attack_view, last.pixels(), last.labels, Linf(EPS), 2, last.ids)  # type: ignore[attr-defined]
        found["attack", stage] = seen.bytes
        with Collectives() as seen:
            standard.step(engine, last, 2)
        found["weights", stage] = seen.bytes
        with Collectives() as seen:
            free.step(engine, last, 2)
        found["free", stage] = seen.bytes
        with Collectives() as seen:
            engine.state()
        found["saving", stage] = seen.calls + Counter(copies=seen.copies)
    return found


@pytest.fixture(scope="module")
def communication(server: RankServer) -> list[dict[tuple[str, int], Counter[str]]]:
    return server.run(2, _communication)


@pytest.mark.parametrize("stage", STAGES)
def test_communication(communication: list, stage: int) -> None:
    """Attacks communicate nothing below ZeRO-3, the weight step the adapter alone, and Free's no more than that."""
    trainable = 4 * sum(p.numel() for p in build_model().trainable().values())
    model = 4 * sum(p.numel() for p in build_model().parameters())
    for rank in communication:
        for kind, updates in (("weights", 1), ("free", 2)):
            seen = rank[kind, stage]
            gradients = sum(n for name, n in seen.items() if "reduce" in name)
            gathered = sum(n for name, n in seen.items() if "gather" in name)
            assert updates * trainable <= gradients <= updates * (1.05 * trainable + SCALARS), seen
            if stage < 3:  # at 1 and 2 a rank sends the half of the adapter that it has updated
                assert seen.total() - gradients - gathered <= SCALARS, seen
                assert gathered <= updates * (0 if stage == 0 else 0.55 * trainable + SCALARS), seen
        if stage < 3:
            assert not rank["attack", stage], rank["attack", stage]
        else:  # each of the two steps gathers the weights, half of which each rank holds
            assert rank["attack", stage].total() >= 2 * 0.5 * model


@pytest.mark.parametrize("stage", STAGES)
def test_saving(communication: list, stage: int) -> None:
    """One collective for each flat partition of each moment, of the masters too at ZeRO-3: matrices and vectors are two
    partitions. Rank 0 alone copies."""
    tensors = 4 * len(build_model().trainable())  # masters, two moments, average
    first, second = (dict(seen["saving", stage]) for seen in communication)
    own, others = first.pop("copies"), second.pop("copies", 0)
    assert own - others == tensors
    assert others == 0 or stage == 3, "where each parameter is put together from its parts"
    assert sum(first.values()) == sum(second.values()) == {0: 0, 1: 4, 2: 4, 3: 6}[stage], first


def _in_memory_of_nan(comm: Comm) -> dict[int, tuple[bool, list[float]]]:
    """Whether the adapter is finite, and the losses, where memory that nobody has written to holds NaN."""
    found = {}
    torch.use_deterministic_algorithms(True)  # fills it
    try:
        for stage in STAGES:
            engine = build_engine(comm, Case("pgd", stage), build_model(num_classes=5))
            finite = engine.is_finite()
            found[stage] = finite, train(comm, engine, build_method("pgd"), batches(3))
            assert engine.skipped == 0
    finally:
        torch.use_deterministic_algorithms(False)
    return found


def test_what_pads_a_partition_may_hold_anything(server: RankServer) -> None:
    """As DeepSpeed leaves it at ZeRO-3; a bias of five classes does not divide evenly."""
    found = server.run(2, _in_memory_of_nan)
    for stage in STAGES:
        assert all(rank[stage][0] for rank in found), stage
        assert found[0][stage][1] == pytest.approx(found[0][0][1], rel=0, abs=1e-6), stage
