"""Killed in every phase, again and again: what comes out is bit for bit the uninterrupted run.

Hooks that this test puts into its ranks tell the phases apart and log them; from that log the kills are drawn.
"""

import json
import os
import random
import signal
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from cases import RECIPES, STAGES
from safetensors.torch import load_file
from test_resume import BATCHES, _config, _expected_tensors, _last, _train, _train_all

from fulllora_dist.attacks.threat import L2, Linf
from fulllora_dist.checkpoints.format import list_checkpoints, read_checkpoint
from fulllora_dist.commands import train
from fulllora_dist.data.batch import Batch
from fulllora_dist.distributed.comm import Comm
from fulllora_dist.distributed.engine import Engine
from fulllora_dist.evaluation.evaluator import Evaluator
from fulllora_dist.training.trainer import Trainer
from tests.ranks import RankError, RankServer

TRAINING = ("attack", "backward", "before rename", "after rename")
FIRST_CHECKPOINT = 2
FIRST_PIECE = 10  # steps of the attack on one batch, and the beginning
WINDOW = 5  # batches of a restart within which it is killed


class Kill(NamedTuple):
    """SIGKILL to `rank` when it comes to `phase` for the `nth` time in this restart."""

    rank: int
    phase: str
    nth: int


def _hook(rank: int, log: Path, kill: Kill | None, after: int = 0) -> None:
    """Log the phases of this process from batch `after` on, and end in one of them."""
    seen: Counter[str] = Counter()
    evaluating, batches = False, 0

    def note(phase: str) -> None:
        if batches < after:
            return
        seen[phase] += 1
        here = Kill(rank, phase, seen[phase])
        with open(log, "a") as file:
            file.write(json.dumps([*here, here == kill]) + "\n")
        if here == kill:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(owner: Any, name: str, before: str = "", after: str = "") -> None:
        call: Callable = getattr(owner, name)

        def hooked(*args: Any, **kwargs: Any) -> Any:
            nonlocal evaluating
            evaluating = evaluating or before == "evaluation"
            if before:
                note("evaluation" if evaluating else before)
            result = call(*args, **kwargs)
            if after:
                note(after)
            return result

        setattr(owner, name, hooked)

    for threat in (Linf, L2):
        around(threat, "steepest", before="attack")  # between an attack's input gradient and its step
    around(Engine, "backward", after="backward")  # the gradient is there, the update is not
    around(os, "rename", before="before rename", after="after rename")
    around(Evaluator, "run", before="evaluation")
    advance = Trainer.advance

    def counted(trainer: Trainer, batch: Batch) -> None:
        nonlocal batches
        advance(trainer, batch)
        batches += 1

    Trainer.advance = counted  # type: ignore[method-assign]


def _restart(comm: Comm, config: str, log: Path, kill: Kill | None) -> int:
    """train.py itself."""
    _hook(comm.rank, log, kill)
    sys.argv = ["train.py", "--config", config]
    return train.main()


def _restart_short(comm: Comm, settings: dict, log: Path, kill: Kill) -> None:
    _hook(comm.rank, log, kill, after=FIRST_CHECKPOINT + 1)
    _train(comm, settings, BATCHES)


def _killed(server: RankServer, work: Callable, config: Any, log: Path, kill: Kill) -> None:
    with pytest.raises(RankError):
        server.run(2, work, config, log, kill)
    assert [*kill, True] in [json.loads(line) for line in log.read_text().splitlines()], "ended otherwise"
    log.unlink()


def _phases(log: Path) -> Counter[tuple[int, str]]:
    """How often each rank comes to each phase."""
    return Counter((rank, phase) for rank, phase, *_ in map(json.loads, log.read_text().splitlines()))


def _final(output: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """All that a run leaves behind, but for times and paths."""
    tensors, metadata = read_checkpoint(list_checkpoints(str(output / "checkpoints"))[0])
    adapter = load_file(output / "adapter" / "adapter.safetensors")
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    evaluation = json.loads((output / "evaluation.json").read_text())
    kept = {key: value for key, value in metadata.items() if key not in ("config", "sha256")}
    metrics = [
        {key: value for key, value in line.items() if key != "time" and not key.startswith("speed/")} for line in lines
    ]
    evaluation = {key: value for key, value in evaluation.items() if key != "adapter"}
    return tensors | adapter, {"facts": kept, "metrics": metrics, "evaluation": evaluation}


def _newest(output: Path) -> int:
    return int(Path(list_checkpoints(str(output / "checkpoints"))[0]).name)


def _draw(counts: Counter[tuple[int, str]], batches: int, each: int) -> list[Kill]:
    """`each` kills in every phase: training's in any order, then the evaluation's."""
    rng = random.Random(0)

    def draw(phase: str) -> Kill:
        rank = rng.choice([rank for rank in (0, 1) if counts[rank, phase]])
        return Kill(rank, phase, rng.randint(1, max(1, round(counts[rank, phase] * WINDOW / batches))))

    kills = [draw(phase) for phase in TRAINING for _ in range(each)]
    rng.shuffle(kills)
    # ranks take pieces of the evaluation by turns: what is sure is that each has a first one
    return kills + [Kill(rng.choice([0, 1]), "evaluation", rng.randint(1, FIRST_PIECE)) for _ in range(each)]


@pytest.mark.parametrize("each", [1, pytest.param(5, marks=pytest.mark.long)])
def test_a_chain_of_kills(server: RankServer, shards: str, tmp_path: Path, each: int) -> None:
    batches = 4 * each * WINDOW + 4  # so many that no restart but the last comes to the end of training
    log = tmp_path / "log"
    files = {}
    for name in ("whole", "chain"):
        settings = [("optim", "epochs", batches / 3), ("run", "checkpoint_every", 2), ("run", "keep_checkpoints", 2)]
        settings += [("data", "validation", shards), ("distributed", "gradient_accumulation_steps", 1)]
        config = _config(tmp_path / name, shards, "pgd", 1, settings)
        config["evaluation"] = {"attacks": ["clean", "pgd20"], "batch_size": 1, "gradient_masking_samples": 0}
        files[name] = tmp_path / f"{name}.yaml"
        files[name].write_text(json.dumps(config))
    assert server.run(2, _restart, str(files["whole"]), log, None) == [0, 0]
    counts = _phases(log)
    assert {phase for _, phase in counts} == {*TRAINING, "evaluation"}
    kills = _draw(counts, batches, each)
    log.unlink()

    for kill in kills:
        _killed(server, _restart, str(files["chain"]), log, kill)
    assert server.run(2, _restart, str(files["chain"]), log, None) == [0, 0]

    (expected, metadata), (tensors, others) = _final(tmp_path / "whole"), _final(tmp_path / "chain")
    assert metadata["facts"]["step"] == batches
    assert others == metadata
    assert tensors.keys() == expected.keys()
    assert not [name for name, tensor in expected.items() if not torch.equal(tensor, tensors[name])]


CASES = [(method, stage) for i, method in enumerate(RECIPES) for stage in STAGES if stage % 2 == i % 2]


@pytest.mark.long
def test_every_method_and_every_stage(server: RankServer, shards: str, tmp_path: Path) -> None:
    """A kill each, in a random phase, when there is a checkpoint to resume from; each method at two of the stages."""
    rng, log = random.Random(4), tmp_path / "log"
    outputs = {case: (tmp_path / f"{case}-whole", tmp_path / f"{case}-killed") for case in CASES}
    settings: dict[Any, Sequence[dict]] = {
        case: [
            _config(output, shards, *case, [("run", "checkpoint_every", FIRST_CHECKPOINT)]) for output in outputs[case]
        ]
        for case in CASES
    }
    server.run(2, _train_all, [(settings[case][0], BATCHES) for case in CASES], timeout=60 + 20 * len(CASES))
    drawn: Counter[str] = Counter()
    for case in CASES:
        phase = rng.choice([p for p in TRAINING if p != "attack" or case[0] != "standard"])
        rank = 0 if "rename" in phase else rng.choice([0, 1])
        _killed(
            server,
            _restart_short,
            settings[case][1],
            log,
            Kill(rank, phase, 1 if "rename" in phase else rng.randint(1, 2)),
        )
        assert FIRST_CHECKPOINT <= _newest(outputs[case][1]) < BATCHES, (
            "it resumes from a checkpoint, and has batches left"
        )
        drawn[phase] += 1
    assert min(drawn[phase] for phase in TRAINING) >= 2
    server.run(2, _train_all, [(settings[case][1], BATCHES) for case in CASES], timeout=60 + 20 * len(CASES))
    for case, (whole, killed) in outputs.items():
        (a, facts_a), (b, facts_b) = _last(whole), _last(killed)
        assert facts_a == facts_b, case
        assert a.keys() == b.keys()
        assert {name.partition("/")[0] for name in a} == _expected_tensors(case[0])
        assert not [name for name, tensor in a.items() if not torch.equal(tensor, b[name])], case
