"""`model.compile`: the same gradients, no graph break within a block, and a bounded number of compilations."""

from typing import Any

import pytest
import torch
from cases import Case, batches, build_engine, build_method, build_model, largest_difference, train
from torch._dynamo.utils import counters

from fulllora_dist.attacks.pgd import attack_mode
from fulllora_dist.distributed.comm import Comm
from fulllora_dist.models.compiled import compile_blocks, uncompiled
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
        moments.append(engine.state().tensors["exp_avg"])
    frames = counters["frames"]["ok"]
    with torch.no_grad(), attack_mode(engine.model), uncompiled(engine.model):
        engine.model(batches(1)[0].pixels()[:3])
    scale = max(tensor.abs().max().item() for tensor in moments[0].values())
    return largest_difference(*moments) / scale, frames, counters["frames"]["ok"], dict(counters["graph_break"])


@pytest.mark.long
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_compiled_training(server: RankServer, stage: int) -> None:
    difference, frames, with_evaluation, breaks = server.run(1, _compiled, stage, timeout=600)[0]
    assert difference < 1e-4
    assert not breaks
    assert frames == 2 * len(SIZES)  # an attack pass and a weight step of each image size, whatever the depth
    assert with_evaluation == frames
