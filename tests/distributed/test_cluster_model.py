"""What the model of a cluster (commands/cluster_model.py) says of an update, against real ranks on a slow network."""

import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from cases import Case, batches, build_engine, build_method
from slow_network import Switch, join, unavailable

from fulllora_dist.commands.cluster_model import Network, collectives, update_seconds
from fulllora_dist.distributed.comm import Comm, start_comm
from tests.ranks import RankServer

LATENCY, RATE = 0.05, 20e6
STEPS = 6


def _updates(comm: Comm, switch: str) -> dict[int, tuple[list[tuple[str, int]], list[float], int]]:
    """{stage: (collectives of an update, seconds of each, trainable numbers)} on the switch's network."""
    dist.barrier()
    join(Path(switch), comm.rank)
    dist.destroy_process_group()
    os.environ |= {"MASTER_ADDR": "10.78.0.1", "MASTER_PORT": "29655"}
    comm = start_comm(1)
    found = {}
    for stage in (0, 1):
        engine, method, data = build_engine(comm, Case("pgd", stage)), build_method("pgd"), batches(STEPS + 2)
        mine = [batch.split(comm.world)[comm.rank] for batch in data]
        method.step(engine, mine[0], 0)
        with torch.profiler.profile(record_shapes=True) as profile:
            method.step(engine, mine[1], 1)
        made = [
            (event.name.removeprefix("gloo:"), max(1, *map(int, torch.tensor(event.input_shapes[0] or [1]))))
            for event in profile.events()
            if event.name.startswith("gloo:")
        ]
        seconds = []
        for step in range(2, STEPS + 2):
            dist.barrier()
            start = time.perf_counter()
            method.step(engine, mine[step], step)
            seconds.append(time.perf_counter() - start)
        found[stage] = made, seconds, engine.model.report.trainable
    return found


@pytest.mark.long
@pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
def test_an_update_takes_as_long_as_modelled(server: RankServer, tmp_path: Path) -> None:
    network = Network(LATENCY, RATE, asks=True)
    measured = {}
    for world in (1, 2, 4):
        with Switch(tmp_path / f"switch{world}", LATENCY, RATE):
            measured[world] = server.run(world, _updates, str(tmp_path / f"switch{world}"))
    for world in (2, 4):
        for stage, (made, _, trainable) in measured[world][0].items():
            # of each step the slowest rank, of the steps the one that other work on the machine disturbed least
            seconds, alone = (
                min(map(max, zip(*(rank[stage][1] for rank in measured[n]), strict=True))) for n in (world, 1)
            )
            modelled = update_seconds(stage, trainable, world, network)
            kinds, numbers = zip(*made, strict=True)
            expected = collectives(stage, trainable)
            assert list(kinds) == [one.kind for one in expected]
            reduced = len([one for one in expected if one.kind == "all_reduce"])
            assert list(numbers[:reduced]) == [one.numbers for one in expected[:reduced]]
            padding = sum(numbers[reduced:]) * world - sum(one.numbers for one in expected[reduced:])
            assert 0 <= padding <= 2 * world  # of each group, up to a multiple of the ranks
            assert seconds - alone == pytest.approx(modelled, rel=0.15)
