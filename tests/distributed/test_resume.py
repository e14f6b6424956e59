"""A run that resumes from its checkpoint ends like an uninterrupted one."""

import json
import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import ARCHITECTURE, BATCH, EPS, RECIPES, STAGES, largest_difference
from torch import Tensor

from fulllora_dist.checkpoints.format import list_checkpoints, read_checkpoint
from fulllora_dist.config.schema import Config
from fulllora_dist.core.errors import UserError
from fulllora_dist.distributed.comm import Comm
from fulllora_dist.distributed.signals import GracefulStop
from fulllora_dist.training.build import build_model, build_stream
from fulllora_dist.training.context import RunContext
from fulllora_dist.training.guard import build_guard
from fulllora_dist.training.phases import build_phases
from fulllora_dist.training.trainer import Trainer
from tests.ranks import RankServer

BATCHES = 6
CUT = 4  # batches until the run is interrupted; its last checkpoint is that of the third


def _config(output: Path, shards: str, method: str, stage: int, settings: Sequence[tuple[str, str, Any]] = ()) -> dict:
    config: dict[str, Any] = {
        "model": {
            "backbone": "vit_tiny_patch16_224",
            "pretrained": False,
            "num_classes": 3,
            "image_size": 16,
            "model_kwargs": ARCHITECTURE | {"depth": 1},
        },
        "adapter": {"rank": 2, "head": "trained"},
        **RECIPES[method],
        "threat": {"eps": EPS, **RECIPES[method].get("threat", {})},
        "data": {"train": shards, "augment": "crop", "num_workers": 0},
        # 24 images make three batches an epoch; Free replays each twice
        "optim": {
            "batch_size": BATCH,
            "epochs": BATCHES / 3 * (2 if method == "free" else 1),
            "lr": 3e-3,
            "warmup_ratio": 0.3,
            "weight_decay": 0.1,
            "grad_clip": 2.3,
            "ema_decay": 0.8,
        },
        "distributed": {
            "zero_stage": stage,
            "gradient_accumulation_steps": 2,
            "activation_checkpointing": "weight_step",
        },
        "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if stage == 3 else {},
        "run": {"output_dir": str(output), "checkpoint_every": 3, "keep_checkpoints": 9, "log_every": 1},
        "tracking": {"enabled": False},
    }
    for section, key, value in settings:
        config[section][key] = value
    return config


def _start(comm: Comm, settings: dict) -> tuple[RunContext, Trainer]:
    config = Config.model_validate(settings)
    run = RunContext(config, comm, GracefulStop())
    model = build_model(config)
    stream = build_stream(config, model.info, comm)
    phases = build_phases(config, stream.steps_per_epoch)
    guard = build_guard(config, model, comm)
    trainer = Trainer(run, model, stream, phases, guard)
    run.open()
    for lock in run._locks:  # this process plays several, one after the other
        lock.release()
    return run, trainer


def _train(comm: Comm, settings: dict, until: int) -> tuple[int, int]:
    """As train.py does, but falling over after batch `until`. The batches it began at and ended at."""
    run, trainer = _start(comm, settings)
    began = trainer.step
    for batch in trainer.batches():
        run.settle()  # or a checkpoint that is due waits for a slow one, and comes a batch later
        trainer.advance(batch)
        if trainer.step == until:
            break
    run.settle()
    return began, trainer.step


def _train_all(comm: Comm, runs: Sequence[tuple[dict, int]]) -> list[tuple[int, int]]:
    return [_train(comm, *run) for run in runs]


def _last(output: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, metadata = read_checkpoint(list_checkpoints(str(output / "checkpoints"))[0])
    assert metadata["step"] == BATCHES
    return tensors, {k: v for k, v in metadata.items() if k not in ("config", "sha256")}


def _losses(output: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["train/loss"] for line in lines}


def _expected_tensors(method: str) -> set[str]:
    return {"master", "exp_avg", "exp_avg_sq", "ema"} | ({"slots"} if method == "free" else set())


ALL = [(method, stage) for method in RECIPES for stage in STAGES]
SHORT = [("free", 0), ("pgd", 1), ("free", 2), ("n_fgsm", 3), ("pgd_mixed", 1), ("pgd_weakened", 0), ("phases", 2)]


def _check_same_topology(server: RankServer, shards: str, folder: Path, cases: list, world: int) -> None:
    """Uninterrupted, interrupted, resumed: the last two in ranks of their own."""
    outputs = {case: (folder / f"{case}-whole", folder / f"{case}-cut") for case in cases}
    whole = [(_config(outputs[case][0], shards, *case), BATCHES) for case in cases]
    cut = [(_config(outputs[case][1], shards, *case), CUT) for case in cases]
    timeout = 60 + 40 * len(cases)
    assert server.run(world, _train_all, whole + cut, timeout=timeout)[0] == [(0, 6)] * len(cases) + [(0, 4)] * len(
        cases
    )
    rest = [(settings, BATCHES) for settings, _ in cut]
    assert server.run(world, _train_all, rest, timeout=timeout)[0] == [(3, 6)] * len(cases)
    for case, (expected, continued) in outputs.items():
        a, b = _last(expected), _last(continued)
        assert {name.partition("/")[0] for name in a[0]} == _expected_tensors(case[0])
        assert a[1] == b[1], case
        assert a[0].keys() == b[0].keys()
        assert not [name for name, tensor in a[0].items() if not torch.equal(tensor, b[0][name])], case


def test_same_topology_is_bit_equal(server: RankServer, shards: str, tmp_path: Path) -> None:
    _check_same_topology(server, shards, tmp_path, SHORT, world=2)


@pytest.mark.long
def test_one_rank_is_bit_equal_for_all(server: RankServer, shards: str, tmp_path: Path) -> None:
    """Two are killed in test_killed.py."""
    _check_same_topology(server, shards, tmp_path, ALL, world=1)


# method, share of the run in which eps rises, (stage, ranks) before and after
MOVES = [
    ("free", 0.0, (1, 2), (3, 1)),
    ("pgd", 0.0, (3, 2), (0, 1)),
    ("free", 0.9, (0, 1), (2, 2)),  # the delta is then no longer -eps, 0 or eps
]


def test_other_topologies_resume(server: RankServer, shards: str, tmp_path: Path) -> None:
    """Other stage, ranks and accumulation: the same losses and adapter but for rounding, Free's delta included."""
    before: dict[int, list] = {1: [], 2: []}
    after: dict[int, list] = {1: [], 2: []}
    outputs = []
    for i, (method, warmup, (stage_a, world_a), (stage_b, world_b)) in enumerate(MOVES):
        whole, moved = tmp_path / f"{i}-whole", tmp_path / f"{i}-moved"
        outputs.append((whole, moved))
        settings = [("threat", "eps_warmup_ratio", warmup)]
        before[world_a].append((_config(whole, shards, method, stage_a, settings), BATCHES))
        before[world_a].append((_config(moved, shards, method, stage_a, settings), CUT))
        settings += [
            ("distributed", "gradient_accumulation_steps", 1),
            ("distributed", "activation_checkpointing", "off"),
        ]
        after[world_b].append((_config(moved, shards, method, stage_b, settings), BATCHES))
    for runs, begin in ((before, 0), (after, 3)):
        for world in (1, 2):
            found = server.run(world, _train_all, runs[world])[0]
            assert all(began == begin for began, _ in found)
    for (whole, moved), move in zip(outputs, MOVES, strict=True):
        (a, facts_a), (b, facts_b) = _last(whole), _last(moved)
        assert facts_a == facts_b
        losses = [_losses(output) for output in (whole, moved)]
        assert losses[0].keys() == losses[1].keys()
        assert losses[0] == pytest.approx(losses[1], abs=1e-6, rel=0), move
        # the bias of k's LN has no gradient but rounding, which Adam amplifies (test_parity.py)
        live = [{n: t for n, t in tensors.items() if not n.endswith("k.norm.bias")} for tensors in (a, b)]
        slots = [[tensors.pop(n) for n in list(tensors) if n.startswith("slots/")] for tensors in live]
        assert largest_difference(*live) <= 1e-6, move
        assert len(slots[0]) == (move[0] == "free")
        for mine, theirs in zip(*slots, strict=True):
            assert mine.shape == (BATCH, 3, 16, 16)
            # a sign may turn where the gradient is zero but for rounding
            assert ((mine - theirs).abs() > 1e-6).float().mean() < 1e-3, move
            assert mine.abs().float().mean() > 0.5 * mine.abs().max()


def _signalled(comm: Comm, settings: dict) -> tuple[int, bool, int | None]:
    """Rank 1 alone gets SIGTERM in the second batch."""
    with GracefulStop() as stop:
        run, trainer = _start(comm, settings)
        run.stop = stop
        for batch in trainer.batches():
            if comm.rank == 1 and trainer.step == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            trainer.advance(batch)
            if comm.rank == 0 and trainer.stopped:  # the scheduler's signal to the others comes a little later
                os.kill(os.getpid(), signal.SIGTERM)
        return trainer.step, trainer.stopped, stop.signal


def test_a_signal_to_one_rank_stops_all(server: RankServer, shards: str, tmp_path: Path) -> None:
    """All ranks leave after the same batch, with the checkpoint saved and the signal to report."""
    found = server.run(2, _signalled, _config(tmp_path / "run", shards, "standard", 0))
    assert found == [(2, True, signal.SIGTERM)] * 2
    assert read_checkpoint(list_checkpoints(str(tmp_path / "run" / "checkpoints"))[0])[1]["step"] == 2


def _signalled_at_the_end(comm: Comm, settings: dict) -> tuple[bool, int | None]:
    """Rank 1 gets SIGTERM while the last checkpoint is saved."""
    with GracefulStop() as stop:
        run, trainer = _start(comm, settings)
        run.stop, save = stop, trainer.save

        def saving() -> None:
            save()
            if comm.rank == 1 and trainer.step == trainer.total_steps:
                os.kill(os.getpid(), signal.SIGTERM)

        trainer.save = saving  # type: ignore[method-assign]
        trainer.train()
        return trainer.stopped, stop.signal


def test_a_signal_during_the_last_checkpoint_is_not_lost(server: RankServer, shards: str, tmp_path: Path) -> None:
    """Or an evaluation of hours would begin, which no further signal ends."""
    config = _config(tmp_path / "run", shards, "standard", 0)
    assert server.run(2, _signalled_at_the_end, config) == [(True, signal.SIGTERM)] * 2
    assert server.run(2, _train, config, BATCHES) == [(BATCHES, BATCHES)] * 2


def _refused(comm: Comm, settings: dict) -> str:
    with pytest.raises(UserError) as error:
        _train(comm, settings, BATCHES)
    return str(error.value)


def test_what_cannot_resume_is_refused(server: RankServer, shards: str, tmp_path: Path) -> None:
    output = tmp_path / "run"
    server.run(2, _train, _config(output, shards, "standard", 0), 3)
    shutil.copytree(output / "checkpoints", tmp_path / "kept")
    for settings, named in (
        ([("optim", "lr", 1.0)], "optim.lr"),
        ([("run", "seed", 1)], "run.seed"),
        ([("adapter", "rank", 3)], "adapter.rank"),
    ):
        lines = server.run(2, _refused, _config(output, shards, "standard", 0, settings))
        assert all(named in line and "\n" not in line for line in lines)
    # a new output folder resumes from a given checkpoint
    elsewhere = _config(
        tmp_path / "new", shards, "standard", 0, [("run", "resume_from", str(tmp_path / "kept" / "00000003"))]
    )
    assert server.run(2, _train, elsewhere, BATCHES)[0] == (3, BATCHES)


def test_no_state_of_a_diverged_run(server: RankServer, shards: str, tmp_path: Path) -> None:
    """A learning rate that makes NaN ends the run with one line before NaN is saved, logged that batch or not."""
    settings = [
        ("optim", "lr", 1e30),
        ("optim", "grad_clip", 0.0),
        ("optim", "warmup_ratio", 0.0),
        ("run", "checkpoint_every", 1),
    ]
    config = _config(
        tmp_path / "run",
        shards,
        "standard",
        0,
        [*settings, ("run", "log_every", 100), ("run", "max_nonfinite_steps", 2)],
    )
    assert all("lower optim.lr" in line for line in server.run(2, _refused, config))
    for path in list_checkpoints(str(tmp_path / "run" / "checkpoints")):
        assert all(t.isfinite().all() for n, t in read_checkpoint(path)[0].items() if n.startswith("master/"))
