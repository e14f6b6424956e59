"""A rank that hangs is named, with host, batch, phase and stack, and the run ends; one that is slow is only named."""

import contextlib
import json
import os
import re
import socket
import time
from pathlib import Path

import psutil
import pytest
import yaml
from test_resume import _config

from fulllora_dist.checkpoints.format import list_checkpoints, read_checkpoint
from fulllora_dist.config.load import load_config
from fulllora_dist.core.errors import UserError
from fulllora_dist.distributed import watchdog
from fulllora_dist.distributed.comm import Comm
from fulllora_dist.distributed.watchdog import Beat, Watchdog, missing
from tests.ranks import RankServer
from tests.scripts import Launched

SCRIPT = Path(__file__).resolve().parents[1] / "hanging_train.py"
LIMIT = 5.0  # seconds


def _start(server: RankServer, shards: str, output: Path, how: str, rank: int, **run: object) -> Launched:
    settings = [("run", key, value) for key, value in {"checkpoint_every": 2, **run}.items()]
    settings += [("data", "num_workers", int(how == "worker")), ("data", "request_timeout_s", 1)]
    settings += [("data", "retry_timeout_s", 1), ("distributed", "timeout_minutes", LIMIT / 60)]
    config = _config(output, shards, "pgd", 1, settings)  # type: ignore[arg-type]
    config["data"]["validation"] = shards if how == "evaluation" else None
    config["evaluation"] = {"attacks": ["pgd2"], "gradient_masking_samples": 0, "batch_size": 4}
    config["optim"]["epochs"] = 2 if how == "slow" else 100  # of three batches
    output.mkdir()
    file = output / "given.yaml"
    file.write_text(yaml.safe_dump(config))
    names = {"HOW": how, "RANK_THAT_HANGS": str(rank)}
    return server.launch(SCRIPT, "--config", file, ranks=2, env={**os.environ, **names}, timeout=120)


def _end(launched: Launched, waiting: int) -> tuple[int, int]:
    """The exit code of the rank that waits for the other one, which is killed then, and its process."""
    files = [Path(launched.order.folder, f"pid-{rank}") for rank in (0, 1)]
    while not all(file.exists() and file.read_text() for file in files):
        time.sleep(0.05)
    process, pids = launched.rank(waiting), [launched.rank(rank).pid for rank in (0, 1)]
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.05)
    with contextlib.suppress(psutil.NoSuchProcess):
        other = psutil.Process(pids[1 - waiting])
        for held in [*other.children(recursive=True), other]:
            held.kill()
    launched.wait()
    codes = json.loads(Path(launched.order.folder, "codes").read_text())
    return codes[waiting], pids[1 - waiting]


@pytest.mark.parametrize(
    ("how", "hangs", "said"),
    [
        (
            "stop",
            1,
            r"has not answered for \d+ s, last heard of in batch [23], [a-z_]+; its process is stopped",
        ),
        ("stop", 0, r"has not answered for \d+ s; its process is stopped, its host is gone"),
        ("loop", 1, r"is still in batch 3, attack, for \d+ s; at tests/hanging_train.py:\d+ endless_loop < "),
        (
            "collective",
            1,
            r"waits in another collective than the others, in batch 3, attack; at .*distributed_c10d.py:\d+ barrier < "
            r"tests/hanging_train.py.*; rank 0 waits in batch 3, communication, at .*_c10d.py:\d+ all_reduce <",
        ),
        pytest.param(
            "worker",
            1,
            r"is still in batch \d+, data, for \d+ s; at multiprocessing/.*; its processes \d+ \(stopped",
            marks=pytest.mark.long,
        ),
    ],
    ids=["stopped", "rank 0 stopped", "loop", "another collective", "data worker"],
)
def test_a_rank_that_hangs(server: RankServer, shards: str, tmp_path: Path, how: str, hangs: int, said: str) -> None:
    launched = _start(server, shards, tmp_path / "run", how, hangs)
    try:
        code, pid = _end(launched, 1 - hangs)
    finally:
        launched.kill()
    printed = launched.stderr(1 - hangs)
    who = re.escape(f"rank {hangs} ({socket.gethostname()}, process {pid}) ")
    assert re.search(rf"^warning: no progress for \d+ s: {who}{said}", printed, re.MULTILINE), printed[-4000:]
    assert code == 1
    end = re.findall(r"^error on rank .*Timed out waiting.*re-run the same command to resume.*", printed, re.MULTILINE)
    assert len(end) == 1, printed[-4000:]
    assert hangs == 0 or re.search(who, end[0]), end
    assert "Traceback" not in printed
    (newest, *_) = list_checkpoints(str(tmp_path / "run" / "checkpoints"))
    assert read_checkpoint(newest)[1]["step"] >= 2


def test_a_rank_that_is_slow_is_only_named(server: RankServer, shards: str, tmp_path: Path) -> None:
    """Its batches take longer than the pause of a warning, and together than the limit."""
    ended = _start(server, shards, tmp_path / "run", "slow", 1).wait()
    assert ended.returncode == 0, ended.stderr[-4000:]
    name = re.escape(socket.gethostname())
    assert re.search(rf"^warning: no progress .*rank 1 \({name}, .*is still in batch 1, attack", ended.stderr, re.M)
    slow = re.findall(rf"warning: rank 1 \({name}\) is slow: a batch takes 1.* of its attack", ended.stderr)
    assert len(slow) == 1, "said once"
    assert (tmp_path / "run" / "adapter").exists()


def test_a_rank_that_hangs_in_an_evaluation(server: RankServer, shards: str, tmp_path: Path) -> None:
    launched = _start(server, shards, tmp_path / "run", "evaluation", 1)
    try:
        said, deadline = None, time.monotonic() + 60
        while said is None and time.monotonic() < deadline:
            time.sleep(0.05)
            said = re.search(r"^warning: no progress .*", launched.stderr(0), re.MULTILINE)
        assert said is not None, launched.stderr()[-4000:]
        assert f"process {launched.rank(1).pid}) has not answered for 1 s, last heard of in evaluation; " in said[0]
        launched.rank(1).resume()
        assert launched.wait().returncode == 0, launched.stderr()[-4000:]
    finally:
        launched.kill()


def _beats(**others: Beat) -> dict[int, Beat]:
    usual = Beat(9, 30, 4, "communication", 70.0, "comm.py:1 result", True, same=70.0)
    return {rank: others.get(f"rank{rank}", usual) for rank in range(4)}


def test_who_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "processes", lambda: [(f"node{rank // 2}", 100 + rank) for rank in range(4)])

    def ranks(beats: dict[int, Beat], silent: dict[int, float] | None = None) -> list[int]:
        return (missing(beats, silent or {}) or ([], "", ""))[0]

    computes = Beat(9, 30, 4, "attack", 70.0, "a.py:1 f", False)
    assert ranks(_beats()) == [0, 1, 2, 3], "the network"
    assert ranks(dict.fromkeys(range(4), computes)) == [], "all are at work"
    assert ranks(_beats(rank2=computes)) == [], "equally far, and at work"
    assert ranks(_beats(rank2=Beat(9, 29, 4, "attack", 71.0, "a.py:1 f", False))) == [2]
    ahead = Beat(9, 31, 4, "other", 5.0, "a.py:1 f", False)
    assert ranks(dict.fromkeys(range(4), computes) | {3: ahead}) == [], "it has not waited yet"
    assert ranks(_beats(rank1=Beat(9, 31, 4, "checkpoint", 69.0, "comm.py:9 gather", True, same=69.0))) == [1], (
        "another collective"
    )
    assert ranks(_beats(rank0=Beat(9, 30, 4, "communication", 69.0, "comm.py:9 gather", True, same=69.0))) == [0]
    assert ranks(_beats(rank2=computes), {3: 40.0}) == [3]
    named = missing(_beats(rank2=Beat(9, 29, 4, "data", 71.2, "a.py:1 f", False, "77 (stopped)")), {})
    assert named is not None
    assert named[1:] == (
        "rank 2 (node1, process 102) is still in batch 5, data, for 71 s",
        "at a.py:1 f; its processes 77 (stopped)",
    )


def _cost(comm: Comm) -> tuple[float, float, int]:
    """CPU seconds of a beat and of a phase, and requests to the store of one beat."""
    dog = Watchdog(comm)
    with dog:
        requests = 0

        class Counted:
            def set(self, key: str, value: str) -> None:
                nonlocal requests
                requests += 1

        store = watchdog.dist.distributed_c10d._get_default_store().clone()
        began = time.thread_time()
        for _ in range(200):
            dog._tell(store)
        beat = (time.thread_time() - began) / 200
        dog._tell(Counted())  # type: ignore[arg-type]
        began = time.thread_time()
        for _ in range(2000):
            dog.enter("attack")
        comm.barrier()
        return beat, (time.thread_time() - began) / 2000, requests


def test_it_costs_nothing_of_a_step(server: RankServer) -> None:
    """Of the CPU, less than a thousandth: its thread between two beats, and the phases of a step of 50 ms."""
    for beat, phase, requests in server.run(2, _cost):
        assert beat / watchdog.BEAT_S < 1e-3
        assert 8 * phase / 0.05 < 1e-3
        assert requests == 1


def _config_file(tmp_path: Path, *settings: str) -> float:
    from tests.smallest import SMALLEST

    (tmp_path / "c.yaml").write_text(SMALLEST)
    return load_config(str(tmp_path / "c.yaml"), list(settings)).timeout_minutes()


def test_the_limit_follows_from_the_data(tmp_path: Path) -> None:
    assert _config_file(tmp_path) == 15
    assert _config_file(tmp_path, "data.retry_timeout_s=1800") == 35
    assert _config_file(tmp_path, "distributed.timeout_minutes=12") == 12
    with pytest.raises(UserError, match=r"distributed.timeout_minutes: must exceed .* 11 minutes, .*got 11$"):
        _config_file(tmp_path, "distributed.timeout_minutes=11")


def _recorded(comm: Comm, folder: str) -> str:
    import torch.distributed as dist
    from torch._C import _distributed_c10d

    from fulllora_dist.distributed.comm import start_comm

    dist.destroy_process_group()
    os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
    again = start_comm(1, f"{folder}/collectives_rank_")
    again.barrier()
    _distributed_c10d._dump_fr_trace_file(again.rank, True, True, False, "gloo")  # type: ignore[attr-defined]
    return os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"]


def test_the_flight_recorder_writes_where_it_is_told(server: RankServer, tmp_path: Path) -> None:
    """By gloo's recorder, which reads the same variables as NCCL's."""
    torch = pytest.importorskip("torch", minversion="2.15")
    assert torch.distributed.is_available()
    assert server.run(2, _recorded, str(tmp_path)) == ["1", "1"]
    from torch.distributed.flight_recorder.components.loader import read_dump  # of torchfrtrace

    for rank in (0, 1):
        entries = read_dump("collectives_rank_", str(tmp_path / f"collectives_rank_{rank}"))["entries"]
        assert any("barrier" in entry["profiling_name"] for entry in entries)  # type: ignore[index, operator, union-attr, arg-type]
