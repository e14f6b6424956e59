"""What a step and a checkpoint ask of the other ranks and of the host: counted on two ranks."""

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import Case, batches, build_engine, build_method, train
from test_resume import BATCHES, _config, _start
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fulllora_dist.distributed.comm import Comm
from fulllora_dist.training.step_timer import PARTS, StepTimer
from tests.ranks import RankServer

COLLECTIVES = ("all_reduce", "gather", "all_gather", "all_gather_object", "broadcast", "broadcast_object_list")


class _Work:
    def __init__(self, work: Any, log: list[str]):
        self._work, self._log = work, log

    def wait(self) -> None:
        self._work.wait()
        self._log.append("wait")


@contextmanager
def _watched(group: Any) -> Iterator[list[str]]:
    """The names of the collectives of a group in order, and "wait" where one that was started is waited for."""
    log: list[str] = []
    originals = {name: getattr(dist, name) for name in COLLECTIVES}

    def wrapper(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("group") is not group:
                return originals[name](*args, **kwargs)
            log.append(name)
            work = originals[name](*args, **kwargs)
            return _Work(work, log) if kwargs.get("async_op") else work

        return call

    for name in COLLECTIVES:
        setattr(dist, name, wrapper(name))
    try:
        yield log
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def _host_collectives(comm: Comm, settings: dict) -> list[list[str]]:
    """Of each batch, on a control group of its own, as with GPUs."""
    control = dist.new_group(backend="gloo")
    found = []
    with _watched(control) as log:
        run, trainer = _start(dataclasses.replace(comm, control=control), settings)
        original = trainer.phases.step

        def step(*args: Any) -> Any:
            log.append("step")
            return original(*args)

        object.__setattr__(trainer.phases, "step", step)
        for batch in trainer.batches():
            run.settle()
            log.clear()
            trainer.advance(batch)
            found.append(list(log))
        run.settle()
    return found


def test_one_host_collective_a_batch_behind_the_step(server: RankServer, shards: str, tmp_path: Path) -> None:
    """One more averages the metrics of a batch that is logged; the last one asks once more for a signal."""
    settings = [("run", "log_every", 2), ("run", "checkpoint_every", 100)]
    found = server.run(2, _host_collectives, _config(tmp_path / "run", shards, "pgd", 1, settings))
    assert found[0] == found[1]
    quiet = ["all_reduce", "step", "wait"]
    assert found[0][: BATCHES - 1] == [quiet, [*quiet, "all_reduce"]] * 2 + [quiet]
    assert found[0][-1][:4] == [*quiet, "all_reduce"]


class _Synchronisations(TorchDispatchMode):
    """Values that the host reads from tensors of the device, each of which waits for a GPU. AdamW's count of its steps
    lies on the host."""

    def __init__(self, counts: list[Tensor]):
        super().__init__()
        self.count, self._on_host = 0, counts

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.count += not any(args[0] is count for count in self._on_host)
        return func(*args, **(kwargs or {}))


def _synchronisations(comm: Comm) -> dict[tuple[str, int], tuple[int, int]]:
    """Of a batch, and of them those outside of the updates; after the first two."""
    found = {}
    for stage in (0, 1, 2):
        for name in ("pgd", "free", "n_fgsm", "trades"):
            engine, method, data = build_engine(comm, Case(name, stage)), build_method(name), batches(3)
            train(comm, engine, method, data[:2])
            optimizer = engine._engine.optimizer
            state = optimizer.state if stage == 0 else optimizer.optimizer.state
            with _Synchronisations([values["step"] for values in state.values()]) as seen:
                update, in_updates = engine._step, 0

                def step(update: Any = update, seen: Any = seen) -> bool:
                    nonlocal in_updates
                    before = seen.count
                    updated = update()
                    in_updates += seen.count - before
                    return updated

                engine._step = step  # type: ignore[method-assign]
                method.step(engine, data[2], 2)
            found[name, stage] = seen.count, seen.count - in_updates
    return found


def test_synchronisations_of_a_batch(server: RankServer) -> None:
    """Attacks and weight steps read nothing. An update asks whether the gradient is finite; DeepSpeed does so once
    more to clip each of two groups."""
    for (name, stage), found in server.run(1, _synchronisations)[0].items():
        updates = 2 if name == "free" else 1
        assert found == (updates * (1 if stage == 0 else 3), 0), (name, stage)


def test_shares_of_a_step() -> None:
    """Parts of known length, by the wall clock."""
    timer = StepTimer(torch.device("cpu"))
    for _ in range(3):
        for part, seconds in (("data", 0.02), ("attack", 0.06), ("weight_step", 0.04), ("communication", 0.02)):
            timer.mark(part)
            time.sleep(seconds)
        timer.end_batch()
        time.sleep(0.06)
    timer.mark("data")
    found = timer.take(batch_size=8)
    expected = {"data": 0.1, "attack": 0.3, "weight_step": 0.2, "communication": 0.1}
    assert {name.removeprefix("share_"): share for name, share in found.items() if name.startswith("share_")} == (
        pytest.approx(expected, abs=0.05)
    )
    assert found["step_seconds"] >= 0.2
    assert found["images_per_second"] == pytest.approx(8 / found["step_seconds"])
    assert sum(timer.take(8)[f"share_{part}"] for part in PARTS) == 0, "nothing is counted twice"


def _parts(comm: Comm, stage: int) -> list[str]:
    engine, method = build_engine(comm, Case("pgd", stage)), build_method("pgd")
    seen: list[str] = []
    engine.on_part = seen.append
    train(comm, engine, method, batches(1))
    return seen


@pytest.mark.parametrize("stage", [0, 2])
def test_parts_of_a_step(server: RankServer, stage: int) -> None:
    assert server.run(2, _parts, stage) == [["weight_step", "communication", "weight_step", "attack"]] * 2
