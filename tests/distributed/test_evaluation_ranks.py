"""The evaluation on ranks that take pieces by turns: the same figures, no rank idle, and on after a kill."""

import dataclasses
import json
import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import SIDE, build_model, noise_shards
from pyautoattack import AutoAttack
from torch import Tensor, nn

from fulllora_dist.attacks.threat import Linf
from fulllora_dist.data.loader import EvalStream
from fulllora_dist.data.subset import Subset
from fulllora_dist.data.transforms import EvalTransform
from fulllora_dist.distributed.comm import Comm
from fulllora_dist.evaluation import progress
from fulllora_dist.evaluation.attacks import EvalAttack, Outcome
from fulllora_dist.evaluation.evaluator import Evaluator
from tests.ranks import RankError, RankServer

EPS = 0.2 / 255
ATTACKS = ["clean", "fgsm", "pgd3x2", "apgd-ce"]


class Sensitive(nn.Module):
    """On it the attacks of `ATTACKS` leave some images right, and differ in which."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.model, self.classes = build_model(num_classes=4).eval(), classes

    def forward(self, x: Tensor) -> Tensor:
        waves = torch.randn(x[0].numel(), self.classes, generator=torch.Generator().manual_seed(3))
        return self.model(x)[:, : self.classes] + 0.6 * torch.sin(x.flatten(1) @ waves)


def _stream(shards: str, n: int | None = None, batch_size: int = 5) -> EvalStream:
    transform = EvalTransform(size=SIDE, crop_pct=1.0)
    return EvalStream(shards, batch_size=batch_size, transform=transform, subset=Subset(n))


def _log_turns(rank: int, log: Path | None, kill: int, pause: float) -> None:
    """Write down which rank attacks which batch with what; be slow, or end at the n-th piece."""
    right, count = EvalAttack.outcome, 0

    def logged(attack: EvalAttack, *args: Any, **kwargs: Any) -> Outcome:
        nonlocal count
        count += 1
        if count == kill:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(pause)
        result = right(attack, *args, **kwargs)
        if log is not None:
            line = json.dumps([rank, attack.name, kwargs["threat"].eps, kwargs["ids"].tolist()]) + "\n"
            with open(log, "a") as file:
                file.write(line)
        return result

    EvalAttack.outcome = logged  # type: ignore[method-assign]


def _evaluate(
    comm: Comm,
    shards: str,
    attacks: list[str],
    check: int = 0,
    partial: str | None = None,
    log: Path | None = None,
    kill: tuple[int, int] = (0, 0),
    pauses: tuple[float, float] = (0, 0),
) -> dict[str, Any]:
    _log_turns(comm.rank, log, kill[1] if comm.rank == kill[0] else 0, pauses[comm.rank])
    before = torch.get_rng_state()
    more = [Linf(EPS / 2), Linf(2 * EPS)]
    samples = {"gradient_masking_samples": check}
    evaluator = Evaluator(attacks, Linf(EPS), comm, more_threats=more, seed=3, progress=False, **samples)
    results = evaluator.run(Sensitive(), _stream(shards), partial)
    assert torch.equal(torch.get_rng_state(), before)
    return results


def _turns(log: Path) -> list[list[Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def _standard(comm: Comm, shards: str) -> dict[str, Any]:
    evaluator = Evaluator(["clean", "pgd10", "autoattack"], Linf(EPS / 2), comm, seed=3, progress=False)
    return evaluator.run(Sensitive(classes=4), _stream(shards, 20))


def test_the_standard_autoattack_on_two_ranks(server: RankServer, tmp_path: Path) -> None:
    """It equals one call of the official code on all images, which forms its batches in its own way."""
    shards = noise_shards(tmp_path, seed=1, classes=4)
    one, two = server.run(2, _standard, shards, timeout=500)
    assert one == two
    clean, pgd, autoattack = (score["correct"] for score in one["attacks"].values())
    assert sum(clean) >= sum(pgd) >= sum(autoattack)
    assert sum(clean) > sum(autoattack) > 0
    assert server.run(1, _official, shards, timeout=500) == [autoattack]


def _official(comm: Comm, shards: str) -> list[int]:
    stream = _stream(shards, 20)
    everything = stream.read(stream.ids)
    model = Sensitive(classes=4)
    adversary = AutoAttack(model, norm="Linf", eps=EPS / 2, version="standard", seed=3)
    adversary.apgd_targeted.n_target_classes = adversary.fab.n_target_classes = 3
    _, predicted = adversary.run_standard_evaluation(everything.pixels(), everything.labels, batch_size=5)
    return (predicted == everything.labels).int().tolist()


PARTS = "apgd-ce+apgd-t"  # of 100 passes, and of 300 with three targets


def _count_passes(comm: Comm, shards: str, partial: str | None, kill: int) -> tuple[dict[str, Any], list[int]]:
    """The evaluation, and the images of each of its forward passes; at the n-th one the process ends."""
    model, sizes = Sensitive(classes=4), list[int]()

    def count(_: nn.Module, inputs: tuple[Tensor]) -> None:
        sizes.append(len(inputs[0]))
        if len(sizes) == kill:
            os.kill(os.getpid(), signal.SIGKILL)

    model.register_forward_pre_hook(count)
    stream = _stream(shards, 20, batch_size=2)
    report = Evaluator([PARTS], Linf(EPS / 2), comm, seed=3, progress=False).run(model, stream, partial)
    return report, sizes


def test_a_kill_inside_autoattack_costs_one_batch_of_one_part(server: RankServer, tmp_path: Path) -> None:
    shards, partial = noise_shards(tmp_path, seed=1, classes=4), str(tmp_path / "partial")
    ((report, sizes),) = server.run(1, _count_passes, shards, None, 0)
    at = len(sizes) - 10  # within the last batch of the last part
    with pytest.raises(RankError):
        server.run(1, _count_passes, shards, partial, at)
    ((resumed, again),) = server.run(1, _count_passes, shards, partial, 0)
    assert resumed == report
    assert at + len(again) - len(sizes) < 350, "less than one batch of the last part again"
    assert 600 < len(sizes) < 0.5 * 10 * 400, "of ten batches most images are wrong from the beginning"


@pytest.fixture(scope="module")
def one(server: RankServer, shards: str) -> dict[str, Any]:
    """The evaluation on one rank."""
    return server.run(1, _evaluate, shards, ATTACKS, 6)[0]


def test_two_ranks_equal_one(server: RankServer, shards: str, one: dict[str, Any]) -> None:
    """Sample for sample, at each eps, and in what the checks measure."""
    two = server.run(2, _evaluate, shards, ATTACKS, 6)
    assert two == [one, one]
    assert one["ids"] == list(range(24))
    assert [point["eps"] for point in one["more_eps"]] == [EPS / 2, 2 * EPS]
    assert "clean" not in one["more_eps"][0]["attacks"], "it has no eps"
    assert one["checks"]["restarts"].keys() == {"n", *(f"restart_{k}" for k in range(1, 6))}
    found = [tuple(score["correct"]) for score in one["attacks"].values()]
    assert len(set(found)) >= min(3, len(found)), "the attacks differ, or equality shows little"
    robust = [point["attacks"][ATTACKS[-1]]["accuracy"] for point in (one["more_eps"][0], one, one["more_eps"][1])]
    assert robust == sorted(robust, reverse=True)
    assert robust[0] > robust[-1]


def test_a_slow_rank_gets_less(server: RankServer, shards: str, tmp_path: Path) -> None:
    """Of 5 batches x 3 eps x 2 attacks; the fast rank does not wait for the slow one but at the end."""
    log = tmp_path / "log"
    server.run(2, _evaluate, shards, ["pgd1", "pgd2"], 0, None, log, (0, 0), (0.0, 0.4))
    turns = _turns(log)
    assert len(turns) == len({json.dumps(turn[1:]) for turn in turns}) == 30
    assert 1 <= sum(turn[0] == 1 for turn in turns) <= 8
    assert next(turn[1] for turn in turns if turn[0] == 0) == "pgd2", "the costliest first"


def test_on_after_a_kill_at_the_batch_where_it_was(
    server: RankServer, shards: str, one: dict[str, Any], tmp_path: Path
) -> None:
    log, partial = tmp_path / "log", str(tmp_path / "evaluation.json.partial")
    for kill, pauses in (((0, 12), (0.02, 0.3)), ((1, 5), (0.3, 0.02))):  # the checks have 8 attacks of their own
        with pytest.raises(RankError):
            server.run(2, _evaluate, shards, ATTACKS, 6, partial, log, kill, pauses)
    (file, *_) = Path(partial).rglob("rank-*.jsonl")
    with open(file, "ab") as cut_short:
        cut_short.write(b'{"name": "pgd3x2 linf 0.0')
    before = _turns(log)
    log.unlink()
    results = server.run(2, _evaluate, shards, ATTACKS, 6, partial, log)
    assert results == [one, one]
    kept = {json.dumps(turn[1:]) for turn in before if turn[1] in ATTACKS}
    again = {json.dumps(turn[1:]) for turn in _turns(log)} & kept
    assert len(kept) >= 6
    assert len(again) <= 2, "what was under way when its rank was killed"
    assert not Path(partial).exists()


def test_another_model_begins_anew(server: RankServer, shards: str, tmp_path: Path) -> None:
    """Results of other weights lie there, and are neither used nor lost."""
    partial = str(tmp_path / "partial")
    with pytest.raises(RankError):
        server.run(1, _evaluate, shards, ["pgd2"], 0, partial, None, (0, 3))
    kept = {path: path.read_bytes() for path in Path(partial).rglob("*.jsonl")}
    assert kept
    server.run(1, _evaluate_other, shards, partial)
    assert {path: path.read_bytes() for path in Path(partial).rglob("*.jsonl")} == kept


def _evaluate_other(comm: Comm, shards: str, partial: str) -> None:
    model = Sensitive()
    with torch.no_grad():
        next(model.parameters()).mul_(1.01)
    log: list[str] = []
    right = EvalAttack.outcome

    def logged(attack: EvalAttack, *args: Any, **kwargs: Any) -> Outcome:
        log.append(attack.name)
        return right(attack, *args, **kwargs)

    EvalAttack.outcome = logged  # type: ignore[method-assign]
    Evaluator(["pgd2"], Linf(EPS), comm, progress=False, seed=3).run(model, _stream(shards), partial)
    assert len(log) == 5


class Slow(nn.Module):
    """So slow on rank 1 that its piece outlasts the limit of a collective, with passes all along."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank, self.weight = rank, nn.Parameter(torch.ones(3, 3 * SIDE * SIDE))

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0.25 * self.rank)
        return x.flatten(1) @ self.weight.T


def _outlast(comm: Comm, shards: str, seconds: float) -> int:
    dataclasses.replace(comm, patience=timedelta(seconds=seconds)).limit_waiting()
    progress.STILL_SECONDS = 2.0
    evaluator = Evaluator(["pgd10"], Linf(EPS), comm, progress=False)
    return evaluator.run(Slow(comm.rank), _stream(shards, 10))["n"]


def test_a_piece_may_outlast_the_limit_of_a_collective(server: RankServer, shards: str) -> None:
    assert server.run(2, _outlast, shards, 3.0) == [10, 10]


def _write(comm: Comm, shards: str, partial: str, output: str, log: Path) -> dict[str, Any]:
    _log_turns(comm.rank, log, 0, 0)
    evaluator = Evaluator(["pgd2"], Linf(EPS), comm, seed=3, progress=False)

    def write(results: dict[str, Any]) -> None:
        Path(output).write_text(json.dumps(results))

    return evaluator.run(Sensitive(), _stream(shards), partial, write)


def test_nothing_is_forgotten_before_it_is_written(server: RankServer, shards: str, tmp_path: Path) -> None:
    """Not where it cannot be written; then, on fewer ranks, nothing is done again and no file is left."""
    log, partial, output = tmp_path / "log", tmp_path / "partial", tmp_path / "missing" / "evaluation.json"
    with pytest.raises(RankError, match="the evaluation cannot be written \\(No such file or directory\\)"):
        server.run(2, _write, shards, str(partial), str(output), log)
    assert len(_turns(log)) == 5
    output.parent.mkdir()
    (result,) = server.run(1, _write, shards, str(partial), str(output), log)
    assert len(_turns(log)) == 5
    assert json.loads(output.read_text()) == result
    assert not partial.exists()
