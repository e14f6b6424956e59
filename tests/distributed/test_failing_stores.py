"""Where checkpoints go and what a run does when they cannot: full and read-only disks, a failing bucket, a slow one."""

import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import s3fs
import torch
from test_resume import BATCHES, _config, _start, _train

from fulllora_dist.checkpoints import manager
from fulllora_dist.checkpoints.format import list_checkpoints, read_checkpoint, read_newest_checkpoint, write_checkpoint
from fulllora_dist.checkpoints.manager import CheckpointManager
from fulllora_dist.checkpoints.settings import RunSettings
from fulllora_dist.core.errors import SharedUserError, UserError
from fulllora_dist.distributed.comm import Comm
from fulllora_dist.storage import store
from fulllora_dist.training.finalize import finalize
from tests.ranks import RankError, RankServer
from tests.services.mock_s3 import BUCKET, MockS3, mock_s3

Said = list[str]


def _run(
    comm: Comm, settings: dict, events: Mapping[int, str], environment: Mapping[str, str] | None = None
) -> tuple[str, Said]:
    """As train.py does; before batch n rank 0 runs events[n] in a shell. The error, and all that it said."""
    os.environ |= environment or {}
    store.PATIENCE_SECONDS = 0.0
    said: Said = []
    try:
        run, trainer = _start(comm, settings)
        run.say = said.append  # type: ignore[method-assign]
        run.checkpoints._say = said.append
        for batch in trainer.batches():
            run.settle()  # or a checkpoint that is due waits for a slow one, and comes a batch later
            if comm.is_main and trainer.step in events:
                subprocess.run(events[trainer.step], shell=True, check=True)
            trainer.advance(batch)
        finalize(run, trainer)
    except SharedUserError as error:
        return str(error), said
    return "", said


def _on_s3(comm: Comm, settings: dict, environment: Mapping[str, str]) -> tuple[int, int]:
    os.environ |= environment
    return _train(comm, settings, BATCHES)


def _steps(place: Path | str) -> list[int]:
    return [int(Path(path).name) for path in list_checkpoints(str(place))]


def _warnings(said: Said) -> Said:
    return [line for line in said if line.startswith("warning")]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of its own."""
    if os.getuid() != 0:
        pytest.skip("mounting a small disk needs root")
    path = tmp_path / "disk"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(path)], check=True)
    yield path
    subprocess.run(["umount", str(path)], check=True)


EACH = [("run", "checkpoint_every", 1), ("run", "keep_checkpoints", 2)]


def test_a_full_disk(server: RankServer, shards: str, disk: Path) -> None:
    """Training continues; each checkpoint that is not saved is named; older ones stay; with space it saves again."""
    output = disk / "run"
    fill = f"cat /dev/zero > {disk}/filler 2>/dev/null; test -s {disk}/filler"
    config = _config(output, shards, "standard", 0, EACH)
    (error, said), _ = server.run(2, _run, config, {2: fill, 4: f"rm {disk}/filler"})
    assert error == ""
    lost = _warnings(said)
    assert len(lost) == 2
    for step, line in zip((3, 4), lost, strict=True):
        assert f"the checkpoint of batch {step} is not saved: " in line
        assert "No space left on device; the newest is that of batch 2" in line
    assert _steps(output / "checkpoints") == [6, 5]
    assert sorted(p.name for p in (output / "checkpoints").iterdir()) == ["00000005", "00000006"]
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, BATCHES + 1)), (
        "metrics wait for space, and no line is half written"
    )

    # full for good: the older checkpoints outlive it, and the end says what is missing
    again = _config(disk / "again", shards, "standard", 0, EACH)
    for error, said in server.run(2, _run, again, {2: fill}):
        assert error.startswith(
            f"run.output_dir: no adapter in {disk}/again, the newest checkpoint is that of batch 2 ("
        )
        assert "\n" not in error
        assert len(_warnings(said)) in (4, 0)
    assert sorted(p.name for p in (disk / "again" / "checkpoints").iterdir()) == ["00000001", "00000002"]
    found, damaged = read_newest_checkpoint(str(disk / "again" / "checkpoints"))
    assert found is not None
    assert found[1]["step"] == 2
    assert not damaged
    (error, _), other = server.run(2, _run, _config(disk / "third", shards, "standard", 0), {})
    assert error == other[0]
    assert "No space left on device" in error, "refused before it trains"
    os.unlink(disk / "filler")
    assert server.run(2, _train, again, BATCHES)[0] == (2, BATCHES)


def test_a_read_only_disk(server: RankServer, shards: str, disk: Path) -> None:
    output = disk / "run"
    config = _config(output, shards, "standard", 0, EACH)
    read_only = f"mount -o remount,ro {disk}"
    for error, said in server.run(2, _run, config, {2: read_only}):
        assert error.startswith(f"run.output_dir: no adapter in {output}, the newest checkpoint is that of batch 2 (")
        assert all("Read-only file system" in line for line in _warnings(said))
    assert _steps(output / "checkpoints") == [2, 1]
    assert "Read-only file system" in server.run(2, _run, config, {})[0][0], "refused before it trains"
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    assert server.run(2, _train, config, BATCHES)[0] == (2, BATCHES)


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MockS3]:
    with mock_s3() as s3:
        s3.environment["AWS_MAX_ATTEMPTS"] = "1"
        s3.outage = tmp_path_factory.mktemp("s3") / "outage"
        yield s3


def _keys(s3: MockS3, prefix: str) -> list[str]:
    listed = s3.client().list_objects_v2(Bucket=BUCKET, Prefix=prefix)  # type: ignore[attr-defined]
    return sorted(item["Key"].removeprefix(prefix) for item in listed.get("Contents", []))


def _files(*steps: int) -> list[str]:
    return [f"{step:08d}/{name}" for step in steps for name in ("checkpoint.json", "checkpoint.safetensors")]


def test_checkpoints_in_a_bucket(
    server: RankServer, shards: str, s3: MockS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Complete with the description; found on any machine, damaged ones named; an outage sends them to the output."""
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    place, prefix = f"s3://{BUCKET}/runs/1", "runs/1/"
    bucket = [*EACH, ("run", "checkpoint_dir", place)]
    client = s3.client()
    here, there = (_config(tmp_path / name, shards, "free", 1, bucket) for name in ("here", "there"))

    with pytest.raises(RankError, match="rank 0 died"):
        server.run(2, _run, here, {4: "kill -9 $PPID"}, s3.environment)
    assert _keys(s3, prefix) == [*_files(3, 4), "config.yaml"]
    assert not (tmp_path / "here" / "checkpoints").exists()
    written = [name.removeprefix(prefix) for name in s3.puts if "checkpoint." in name]
    assert len(written) >= 4
    for tensors, description in zip(written[::2], written[1::2], strict=True):
        assert [description, tensors] == _files(int(tensors[:8])), "the description comes last"

    # another machine, the newest checkpoint damaged, and a folder that a killed writer left behind
    client.put_object(Bucket=BUCKET, Key=f"{prefix}00000004/checkpoint.safetensors", Body=b"x")  # type: ignore[attr-defined]
    client.put_object(Bucket=BUCKET, Key=f"{prefix}00000005/checkpoint.safetensors", Body=b"x")  # type: ignore[attr-defined]
    found, damaged = read_newest_checkpoint(place)
    (line,) = damaged.values()
    assert found is not None
    assert found[1]["step"] == 3
    assert f"{place}/00000004 is damaged" in line
    assert s3.outage is not None
    outage = f"touch {s3.outage}"
    (error, said), _ = server.run(2, _run, there, {4: outage}, s3.environment)
    assert error == ""
    failed = _warnings(said)
    assert len(failed) == 2
    for step, line in zip((5, 6), failed, strict=True):
        assert f"the checkpoint of batch {step} is not saved: {place}" in line
        assert f"; it is in {tmp_path}/there/checkpoints" in line
    assert _steps(tmp_path / "there" / "checkpoints") == [6, 5]

    # it does not start over because the bucket does not answer
    error, _ = server.run(2, _run, there, {}, s3.environment)[1]
    assert place in error
    assert "\n" not in error
    s3.outage.unlink()
    assert _keys(s3, prefix) == [*_files(3, 4), "config.yaml"], "mended and cleaned up"
    assert server.run(2, _on_s3, there, s3.environment)[0] == (BATCHES, BATCHES), "from the fallback"
    elsewhere = _config(tmp_path / "elsewhere", shards, "free", 1, bucket)
    assert server.run(2, _on_s3, elsewhere, s3.environment)[0] == (4, BATCHES)
    assert _keys(s3, prefix) == [*_files(5, 6), "config.yaml"]
    given = _config(tmp_path / "given", shards, "free", 1, [("run", "resume_from", f"{place}/00000005/")])
    assert server.run(1, _on_s3, given, s3.environment)[0] == (5, BATCHES)


def test_what_others_keep_in_the_bucket_stays(s3: MockS3, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders of digits, say; and of the folder of a step all but the checkpoint's own two files."""
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    place, client = f"s3://{BUCKET}/digits", s3.client()
    foreign = ["0/a.png", "00000001/b.png", "00000002/checkpoint.json/c", "00000002/d.png", "7/checkpoint.json"]
    foreign += ["00000003/checkpoint.safetensors", "00000003/config.json"]
    for key in [*foreign, "00000004/checkpoint.safetensors"]:
        client.put_object(Bucket=BUCKET, Key=f"digits/{key}", Body=b"x")  # type: ignore[attr-defined]
    assert list_checkpoints(place) == []
    for step in (1, 2, 5):
        write_checkpoint(place, step, {"a": torch.ones(1)}, {}, keep=1, spared=())  # type: ignore[typeddict-item]
        assert _steps(place) == [step]
    assert _keys(s3, "digits/") == sorted([*foreign, *_files(5)]), "the unfinished one is gone"
    write_checkpoint(place, 5, {"a": torch.zeros(1)}, {}, keep=1, spared=())  # type: ignore[typeddict-item]
    assert _keys(s3, "digits/") == sorted([*foreign, *_files(5)])


def test_a_copy_of_a_checkpoint_that_is_whole_is_found_and_named(
    s3: MockS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a hurry it goes to the disk and to the bucket: either may refuse it, and either copy may be damaged later."""
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setattr(store, "_hurry", type(store._hurry)())
    place, said = f"s3://{BUCKET}/copies", Said()
    kept = CheckpointManager(RunSettings(output_dir=str(tmp_path), checkpoint_dir=place), said.append)
    kept.hurry()

    def written(step: int) -> bool:
        kept.write(step, {"a": torch.tensor([step])}, {})  # type: ignore[typeddict-item]
        return kept.settle()

    assert written(1)
    assert not said
    own = tmp_path / "checkpoints"
    s3.client().put_object(Bucket=BUCKET, Key="copies/00000001/checkpoint.safetensors", Body=b"x")  # type: ignore[attr-defined]
    assert kept.read(1)[0]["a"] == 1, "the copy on the disk"
    (own / "00000001" / "checkpoint.json").write_bytes(b"x")
    with pytest.raises(UserError, match=r"of batch 1: s3://bucket/copies/0+1 is damaged.*; /.*/0+1 is incomplete"):
        kept.read(1)
    shutil.rmtree(own)
    own.write_bytes(b"")  # no folder can be made here, by root neither
    assert written(2)
    (line,) = said
    assert line.startswith(f"warning: the checkpoint of batch 2 is not saved: {own}: ")
    assert line.endswith(f"; it is in {place}")


def _slow(comm: Comm, settings: dict) -> list[bool]:
    """With a disk that takes until the last batch but one for a checkpoint: whether each came so far in time."""
    write, released, in_time = manager.write_checkpoint, threading.Event(), []

    def slow(*args: object, **kwargs: object) -> str:
        in_time.append(released.wait(20))
        return write(*args, **kwargs)  # type: ignore[arg-type]

    manager.write_checkpoint = slow  # type: ignore[assignment]
    if comm.rank == 1:
        manager.time = SimpleNamespace(monotonic=lambda: 0.0)  # type: ignore[assignment]  # rank 0's clock counts
    _, trainer = _start(comm, settings)
    for batch in trainer.batches():
        trainer.advance(batch)
        if trainer.step == BATCHES - 1:
            released.set()
    return in_time


def test_a_slow_disk_holds_nothing_up(server: RankServer, shards: str, tmp_path: Path) -> None:
    """By minutes (one is always due), on rank 0's word; the end waits for the last checkpoint, the batches do not."""
    settings = [("run", "checkpoint_every", 1000), ("run", "checkpoint_minutes", 1e-6)]
    config = _config(tmp_path / "run", shards, "free", 0, settings)
    assert server.run(2, _slow, config) == [[True, True], []]
    assert _steps(tmp_path / "run" / "checkpoints") == [BATCHES, 1]
    server.run(2, _train, _config(tmp_path / "fast", shards, "free", 0, EACH), 1)
    (late, _), (soon, _) = (read_checkpoint(f"{tmp_path}/{name}/checkpoints/00000001") for name in ("run", "fast"))
    assert late.keys() == soon.keys()
    assert all(torch.equal(tensor, late[name]) for name, tensor in soon.items()), "copied before they trained on"
