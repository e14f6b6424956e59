"""Every family on two ranks against the plain loop: at ZeRO-3 each of its tensors is partitioned and found when used.

The families that differ in how a tensor is read come in the short tier, all of them in the long one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pytest
from cases import CHECKPOINTING, OPTIM, Case, batches, build_engine, build_method, state_everywhere, train
from plain_loop import Result, plain_training

from fulllora_dist.core.errors import UserError
from fulllora_dist.distributed.comm import Comm
from fulllora_dist.models.adapted_model import AdaptedModel
from tests.ranks import RankServer
from tests.tiny import FAMILIES, roughen, softmax_ignores, stir, tiny

Checkpointing = Literal["off", "weight_step", "all"]
METHOD = "n_fgsm"
WITHOUT_CHECKPOINTING = ("convit",)
SPLITS = (2, 4, 8)
STEPS = 3  # the warm-up and the first of the cosine


@dataclass(frozen=True)
class FamilyCase:
    family: str
    stage: int
    checkpointing: Checkpointing

    def __str__(self) -> str:
        return f"{self.family}-zero{self.stage}-{self.checkpointing}"


def _cases(families: Sequence[str], stages: Sequence[int]) -> list[FamilyCase]:
    found = []
    for i, family in enumerate(families):
        for stage in stages:
            checkpointing = "off" if family in WITHOUT_CHECKPOINTING else CHECKPOINTING[(i + stage) % 3]
            found.append(FamilyCase(family, stage, checkpointing))
    return found


SHORT = [
    *_cases(["swin", "swinv2", "beit", "eva02_fused", "eva_rope_mixed", "cait", "xcit", "convit"], (3,)),
    *_cases(["swinv2", "xcit", "convit"], (0,)),
]
LONG = _cases(list(FAMILIES), (0, 1, 2, 3))


def _model(family: str) -> AdaptedModel:
    return stir(roughen(tiny(family, head="trained")))


@dataclass(frozen=True)
class _Run:
    result: Result
    whole_here: int
    partitioned_here: int
    total: int


def _references(_: Comm, families: Sequence[str]) -> dict[str, dict[int, Result]]:
    data = batches(STEPS)
    return {f: {parts: plain_training(_model(f), METHOD, data, parts) for parts in (1, *SPLITS)} for f in families}


def _runs(comm: Comm, cases: Sequence[FamilyCase]) -> dict[FamilyCase, _Run]:
    found = {}
    for case in cases:
        model = _model(case.family)
        total = sum(p.numel() for p in model.parameters())
        engine = build_engine(comm, Case(METHOD, case.stage, case.checkpointing), model)
        losses = train(comm, engine, build_method(METHOD), batches(STEPS))
        tensors = state_everywhere(comm, engine).tensors
        parameters = list(model.parameters())
        whole = sum(p.numel() for p in parameters)
        parts = sum(p.ds_tensor.numel() for p in parameters if hasattr(p, "ds_tensor"))
        found[case] = _Run(Result(tensors["master"], tensors["ema"], losses, []), whole, parts, total)
    return found


def _compare(server: RankServer, cases: Sequence[FamilyCase]) -> None:
    families = list(dict.fromkeys(case.family for case in cases))
    references = server.run(1, _references, families, timeout=60 + 10 * len(families))[0]
    runs = server.run(2, _runs, cases, timeout=60 + 20 * len(cases))[0]
    for case in cases:
        _check(case, references[case.family], runs[case])


def _differences(family: str, a: Result, b: Result, kind: str) -> tuple[dict[str, float], float]:
    """{tensor: largest difference}, and the largest of those that have no gradient but rounding."""
    left, right = getattr(a, kind), getattr(b, kind)
    assert left.keys() == right.keys()
    every = {name: (left[name] - right[name]).abs().max().item() for name in left}
    ignored = {name: d for name, d in every.items() if softmax_ignores(family, name)}
    return {name: d for name, d in every.items() if name not in ignored}, max(ignored.values(), default=0.0)


def _check(case: FamilyCase, reference: dict[int, Result], run: _Run) -> None:
    """As in test_parity: to 1e-6, or ten times what splitting the batch changes in the plain loop itself."""
    whole, family = reference[1], case.family
    for kind in ("parameters", "ema"):
        splits = [_differences(family, reference[parts], whole, kind) for parts in SPLITS]
        found, ignored = _differences(family, run.result, whole, kind)
        wrong = {n: d for n, d in found.items() if not d <= max(1e-6, 10 * max(split[n] for split, _ in splits))}
        assert not wrong, (str(case), kind, wrong)
        assert ignored <= 10 * max(split for _, split in splits), (str(case), kind)
    moved, _ = _differences(family, whole, Result(_model(family).trainable(), {}, [], []), "parameters")
    assert min(moved.values()) > 1e-3, (str(case), min(moved, key=lambda name: moved[name]))
    assert run.result.losses == pytest.approx(whole.losses, rel=1e-5), str(case)
    if case.stage == 3:  # nothing is left whole after its use, and half of everything is here
        assert run.whole_here == 0, str(case)
        assert 0.5 <= run.partitioned_here / run.total < 0.54, str(case)


def test_parity_of_the_families_that_differ(server: RankServer) -> None:
    _compare(server, SHORT)


@pytest.mark.long
def test_parity_of_all(server: RankServer) -> None:
    _compare(server, LONG)


def _refused(comm: Comm) -> str:
    try:
        build_engine(comm, Case(METHOD, 0, "weight_step"), _model("convit"), OPTIM)
    except UserError as error:
        return str(error)
    return "nothing was refused"


def test_a_family_without_checkpointing_is_refused_before_the_first_step(server: RankServer) -> None:
    message = server.run(1, _refused)[0]
    assert message.startswith(
        "distributed.activation_checkpointing: convit_tiny of the family ConViT does not support it"
    )
