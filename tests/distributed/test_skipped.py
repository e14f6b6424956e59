"""A loss or gradient that is not finite, on one rank alone: all ranks skip the update, and nothing else changes."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import EPS, SEED, STAGES, Case, batches, build_engine, state_everywhere
from test_resume import BATCHES, _config, _start
from torch import Tensor

from fulllora_dist.attacks.threat import threat_model
from fulllora_dist.checkpoints.format import list_checkpoints, read_checkpoint
from fulllora_dist.core.errors import SharedUserError
from fulllora_dist.data.batch import Batch
from fulllora_dist.distributed.comm import Comm
from fulllora_dist.distributed.engine import Engine
from fulllora_dist.distributed.zero_state import TrainableState
from fulllora_dist.methods import METHODS
from tests.ranks import RankServer

Change = Callable[[Tensor, Tensor], Tensor]
# what becomes of the loss; `p` is a parameter
CHANGES: dict[str, Change] = {
    "loss NaN": lambda loss, p: loss * torch.nan,
    "loss inf, gradient finite": lambda loss, p: loss + torch.inf,
    "loss finite, gradient NaN": lambda loss, p: loss + (0 * p).sqrt().sum(),
}


def _update(comm: Comm, engine: Engine, batch: Batch, micro_batch: int | None, change: Change) -> None:
    """A weight step; of rank 1 and `micro_batch` the loss is changed."""
    for i, micro in enumerate(engine.accumulate(batch.split(comm.world)[comm.rank])):
        loss = F.cross_entropy(engine(micro.pixels()), micro.labels)
        bad = comm.rank == 1 and i == micro_batch
        engine.backward(change(loss, next(iter(engine.model.trainable().values()))) if bad else loss)


def _same(a: TrainableState, b: TrainableState) -> bool:
    return a.updates == b.updates and all(
        torch.equal(tensor, b.tensors[kind][name])
        for kind, named in a.tensors.items()
        for name, tensor in named.items()
    )


def _skip(comm: Comm, stage: int) -> tuple[list[tuple[str, int, int]], int, int, bool]:
    """(change, micro-batch, skipped in a row) of each bad batch; skipped at the end; whether all is as without them."""
    good, bad, *rest = batches(4)
    states, found = [], []
    for changes in ([], CHANGES):
        engine = build_engine(comm, Case("standard", stage, accumulation=2))
        _update(comm, engine, good, None, CHANGES["loss NaN"])
        for name in changes:
            for micro_batch in (0, 1):
                _update(comm, engine, bad, micro_batch, CHANGES[name])
                found.append((name, micro_batch, engine.skipped_in_a_row))
        for batch in rest:
            _update(comm, engine, batch, None, CHANGES["loss NaN"])
        states.append(state_everywhere(comm, engine))
    return found, engine.skipped, engine.skipped_in_a_row, _same(*states)


@pytest.mark.parametrize("stage", STAGES)
def test_the_update_is_skipped_on_all_ranks(server: RankServer, stage: int) -> None:
    each = [(name, micro) for name in CHANGES for micro in (0, 1)]
    for rank in server.run(2, _skip, stage):
        assert rank == ([(*change, i + 1) for i, change in enumerate(each)], len(each), 0, True)


def _free(comm: Comm, threat: dict) -> tuple[int, list[bool], list[int]]:
    """An image of rank 1 is NaN in the second batch: skipped updates, which samples' delta moves in it and after."""
    engine, method = build_engine(comm, Case("free", 1)), METHODS["free"]
    method = method(method.Settings(replays=2), threat_model(**threat), SEED)
    deltas = []
    for step, batch in enumerate(batches(3)):
        if step == 1:
            images = batch.pixels()
            images[5] = torch.nan
            batch = replace(batch, images=images)
        method.step(engine, batch.split(comm.world)[comm.rank], step)
        (delta,) = method.slot_state().values()
        deltas.append(delta.float().clone())
    finite = [bool(delta.isfinite().all()) for delta in deltas]
    still = ((deltas[0] - deltas[1]).abs() < 1e-6).flatten(1).all(dim=1).nonzero().flatten().tolist()
    return engine.skipped, finite, still


@pytest.mark.parametrize("threat", [{"norm": "linf", "eps": EPS}, {"norm": "l2", "eps": 0.8}])
def test_frees_perturbation_outlives_a_bad_image(server: RankServer, threat: dict) -> None:
    """Those of its micro-batch stay where they were, and move on with the next batch."""
    assert server.run(2, _free, threat) == [(2, [True] * 3, []), (2, [True] * 3, [0, 1, 2, 3])]


def _run(comm: Comm, settings: dict, bad: list[int], until: int) -> tuple[int, str, list[str]]:
    """As train.py does, with rank 1's images NaN in some batches, until it falls over: its last step and words."""
    run, trainer = _start(comm, settings)
    said: list[str] = []
    run.say = said.append  # type: ignore[method-assign]
    try:
        for batch in trainer.batches():
            if comm.rank == 1 and trainer.step in bad:
                batch = replace(batch, images=batch.pixels() * torch.nan)
            trainer.advance(batch)
            if trainer.step == until:
                run.settle()
                break
    except SharedUserError as error:
        return trainer.step, str(error), said
    return trainer.step, "", said


def test_skipped_updates_are_counted_over_restarts_and_bounded(server: RankServer, shards: str, tmp_path: Path) -> None:
    settings = [("run", "checkpoint_every", 1), ("run", "max_nonfinite_steps", 1)]
    config = _config(tmp_path / "run", shards, "pgd", 1, settings)
    for step, error, said in server.run(2, _run, config, [1], 3):
        assert (step, error) == (3, "")
        (line,) = (text for text in said if "skipped" in text)
        assert "batch 1: loss or gradient is not finite" in line
    assert [int(Path(p).name) for p in list_checkpoints(str(tmp_path / "run" / "checkpoints"))] == [3, 1], (
        "no checkpoint in doubt"
    )
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["train/skipped"] for line in logged] == [0, 1, 1]
    assert ["train/loss" in line for line in logged] == [True, False, True]
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()

    for step, error, _ in server.run(2, _run, config, [3, 4, 5], BATCHES):
        assert step == 5
        assert error.startswith(
            "run.max_nonfinite_steps: loss or gradient was not finite in the last 2 updates, at most 1"
        )
        assert "that of batch 3" in error
    tensors, metadata = read_checkpoint(list_checkpoints(str(tmp_path / "run" / "checkpoints"))[0])
    assert (metadata["step"], metadata["skipped"], metadata["updates"]) == (3, 1, 2)
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert server.run(2, _run, config, [], BATCHES)[0][:2] == (BATCHES, "")
