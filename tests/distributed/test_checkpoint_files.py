"""Checkpoints on disk: whole or not there, whatever happens while they are written and whatever befalls them later."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fulllora_dist.checkpoints.format import (
    DESCRIPTION,
    TENSORS,
    DamagedCheckpoint,
    list_checkpoints,
    read_checkpoint,
    read_newest_checkpoint,
    write_checkpoint,
)
from fulllora_dist.core.errors import UserError


def _content(step: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    generator = torch.Generator().manual_seed(step)
    tensors = {
        "master/a": torch.randn(3, 5, generator=generator),
        "slots/delta": torch.randint(-1, 2, (4, 3), generator=generator, dtype=torch.int8),
        "master/transposed": torch.randn(3, 5, generator=generator).t(),
    }
    return tensors, {"updates": 2 * step, "stream": {"step": step, "seed": 0}, "lr": 0.1 + step, "note": "\u00e4"}


def _write(folder: Path, step: int, keep: int = 2) -> str:
    return write_checkpoint(str(folder), step, *_content(step), keep=keep, spared=())


def _is_checkpoint(found: tuple[dict[str, Tensor], dict[str, Any]] | None, step: int) -> bool:
    assert found is not None
    tensors, metadata = _content(step)
    same = found[0].keys() == tensors.keys() and all(torch.equal(found[0][n], t) for n, t in tensors.items())
    return same and metadata.items() <= found[1].items() and found[1]["step"] == step


def test_keeps_the_newest(tmp_path: Path) -> None:
    assert read_newest_checkpoint(str(tmp_path / "none")) == (None, {})
    for step in (5, 90, 100):  # 90 sorts after 100 as text
        _write(tmp_path, step)
    assert [int(Path(path).name) for path in list_checkpoints(str(tmp_path))] == [100, 90]
    found, damaged = read_newest_checkpoint(str(tmp_path))
    assert _is_checkpoint(found, 100)
    assert not damaged
    assert sorted(os.listdir(tmp_path)) == ["00000090", "00000100"]


def _die_at(event: int, folder: Path) -> None:
    """Write step 3 and die of SIGKILL just before its n-th call to the disk."""
    count = 0

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == event:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return wrapper

    for name in ("fsync", "rename", "rmdir", "unlink", "mkdir"):
        setattr(os, name, counted(getattr(os, name)))
    _write(folder, 3)


def test_killed_while_writing(tmp_path: Path) -> None:
    """At every moment the newest checkpoint is the one before or the new one, and whole; the next write cleans up."""
    outcomes = []
    for event in range(1, 100):
        folder = tmp_path / str(event)
        for step in (1, 2):
            _write(folder, step)
        child = os.fork()
        if child == 0:
            try:
                _die_at(event, folder)
            finally:
                os._exit(0)
        status = os.waitpid(child, 0)[1]
        found, _ = read_newest_checkpoint(str(folder))
        outcomes.append(3 if _is_checkpoint(found, 3) else 2)
        assert outcomes[-1] == 3 or _is_checkpoint(found, 2)
        _write(folder, 4)
        assert sorted(os.listdir(folder)) == ["00000003" if outcomes[-1] == 3 else "00000002", "00000004"]
        if os.WIFEXITED(status):
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
    assert outcomes == sorted(outcomes)
    assert outcomes.count(2) >= 4  # it did die before the rename
    assert outcomes.count(3) >= 3  # and while deleting the oldest


def _cut(size: int) -> Callable[[bytes], bytes]:
    return lambda content: content[:size]


def _flip(position: int) -> Callable[[bytes], bytes]:
    return lambda content: content[:position] + bytes([content[position] ^ 1]) + content[position:][1:]


DAMAGES: dict[str, tuple[str, Callable[[bytes], bytes] | None]] = {
    "tensors cut": (TENSORS, _cut(-1)),
    "tensors empty": (TENSORS, _cut(0)),
    "tensors gone": (TENSORS, None),
    "one bit of a tensor": (TENSORS, _flip(-3)),
    "one bit of the header": (TENSORS, _flip(20)),
    "description cut": (DESCRIPTION, _cut(30)),
    "description empty": (DESCRIPTION, _cut(0)),
    "description gone": (DESCRIPTION, None),
    "description no object": (DESCRIPTION, lambda _: b"[1]"),
    "description in no encoding": (DESCRIPTION, lambda _: b'{"a": "\xff"}'),
    "one digit of the metadata": (DESCRIPTION, lambda content: content.replace(b'"updates": 4', b'"updates": 5')),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_is_named_and_passed_over(tmp_path: Path, damage: str) -> None:
    _write(tmp_path, 1)
    newest = _write(tmp_path, 2)
    name, change = DAMAGES[damage]
    path = Path(newest) / name
    before = path.read_bytes()
    path.unlink()
    if change:
        path.write_bytes(change(before))
        assert path.read_bytes() != before
    with pytest.raises(DamagedCheckpoint):
        read_checkpoint(newest)
    found, damaged = read_newest_checkpoint(str(tmp_path))
    assert _is_checkpoint(found, 1)
    ((path, line),) = damaged.items()
    assert path == newest
    assert newest in line
    assert "\n" not in line


@pytest.mark.parametrize("keep", [1, 2])
def test_damaged_checkpoints_push_no_whole_one_out(tmp_path: Path, keep: int) -> None:
    """A run whose checkpoints are all damaged starts over: what it then writes has a lower step, and must stay."""
    for step in (20, 30):
        (Path(_write(tmp_path, step, keep)) / TENSORS).write_bytes(b"")
    for step in (10, 15, 20, 25):
        _write(tmp_path, step, keep)
        assert _is_checkpoint(read_newest_checkpoint(str(tmp_path))[0], step)
    _write(tmp_path, 30, keep)
    assert [int(Path(path).name) for path in list_checkpoints(str(tmp_path))] == [30, 25][:keep]


def test_every_checkpoint_damaged(tmp_path: Path) -> None:
    for step in (1, 2):
        os.truncate(Path(_write(tmp_path, step)) / TENSORS, 7)
    found, damaged = read_newest_checkpoint(str(tmp_path))
    assert found is None
    assert len(damaged) == 2


def test_unknown_version_is_refused(tmp_path: Path) -> None:
    """Not passed over: an older checkpoint would silently throw away what a newer program trained."""
    _write(tmp_path, 1)
    path = Path(_write(tmp_path, 2)) / DESCRIPTION
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 99}))
    with pytest.raises(UserError, match="format version 99"):
        read_newest_checkpoint(str(tmp_path))


def test_what_others_keep_there_stays(tmp_path: Path) -> None:
    """Folders whose names are numbers, dates say, and what merely looks like a temporary name."""
    foreign = {"0/a.png", "20240101/a.png", "00000006/a.png", "00000001/checkpoint.safetensors", "00000001/config.json"}
    foreign |= {".tmp-mine/a.png", "20240102"}
    for name in foreign:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / ".tmp-00000003").mkdir()
    assert read_newest_checkpoint(str(tmp_path)) == (None, {})
    for step in (4, 5):
        _write(tmp_path, step, keep=1)
        assert list_checkpoints(str(tmp_path)) == [f"{tmp_path}/{step:08d}"]
    with pytest.raises(OSError, match="not empty"):
        _write(tmp_path, 6, keep=1)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == foreign | {f"00000005/{name}" for name in (TENSORS, DESCRIPTION)}
    assert not (tmp_path / ".tmp-00000003").exists()
    (tmp_path / "00000009").mkdir()  # a checkpoint that lost its files: no run starts over unnoticed
    assert len(read_newest_checkpoint(str(tmp_path))[1]) == 1
