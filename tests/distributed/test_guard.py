"""Held-out images during training: right figures, the best checkpoint kept, and the training as without them."""

import dataclasses
import json
import platform
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import EPS, noise_shards
from safetensors.torch import load_file
from test_resume import BATCHES, _config, _start, _train_all

from fulllora_dist.checkpoints.format import list_checkpoints, read_checkpoint
from fulllora_dist.config.schema import Config
from fulllora_dist.core.errors import UserError
from fulllora_dist.data.index import Index
from fulllora_dist.data.loader import EvalStream
from fulllora_dist.data.transforms import EvalTransform
from fulllora_dist.distributed.comm import Comm
from fulllora_dist.evaluation.function import evaluate
from fulllora_dist.training.build import build_model
from fulllora_dist.training.finalize import finalize
from fulllora_dist.training.guard import Guard, batches_of_check
from fulllora_dist.training.inputs import check_inputs
from fulllora_dist.training.phases import build_phases
from fulllora_dist.training.run import cost_notes
from tests.ranks import RankServer

EACH_BATCH = [("run", "checkpoint_every", 1), ("optim", "lr", 0.02)]  # so that the figure moves
STEPS = 3


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Images from which something can be learned."""
    return noise_shards(tmp_path_factory.mktemp("bright"), seed=0, brighter=40)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Others of the same kind."""
    return noise_shards(tmp_path_factory.mktemp("bright"), seed=1, brighter=40)


def _guarded(output: Path, shards: str, held_out: str, stage: int, every: int, *more: tuple[str, str, Any]) -> dict:
    settings = [*EACH_BATCH, ("data", "held_out", held_out), *more]
    config = _config(output, shards, "pgd", stage, settings)
    config["evaluation"] = {"batch_size": 5}  # 24 images: padding, and an odd number of batches
    config["guard"] = {"every": every, "steps": STEPS}
    return config


def _finish(comm: Comm, settings: dict) -> list[str]:
    said: list[str] = []
    run, trainer = _start(comm, settings)
    run.say = said.append  # type: ignore[method-assign]
    finalize(run, trainer)
    return said


def _checkpoints(output: Path) -> dict[int, tuple[dict[str, torch.Tensor], dict[str, Any]]]:
    return {int(Path(path).name): read_checkpoint(path) for path in list_checkpoints(str(output / "checkpoints"))}


def _figures(output: Path, name: str = "guard/robust_accuracy") -> dict[int, float]:
    metrics = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {p["step"]: p[name] for p in metrics if name in p}


def _figure_of(config: dict, average: dict[str, torch.Tensor], held_out: str) -> float:
    """Of an adapter on its own, in this process."""
    model = build_model(Config.model_validate(config))
    model.load_trainable(average)
    info = model.info
    transform = EvalTransform(info.image_size, info.crop_pct, info.interpolation, crop_mode=info.crop_mode)
    stream = EvalStream(held_out, batch_size=5, transform=transform)
    return evaluate(model, stream, attacks=[f"pgd{STEPS}"], eps=EPS)["attacks"][f"pgd{STEPS}"]["accuracy"]


@pytest.mark.parametrize("stages", [(0, 3), pytest.param((1, 2), marks=pytest.mark.long)])
def test_figures_and_training_at_every_stage(
    server: RankServer, shards: str, held_out: str, tmp_path: Path, stages: tuple[int, ...]
) -> None:
    guarded = {stage: _guarded(tmp_path / f"guarded{stage}", shards, held_out, stage, every=1) for stage in stages}
    plain = {stage: _config(tmp_path / f"plain{stage}", shards, "pgd", stage, EACH_BATCH) for stage in stages}
    server.run(2, _train_all, [(run, BATCHES) for run in (*guarded.values(), *plain.values())], timeout=300)
    for stage in stages:
        checkpoints, others = _checkpoints(tmp_path / f"guarded{stage}"), _checkpoints(tmp_path / f"plain{stage}")
        for step in range(1, BATCHES + 1):
            mine, theirs = checkpoints[step][0], others[step][0]
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items()), (stage, step)
        figures = _figures(tmp_path / f"guarded{stage}")
        assert figures.keys() == set(range(1, BATCHES + 1))
        trained = figures | _figures(tmp_path / f"guarded{stage}", "guard/trained_robust_accuracy")
        for found, kind in ((figures, "ema/"), (trained, "master/")):
            for step, figure in found.items():
                tensors = {n.removeprefix(kind): t for n, t in checkpoints[step][0].items() if n.startswith(kind)}
                assert figure == _figure_of(guarded[stage], tensors, held_out), (stage, step, kind)
            assert len(set(found.values())) > 1, stage
        assert trained != figures


def test_the_best_checkpoint_is_kept(server: RankServer, shards: str, held_out: str, tmp_path: Path) -> None:
    """Besides the newest, also by an interrupted run."""
    few = [("run", "keep_checkpoints", 1), ("run", "checkpoint_every", 2)]
    whole, cut = (_guarded(tmp_path / name, shards, held_out, 1, 1, *few) for name in ("whole", "cut"))
    server.run(2, _train_all, [(whole, BATCHES), (cut, 5)])
    server.run(2, _train_all, [(cut, BATCHES)])
    figures = _figures(tmp_path / "whole")
    assert figures == _figures(tmp_path / "cut")
    assert figures.keys() == set(range(1, BATCHES + 1))
    best = max(figures, key=lambda step: (figures[step], -step))
    assert len(set(figures.values())) > 1
    assert best < BATCHES, "the newest is kept anyway"
    for name in ("whole", "cut"):
        checkpoints = _checkpoints(tmp_path / name)
        assert checkpoints.keys() == {best, BATCHES}
        found = checkpoints[BATCHES][1]["best"]
        assert (found["step"], found["robust_accuracy"]) == (best, figures[best])
    assert any(line.startswith("adapter_best: ") for line in server.run(2, _finish, cut)[0])
    adapter = load_file(tmp_path / "cut" / "adapter_best" / "adapter.safetensors")
    assert adapter
    assert all(torch.equal(tensor, checkpoints[best][0][f"ema/{name}"]) for name, tensor in adapter.items())
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / f"{best:08d}")
    said = server.run(2, _finish, cut)[0]
    assert any(line.startswith("warning: no ") for line in said)
    assert not any(line.startswith("adapter_best: ") for line in said)


def test_figures_under_another_attack_are_not_compared(
    server: RankServer, shards: str, held_out: str, tmp_path: Path
) -> None:
    config = _guarded(tmp_path, shards, held_out, 1, every=4)
    server.run(2, _train_all, [(config, 5)])
    assert _figures(tmp_path).keys() == {4}
    best = _checkpoints(tmp_path)[5][1]["best"]
    assert best["of"][-2:] == [24, f"pgd{STEPS}"]
    config["guard"]["steps"] = 40  # none can be more often right under it
    server.run(2, _train_all, [(config, BATCHES)])
    stronger = _checkpoints(tmp_path)[BATCHES][1]["best"]
    assert _figures(tmp_path).keys() == {4, BATCHES}, "the last one too"
    assert stronger["robust_accuracy"] <= best["robust_accuracy"]
    assert (stronger["step"], stronger["of"][-1]) == (BATCHES, "pgd40")


@pytest.mark.parametrize("same", ["train", "validation"])
def test_images_that_are_not_held_out_are_refused(shards: str, held_out: str, tmp_path: Path, same: str) -> None:
    config = _guarded(tmp_path, shards, held_out, 1, 1)
    config["data"]["validation"] = held_out
    check_inputs(Config.model_validate(config | {"data": config["data"] | {"validation": None}}), world=2)
    config["data"]["held_out"] = config["data"][same]
    with pytest.raises(UserError, match=f"data.held_out: 24 of its 24 images are in data.{same}; hold"):
        check_inputs(Config.model_validate(config), world=2)


def test_accidents_are_not_refused(shards: str, held_out: str) -> None:
    """Images are told by their bytes, whatever their order, names and shards."""
    ours, theirs = Index.load(shards), Index.load(held_out)
    assert (ours.images_in(ours), ours.images_in(theirs)) == (24, 0)
    order = np.random.default_rng(0).permutation(24)[:7]
    some = dataclasses.replace(ours, columns={name: ours.columns[name][order] for name in ("size", "crc32")})
    assert ours.images_in(some) == 7


def test_a_look_waits_for_an_update(shards: str, held_out: str, tmp_path: Path) -> None:
    guard = _guard(tmp_path, shards, held_out, every=2)
    assert [guard.due(step, skipping) for step, skipping in ((1, False), (2, True), (3, True), (4, False))] == [
        False, False, False, True,
    ]  # fmt: skip
    assert not guard.due(5, False)
    assert not guard.due(6, True)
    again = _guard(tmp_path, shards, held_out, every=2)
    again.resume(guard.best, guard.state_dict())
    assert not again.due(7, False), "without a best check there is nothing to resume from"
    guard.judge(0.5, 4)
    again.resume(guard.best, guard.state_dict())
    assert again.due(7, False)


def test_an_average_hides_no_collapse(shards: str, held_out: str, tmp_path: Path) -> None:
    """What trains has collapsed, the average of it not yet: noticed, and no good checkpoint."""
    guard = _guard(tmp_path, shards, held_out, every=2, on_collapse="rollback")
    checks = [guard.judge(*check) for check in ((0.75, 2, 0.9), (0.8, 4, 0.85), (0.82, 6, 0.2), (0.81, 8, 0.95))]
    assert [check.collapsed for check in checks] == [False, False, True, False]
    assert guard.best is not None
    assert (guard.best["step"], guard.good, guard.highest) == (6, 8, 0.95)
    assert guard.good_steps == [8], "where the average was best the parameters had fallen"
    assert "95.0 % at batch 8, best 95.0 %" in guard.describe_collapse()
    guard.resume({"step": 6, "robust_accuracy": 0.9, "of": guard.best["of"]}, {"highest": 0.9})
    assert guard.good_steps == [], "an earlier checkpoint does not say how the parameters were"
    guard._averages = False
    assert guard.good_steps == [6], "without an average they were as good"


def _computed(comm: Comm, values: dict) -> tuple[float, int, tuple[float, float]]:
    """The forward passes of the images in a check on this rank, those of a check for each image, and its figures."""
    config = Config.model_validate(values)
    model = build_model(config)
    guard = Guard(config, values["data"]["held_out"], model, comm)
    counts: list[int] = []
    model.register_forward_pre_hook(lambda _, pixels: counts.append(len(pixels[0])))
    figures = guard._attacked(model)[:2]
    return comm.sum(torch.tensor(sum(counts))).item() / (STEPS + 2), guard.images_computed, figures


def test_padding_is_not_computed(server: RankServer, shards: str, held_out: str, tmp_path: Path) -> None:
    """24 images in batches of at most 5; the figures are the same on any number of ranks."""
    config = _guarded(tmp_path, shards, held_out, 0, every=1)
    (alone,), pair = (server.run(world, _computed, config) for world in (1, 2))
    assert alone[:2] == (25, 25)
    assert [found[:2] for found in pair] == [(24, 24)] * 2
    assert alone[2] == pair[0][2] == pair[1][2]


@pytest.mark.parametrize(
    ("n", "world", "largest", "expected"),
    [(256, 64, 64, (4, 1)), (256, 1, 64, (64, 4)), (256, 512, 64, (1, 1)), (250, 64, 2, (2, 2)), (24, 2, 5, (4, 3))],
)
def test_batches_of_a_check(n: int, world: int, largest: int, expected: tuple[int, int]) -> None:
    size, count = batches_of_check(n, world, largest)
    assert (size, count) == expected
    assert n <= size * count * world < n + world * count
    assert size <= largest


def test_the_cost_of_checks(shards: str, held_out: str, tmp_path: Path) -> None:
    """24 images (25 with padding), PGD-3 and two more forward passes, of the average and the parameters, after each of
    6 batches; a batch of 8 is PGD-2 and a weight step: 3 forward and 3 backward passes."""
    guard = _guard(tmp_path, shards, held_out, every=1)
    phases = build_phases(Config.model_validate(_guarded(tmp_path, shards, held_out, 0, every=1)), 3)
    assert guard.share(phases, batch_size=8) == pytest.approx(2 * 25 * 8 / (8 * 6))


def test_too_few_images_to_notice_a_collapse_by(shards: str, held_out: str, tmp_path: Path) -> None:
    """Guessing 6 of 8 right is not so rare."""
    _guard(tmp_path, shards, held_out, every=2, num_samples=6)
    with pytest.raises(UserError, match=r"guard\.on_collapse: stop: 6 held-out images are too few"):
        _guard(tmp_path, shards, held_out, every=2, num_samples=6, on_collapse="stop")


def test_a_costly_guard_is_said_at_the_start(shards: str, held_out: str, tmp_path: Path) -> None:
    """Its passes, counted in a check, against those of the training: PGD of two steps makes 3 and 3."""
    cpu = torch.device("cpu")
    for every in (1, 160):
        config = Config.model_validate(_guarded(tmp_path, shards, held_out, 0, every))
        model = build_model(config)
        guard = Guard(config, held_out, model, Comm(0, 1, cpu, None))
        images: list[int] = []
        block = next(module for name, module in model.named_modules() if name.endswith("blocks.0"))
        handle = block.register_forward_pre_hook(lambda _, inputs, seen=images: seen.append(len(inputs[0])))
        guard._attacked(model)
        handle.remove()
        phases = build_phases(config, 80)
        passes = sum(images) + STEPS * len(guard._batches) * 5  # each step's backward
        forward, backward = phases.phases[0].method.passes()
        trained = phases.total_steps * config.optim.batch_size * (forward + backward)
        cost = phases.total_steps // every * passes * (1 + guard._averages) / trained  # of the average, too
        share = guard.share(phases, batch_size=config.optim.batch_size)
        assert share == pytest.approx(cost, rel=0.05), "a batch that is filled up counts more"
        notes = [line for line in cost_notes(config, phases, guard, cpu) if "guard" in line]
        assert notes == ([] if every == 160 else [line for line in notes if f"about {share:.0%} of" in line])
        assert bool(notes) == (cost > 0.1)


def test_bf16_is_warned_of_where_the_cpu_has_none(shards: str, held_out: str, tmp_path: Path) -> None:
    cpu, values = torch.device("cpu"), _guarded(tmp_path, shards, held_out, 0, 2)
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    has = platform.machine() != "x86_64" or "avx512_bf16" in flags or "amx_tile" in flags
    for precision in ("fp32", "bf16"):
        config = Config.model_validate(values | {"model": values["model"] | {"precision": precision}})
        notes = cost_notes(config, build_phases(config, 80), None, cpu)
        assert len(notes) == (precision == "bf16" and not has)
        assert all("model.precision=fp32 is faster" in note for note in notes)
        assert not cost_notes(config, build_phases(config, 80), None, torch.device("cuda"))


def _guard(output: Path, shards: str, held_out: str, every: int, **settings: Any) -> Guard:
    values = _guarded(output, shards, held_out, 0, every)
    config = Config.model_validate(values | {"guard": values["guard"] | settings})
    return Guard(config, held_out, build_model(config), Comm(0, 1, torch.device("cpu"), None))
