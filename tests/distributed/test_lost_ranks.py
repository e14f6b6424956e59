"""A rank that dies or hangs: the others know within a bounded time, and say so in one line."""

import os
import socket
import time
from dataclasses import replace
from datetime import timedelta

import pytest
from cases import Case, batches, build_engine, build_method, train

from fulllora_dist.distributed import comm as ranks_module
from fulllora_dist.distributed.comm import Comm
from fulllora_dist.distributed.failures import lost_contact
from tests.ranks import RankServer

PATIENCE = 2.0


def _hang(comm: Comm, stage: int, hangs_in: str) -> tuple[str | None, float]:
    """Rank 1 stays away from a weight step, or from a vote, for longer than rank 0 waits."""
    comm = replace(comm, patience=timedelta(seconds=PATIENCE))
    engine, method, (first, second) = build_engine(comm, Case("pgd", stage)), build_method("pgd"), batches(2)
    train(comm, engine, method, [first])
    began = time.monotonic()
    try:
        if comm.rank == 1:
            time.sleep(3 * PATIENCE)
            return None, 0.0
        if hangs_in == "vote":
            comm.max_each([1])
        method.step(engine, second.split(comm.world)[comm.rank], 1)
    except Exception as error:
        return lost_contact(error), time.monotonic() - began
    return "nothing happened", 0.0


@pytest.mark.parametrize(
    ("stage", "hangs_in"),
    [
        (0, "step"),
        pytest.param(1, "step", marks=pytest.mark.long),
        pytest.param(2, "step", marks=pytest.mark.long),
        (3, "step"),
        (1, "vote"),
    ],
)
def test_a_rank_that_hangs(server: RankServer, stage: int, hangs_in: str) -> None:
    (line, seconds), _ = server.run(2, _hang, stage, hangs_in)
    assert line is not None
    assert line.startswith("another rank has died or does not answer (Timed out waiting")
    assert "\n" not in line
    assert PATIENCE * 0.9 < seconds < PATIENCE * 2.8


def test_a_rank_that_died_on_this_machine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    gone = RuntimeError("[pair.cc:561] Connection closed by peer [10.0.0.2]:19078. This is typically caused by")
    here = socket.gethostname()
    try:
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # a zombie, as a killed rank is for a second
        monkeypatch.setattr(ranks_module, "_processes", [(here, os.getpid()), (here, child), ("elsewhere", child)])
        end = (
            "(Connection closed by peer [10.0.0.2]:19078); re-run the same command to resume from the newest checkpoint"
        )
        assert lost_contact(gone) == f"rank 1 has died {end}"
    finally:
        os.waitpid(child, 0)
    assert lost_contact(gone) == f"rank 1 has died {end}", "and no zombie any more"
    monkeypatch.setattr(ranks_module, "_processes", [(here, os.getpid()), ("elsewhere", child)])
    assert lost_contact(gone) == f"another rank has died or does not answer {end}"


def test_other_errors_are_left_alone() -> None:
    assert lost_contact(RuntimeError("mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)")) is None
