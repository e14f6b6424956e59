"""`model.compile`: the same gradients, no graph break within a block, and a bounded number of compilations; off, in a
line, where it cannot be."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case, batches, build_engine, build_method, build_model, largest_difference, state_everywhere, train
from test_resume import _config, _start
from torch._dynamo.utils import counters

from fulllora_dist.attacks.pgd import attack_mode
from fulllora_dist.distributed.comm import Comm
from fulllora_dist.models.compiled import compile_blocks, uncompiled
from fulllora_dist.training.build import compile_model
from tests.ranks import RankServer

UPDATES = 2
SIZES = (16, 8)


def _compiled(comm: Comm, stage: int) -> Any:
    """(largest difference of an adapter tensor's gradient sum, frames, graph breaks) of training at two image sizes."""
    torch._dynamo.reset()
    counters.clear()
    moments = []
    for compiled in (False, True):
        engine = build_engine(comm, Case("pgd", stage), build_model(depth=3))
        if compiled:
            compile_blocks(engine.model)
        for size in SIZES:
            data = [batch._each(lambda t: t, batch.slot) for batch in batches(UPDATES)]
            data = [type(b)(b.images[..., :size, :size], b.labels, b.ids, b.mask, b.slot) for b in data]
            train(comm, engine, build_method("pgd"), data)
        moments.append(state_everywhere(comm, engine).tensors["exp_avg"])
    frames = counters["frames"]["ok"]
    with torch.no_grad(), attack_mode(engine.model), uncompiled(engine.model):
        engine.model(batches(1)[0].pixels()[:3])
    scale = max(tensor.abs().max().item() for tensor in moments[0].values())
    return largest_difference(*moments) / scale, frames, counters["frames"]["ok"], dict(counters["graph_break"])


@pytest.mark.long
@pytest.mark.parametrize(("world", "stage"), [(1, 0), (1, 1), (2, 2)])
def test_compiled_training(server: RankServer, world: int, stage: int) -> None:
    for difference, frames, with_evaluation, breaks in server.run(world, _compiled, stage, timeout=600):
        assert difference < 1e-4
        assert not breaks
        assert frames == 2 * len(SIZES)  # an attack pass and a weight step of each image size, whatever the depth
        assert with_evaluation == frames


def _asked(comm: Comm, settings: dict, compiler: str | None) -> tuple[list[str], bool]:
    """What a run says of model.compile, and whether blocks will be compiled; then it trains."""
    if compiler is not None:
        os.environ["CXX"] = compiler
    run, trainer = _start(comm, settings)
    said: list[str] = []
    run.say = said.append  # type: ignore[method-assign]
    compile_model(run.config, trainer.engine.model, run)
    compiled = any(module._compiled_call_impl for module in trainer.engine.model.modules())
    if not compiled:
        trainer.train()
        assert trainer.step == trainer.total_steps
    return said, compiled


@pytest.mark.parametrize(
    ("stage", "compiler", "reason"),
    [
        (3, None, "DeepSpeed's hooks of distributed.zero_stage=3 cannot be compiled"),
        (2, "/no/such/c++", "there is no C++ compiler (/no/such/c++)"),
        (2, None, None),
    ],
)
def test_off_where_it_cannot_be(
    server: RankServer, shards: str, tmp_path: Path, stage: int, compiler: str | None, reason: str | None
) -> None:
    settings = _config(tmp_path / "run", shards, "pgd", stage, [("model", "compile", True)])
    said, compiled = server.run(1, _asked, settings, compiler)[0]
    assert compiled == (reason is None)
    assert said == ([] if compiled else [f"model.compile: off, as {reason}"])
