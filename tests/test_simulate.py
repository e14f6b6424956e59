"""tools/simulate.py: a run on a cluster. The collectives are those of tests/distributed/test_cluster_model.py."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fulllora_dist.commands import scaling
from fulllora_dist.commands.cluster_model import Machines, Network, requests_an_epoch, simulate, update_seconds
from fulllora_dist.commands.simulate import main
from fulllora_dist.core.errors import UserError
from fulllora_dist.data.index import Index
from fulllora_dist.data.position import TrainWorks
from fulllora_dist.data.reader import ShardReader
from fulllora_dist.data.shards.scan import Shard
from tests.test_plan import config, counted

ROOT = Path(__file__).parents[1]
FREE = Network(0.0, float("inf"))
IDEAL = Machines(1e12, 0.0, FREE, FREE, FREE, float("inf"), float("inf"), 1e5, 0.0)


def run(**machines: Any) -> Any:
    return lambda nodes, counts: simulate(counts, nodes, 2, dataclasses.replace(IDEAL, **machines))


def test_without_anything_in_the_way_a_run_scales_to_its_batch() -> None:
    counts = counted(config(64))
    ideal = run()
    for nodes in (1, 4, 32):
        result = ideal(nodes, counts)
        assert result.efficiency == pytest.approx(1)
        assert result.gpu_hours == pytest.approx(counts.flops("off") / 1e12 / 3600)
        assert result.images == 64 // (2 * nodes)


def test_each_part_is_in_the_way_on_its_own() -> None:
    counts = counted(config(64))
    steps, quick = counts.phases.total_steps, run()(4, counts)
    attack, step = counts.costs(counts.phases.phases[0], "off")

    slow = Network(1e-3, 1e9, trees=True)
    result = run(nodes=slow)(4, counts)
    update = update_seconds(1, counts.model.report.trainable, 8, slow)
    assert result.exposed == pytest.approx(update)
    assert result.step == pytest.approx(quick.step + update)

    result = run(launch=1.0)(4, counts)
    assert result.compute == pytest.approx(attack.operations + step.operations)
    assert attack.operations > 100

    result = run(host=Network(1.0, 1e9, asks=True))(4, counts)
    assert (result.waits_for, result.step) == ("vote", pytest.approx(2 * 7 * 2, rel=0.01))
    result = run(decode=1.0)(4, counts)
    assert (result.waits_for, result.step) == ("decoding", pytest.approx(8 / 2))
    result = run(bucket=1e5)(4, counts)
    assert (result.waits_for, result.step) == ("bucket", pytest.approx(64))

    guarded = counted(config(64, data={"train": "none", "held_out": "none"}))
    result = run()(4, guarded)
    checked = 2 * 11 * 256 * attack.flops * -(-steps // 50) / 1e12
    assert result.guard * result.hours * 3600 * 8 == pytest.approx(checked)


def test_an_all_reduce_goes_the_shorter_way() -> None:
    network = Network(1.0, 1.0, trees=True)
    assert network.all_reduce(0, 64) == 2 * 6  # the tree
    assert network.all_reduce(10**6, 2) == pytest.approx(10**6 + 2)  # the ring
    assert Network(1.0, 1.0, asks=True).all_reduce(0, 4) == 12


@pytest.mark.parametrize(("images", "batch", "workers"), [(20_000, 64, 4), (50_000, 256, 12)])
def test_requests_are_those_of_the_reader(images: int, batch: int, workers: int) -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(50_000, 170_000, images)
    shards = np.arange(images) // 1000
    offsets = np.concatenate([np.cumsum(part + 2048) - part for part in np.split(sizes, np.arange(1000, images, 1000))])
    columns = {"shard": shards.astype(np.int32), "offset": offsets, "size": sizes}
    named = tuple(Shard(f"{i}.tar", 1 << 30, "", "", 1000) for i in range(images // 1000))
    reader = ShardReader(Index("https://bucket.invalid", ("a",), named, columns, "hash"))
    works, asked = TrainWorks(images, 0, batch, 0, batch, 0, (), 0), 0
    for worker in range(workers):
        for work in works(worker, workers):
            if work.epoch:
                break
            asked += len(reader._blocks(work.begin))
    counts = dataclasses.replace(counted(config(batch)), images=images)
    assert requests_an_epoch(counts) == pytest.approx(asked, rel=0.05)


@pytest.mark.long
def test_the_page_is_what_the_command_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its first backbone; the others take a minute."""
    monkeypatch.setattr(scaling, "RUNS", scaling.RUNS[:1])
    monkeypatch.chdir(ROOT)
    main(["--page", str(tmp_path / "page.md")])
    text = (ROOT / "docs" / "scaling.md").read_text()
    assert text.startswith((tmp_path / "page.md").read_text())
    assert text.count("\n## ") == 3


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["--page", "page.md", "--rates", "rates.json"],
            "--page is of three backbones at the given numbers; leave out",
        ),
        ([], "--config is not set"),
        (["--nodes", "0"], "--nodes: must be >= 1, got 0"),
        (["--tflops", "0"], "--tflops: must be > 0, got 0"),
        (["--price", "-1"], "--price: must be >= 0, got -1"),
        (["--config", "demo.yaml", "distributed.zero_stage=3"], "distributed.zero_stage: 3 is not simulated"),
        (["--config", "demo.yaml", "--gpus-per-node", "7"], "optim.batch_size: must be divisible by 7 ranks"),
    ],
)
def test_refused(arguments: list[str], line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT / "configs")
    with pytest.raises(UserError, match=line):
        main(arguments)
