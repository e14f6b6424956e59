"""Every method, ZeRO stage, number of ranks, checkpointing and accumulation against plain PyTorch.

`PARITY_TABLE=docs/parity.md pytest -m long tests/distributed/test_parity.py` writes the table of largest differences.
"""

import itertools
import os
from collections.abc import Iterable
from functools import partial
from typing import Any, Literal

import deepspeed
import pytest
import torch
from cases import (
    CHECKPOINTING,
    OPTIM,
    RECIPES,
    STAGES,
    UPDATES,
    Case,
    build_data,
    build_engine,
    build_model,
    build_phases,
    state_everywhere,
    train,
)
from plain_loop import Result, plain_training
from torch import Tensor

from fulllora_dist.distributed.comm import Comm
from fulllora_dist.models.settings import Finetune
from tests.ranks import RankServer

Checkpointing = Literal["off", "weight_step", "all"]
SPLITS = (2, 4, 8)
IN_PAIRS = (2, 4)  # where images are mixed
# A bias of k adds the same vector to every key, which softmax does not see: its gradient is zero but for rounding, and
# Adam makes steps of a visible size out of that. It is held to ten times the largest of its own kind.
NO_GRADIENT = ("qkv.lnlora.k.norm.bias", "qkv.bias[k]")


def _short() -> list[tuple[int, Case]]:
    """Each way to train at two of the stages on two ranks, every third on one, the rest varied pairwise."""
    found = []
    for (i, method), stage in itertools.product(enumerate(RECIPES), STAGES):
        if stage in (i % 2, 2 + i % 2):
            found.append((2, Case(method, stage, CHECKPOINTING[(i + stage) % 3], 1 + (i + stage // 2) % 2)))
    for i, method in list(enumerate(RECIPES))[::3]:
        found.append((1, Case(method, i % 4, CHECKPOINTING[(i + 1) % 3], 2 - i % 2)))
    return found


def _others(*wanted: tuple[int, Finetune]) -> list[tuple[int, Case]]:
    return [(2, Case("pgd", stage, CHECKPOINTING[stage % 3], 2, finetune)) for stage, finetune in wanted]


SHORT = _short() + _others((0, "full"), (1, "lora"), (2, "head"), (3, "full"), (3, "layernorm"))
TABLE = os.environ.get("PARITY_TABLE")
WAYS = list(itertools.product(CHECKPOINTING, (1, 2)))


def _ways(world: int, method: int, stage: int) -> list[tuple[Checkpointing, int]]:
    """All six, if the table is asked for; else each checkpointing with either accumulation in turn. On one rank, where
    nothing is spread, one of those."""
    if TABLE:
        return WAYS
    ways = [(checkpointing, 1 + (method + stage + k) % 2) for k, checkpointing in enumerate(CHECKPOINTING)]
    return ways if world == 2 else [ways[(method + stage) % 3]]


FULL = [
    (world, Case(method, stage, *way))
    for world in (1, 2)
    for (i, method), stage in itertools.product(enumerate(RECIPES), STAGES)
    for way in _ways(world, i, stage)
] + _others((1, "full"), (2, "full"))


def splits(recipe: str) -> tuple[int, ...]:
    """How the plain loop's batch is split to see its own rounding."""
    return IN_PAIRS if "targets" in RECIPES[recipe] else SPLITS


def _references(comm: Comm) -> dict[tuple[str, str], dict[int, Result]]:
    """{(finetune, method): {micro-batches: result}}"""
    wanted = sorted({(case.finetune, case.method) for _, case in SHORT})
    return {(finetune, method): _reference(comm, method, finetune=finetune) for finetune, method in wanted}


def _reference(_: Comm, method: str, **settings: Any) -> dict[int, Result]:
    """{micro-batches: result}"""
    return {
        parts: plain_training(build_model(**settings), method, build_data(method), parts)
        for parts in (1, *splits(method))
    }


def _engine_runs(comm: Comm, cases: Iterable[Case], **settings: Any) -> dict[Case, tuple[Result, float | None]]:
    """What the engine makes of each case, and the norm of the last gradient."""
    found = {}
    for case in cases:
        engine = build_engine(comm, case, build_model(finetune=case.finetune, **settings))
        losses = train(comm, engine, build_phases(case.method), build_data(case.method))
        state = state_everywhere(comm, engine)
        own = {n: t.cpu() for n, t in engine._zero.masters().items()}  # of every rank, as its adapter is
        assert all(torch.equal(t, own[n]) for n, t in state.tensors["master"].items())
        assert all(torch.equal(t, state.tensors["ema"][n]) for n, t in engine.adapter().items())
        assert state.updates == UPDATES
        found[case] = Result(state.tensors["master"], state.tensors["ema"], losses, []), engine.gradient_norm()
    return found


@pytest.fixture(scope="module")
def references(server: RankServer) -> dict[tuple[str, str], dict[int, Result]]:
    return server.run(1, _references, timeout=900)[0]


def _runs(server: RankServer, wanted: list[tuple[int, Case]]) -> dict:
    found = {}
    for world in (1, 2):
        cases = [case for w, case in wanted if w == world]
        results = server.run(world, _engine_runs, cases, timeout=300 + 20 * len(cases))
        for case in cases:
            for other in results[1:]:  # every rank holds the same consolidated state
                assert all(
                    torch.equal(results[0][case][0].parameters[n], t) for n, t in other[case][0].parameters.items()
                )
            found[world, case] = results[0][case]
    return found


@pytest.fixture(scope="module")
def short_runs(server: RankServer) -> dict:
    return _runs(server, SHORT)


@pytest.fixture(scope="module")
def full_runs(server: RankServer) -> dict:
    return _runs(server, FULL)


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The bias of timm's fused qkv in its three parts."""
    fused = {name: t.chunk(3) for name, t in tensors.items() if name.endswith("qkv.bias")}
    parts = {f"{name}[{part}]": t for name, ts in fused.items() for part, t in zip("qkv", ts, strict=True)}
    return {name: t for name, t in tensors.items() if name not in fused} | parts


def _differences(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, float]:
    a, b = _apart(a), _apart(b)
    assert a.keys() == b.keys()
    return {name: (a[name] - b[name]).abs().max().item() for name in a}


def _tolerances(reference: dict[int, Result], kind: str) -> dict[str, float]:
    """For each tensor 1e-6, or ten times what splitting the batch changes in the reference itself."""
    whole = getattr(reference[1], kind)
    splits = [_differences(getattr(reference[parts], kind), whole) for parts in reference.keys() - {1}]
    own = {name: max(split[name] for split in splits) for name in splits[0]}
    of_its_kind = max((d for name, d in own.items() if name.endswith(NO_GRADIENT)), default=0)
    return {n: max(1e-6, 10 * (of_its_kind if n.endswith(NO_GRADIENT) else d)) for n, d in own.items()}


def _check(references: dict[tuple[str, str], dict[int, Result]], case: Case, run: tuple[Result, float | None]) -> None:
    result, norm = run
    reference = references[case.finetune, case.method]
    for kind in ("parameters", "ema"):
        tolerances = _tolerances(reference, kind)
        differences = _differences(getattr(result, kind), getattr(reference[1], kind))
        wrong = {n: (d, tolerances[n]) for n, d in differences.items() if not d <= tolerances[n]}
        assert not wrong, (kind, wrong)
    assert result.losses == pytest.approx(reference[1].losses, rel=1e-5)
    assert norm is None if case.stage == 0 else norm == pytest.approx(reference[1].norms[-1], rel=1e-4)


def test_reference_can_tell(references: dict[tuple[str, str], dict[int, Result]]) -> None:
    """The comparison is sharp: parameters move over 50 times the tolerance; clipping acts in some updates only."""
    for (finetune, method), reference in references.items():
        start = {name: p.detach() for name, p in build_model(finetune=finetune).trainable().items()}
        moved = _differences(reference[1].parameters, start)
        least = min(d for n, d in moved.items() if not n.endswith(NO_GRADIENT))
        assert least > 3e-3, method
        tolerances = _tolerances(reference, "parameters")
        largest = max(t for n, t in tolerances.items() if not n.endswith(NO_GRADIENT))
        # how far apart the loop's own split batches are depends on the processor's kernels, most for full and lora
        assert least > 50 * largest, (finetune, method)
        if finetune == "fulllora":
            assert largest < 2e-5, method
            clipped = [norm > OPTIM.grad_clip for norm in reference[1].norms]
            assert any(clipped), method
            assert not all(clipped) or method == "mart", method  # whose loss of two terms is steeper throughout


@pytest.mark.parametrize(("world", "case"), SHORT, ids=lambda v: str(v) if isinstance(v, Case) else f"ranks{v}")
def test_parity(references: dict, short_runs: dict, world: int, case: Case) -> None:
    _check(references, case, short_runs[world, case])


def test_parity_of_norms_beside_the_branches_of_a_block(server: RankServer) -> None:
    settings, case = {"train_norms": True, "blocks": [1]}, Case("pgd", 3, accumulation=2)
    (reference,) = server.run(1, partial(_reference, **settings), "pgd")
    for run in server.run(2, partial(_engine_runs, **settings), [case]):
        _check({("fulllora", "pgd"): reference}, case, run[case])
    moved = _differences(reference[1].parameters, build_model(**settings).trainable())
    norms = [f"blocks.{block}.norm{i}.{tensor}" for block in (0, 1) for i in (1, 2) for tensor in ("weight", "bias")]
    assert min(moved[name] for name in norms) > 1e-3
    assert not any("blocks.0" in name and "lnlora" in name for name in moved)


@pytest.mark.long
@pytest.mark.parametrize(("world", "case"), FULL, ids=lambda v: str(v) if isinstance(v, Case) else f"ranks{v}")
def test_parity_of_all(references: dict, full_runs: dict, world: int, case: Case) -> None:
    _check(references, case, full_runs[world, case])


@pytest.mark.long
def test_parity_table(references: dict, full_runs: dict) -> None:
    """Writes what the matrix measured to the path in PARITY_TABLE."""
    lines = [
        "# Parity with plain PyTorch",
        "",
        f"Largest differences of parameters and their EMA after {UPDATES} updates in fp32 from a plain PyTorch loop",
        "(`tests/distributed/plain_loop.py`), over checkpointing off / weight step / all and accumulation 1 / 2.",
        "*Split* is the loop's own difference when its batch is split into 2, 4 or 8 micro-batches; the parameters",
        f"moved by 1e-2. CPU, gloo, torch {torch.__version__}, deepspeed {deepspeed.__version__}. Written by",
        "`PARITY_TABLE=docs/parity.md pytest -m long tests/distributed/test_parity.py`.",
        "",
        "| method | split | " + " | ".join(f"ZeRO-{s}, {w} rank{'s' * (w > 1)}" for w in (1, 2) for s in STAGES) + " |",
        "|---" * (2 + 2 * len(STAGES)) + "|",
    ]
    unseen: list[float] = []

    def largest(a: Result, b: Result) -> float:
        found = []
        for kind in ("parameters", "ema"):
            for name, difference in _differences(getattr(a, kind), getattr(b, kind)).items():
                (unseen if name.endswith(NO_GRADIENT) else found).append(difference)
        return max(found)

    for method in RECIPES:
        reference = references["fulllora", method]
        cells = [max(largest(reference[parts], reference[1]) for parts in splits(method))]
        for world, stage in itertools.product((1, 2), STAGES):
            same = [
                result
                for (w, c), (result, _) in full_runs.items()
                if (w, c.method, c.stage, c.finetune) == (world, method, stage, "fulllora")
            ]
            cells.append(max(largest(result, reference[1]) for result in same))
        lines.append(f"| {method} | " + " | ".join(f"{cell:.1e}" for cell in cells) + " |")
    lines += [
        "",
        f"Left out: `{NO_GRADIENT[0]}`. It adds the same vector to every key, which softmax does not see, so its",
        "gradient is zero but for rounding. Adam steps along that rounding all the same, with no effect on the model;",
        f"the largest difference there was {max(unseen):.1e}.",
        "",
    ]
    assert len(lines) > 15
    if TABLE:
        with open(TABLE, "w") as file:
            file.write("\n".join(lines))
