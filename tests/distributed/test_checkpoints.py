"""How a run finds and keeps its checkpoints: other settings of places, damage, trouble that passes, a hurried end."""

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fulllora_dist.checkpoints import manager
from fulllora_dist.checkpoints.format import DESCRIPTION, TENSORS, list_checkpoints, read_metadata
from fulllora_dist.checkpoints.manager import CheckpointManager
from fulllora_dist.checkpoints.settings import RunSettings
from fulllora_dist.core.errors import UserError
from fulllora_dist.storage import store

Said = list[str]


def _manager(output: Path, **settings: Any) -> tuple[CheckpointManager, Said]:
    said: Said = []
    return CheckpointManager(RunSettings(output_dir=str(output), **settings), said.append), said


def _write(kept: CheckpointManager, step: int, best: int | None = None) -> bool:
    kept.write(step, {"a": torch.tensor([step])}, {"best": best and {"step": best}})
    return kept.settle()


def _steps(place: Path) -> list[int]:
    return [int(Path(path).name) for path in list_checkpoints(str(place))]


def _found(kept: CheckpointManager) -> int | None:
    checkpoint = kept.find()
    return checkpoint and checkpoint[1]["step"]


def test_found_wherever_an_earlier_start_put_them(tmp_path: Path) -> None:
    output, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    _write(_manager(output)[0], 3)
    kept, _ = _manager(output, checkpoint_dir=str(elsewhere))
    assert _found(kept) == 3
    assert _write(kept, 4)
    assert _steps(elsewhere) == [4]
    (output / "config.yaml").write_text(f"run: {{checkpoint_dir: {elsewhere}}}")  # as that start left it
    assert _found(_manager(output)[0]) == 4
    assert _found(_manager(output, checkpoint_dir=f"file://{elsewhere}")[0]) == 4
    (output / "config.yaml").write_text("run: [")
    assert _found(_manager(output)[0]) == 3


def test_a_folder_that_does_not_answer_is_not_damage(tmp_path: Path) -> None:
    """To go back would throw away what is there, and to start over the metrics too."""
    kept, said = _manager(tmp_path)
    for step in (1, 2):
        _write(kept, step)
    newest = tmp_path / "checkpoints" / "00000002" / DESCRIPTION
    content = newest.read_bytes()
    newest.unlink()
    newest.mkdir()  # reading it is an OSError, for root too
    with pytest.raises(IsADirectoryError):
        kept.find()
    newest.rmdir()
    newest.write_bytes(content)
    assert _found(kept) == 2
    assert not said


def test_damaged_ones_do_not_count(tmp_path: Path) -> None:
    kept, _ = _manager(tmp_path)
    for step in (10, 20):
        _write(kept, step)
    (tmp_path / "checkpoints" / "00000020" / TENSORS).write_bytes(b"")
    kept, said = _manager(tmp_path)
    assert _found(kept) == 10
    (line,) = said
    assert "00000020 is damaged" in line
    assert line.endswith("resuming from an older checkpoint")
    _write(kept, 25)
    assert _steps(tmp_path / "checkpoints") == [25, 20, 10], "two whole ones"
    (tmp_path / "checkpoints" / "00000025" / TENSORS).write_bytes(b"")
    assert _found(_manager(tmp_path)[0]) == 10
    (tmp_path / "checkpoints" / "00000010" / TENSORS).write_bytes(b"")
    with pytest.raises(UserError, match="none of the 3 checkpoints"):
        _manager(tmp_path)[0].find()


def test_the_best_one_stays_until_a_better_one_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, _ = _manager(tmp_path, keep_checkpoints=1)
    for step in (1, 2, 3):
        _write(kept, step, best=2 if step > 1 else 1)
    assert _steps(tmp_path / "checkpoints") == [3, 2]
    with monkeypatch.context() as patch:
        patch.setattr(manager, "write_checkpoint", lambda *_: os.listdir("/nowhere"))
        assert not _write(kept, 4, best=4)
    _write(kept, 5, best=4)
    assert _steps(tmp_path / "checkpoints") == [5, 2]
    kept, _ = _manager(tmp_path, keep_checkpoints=1)
    kept.find()
    _write(kept, 6, best=6)
    _write(kept, 7, best=6)
    assert _steps(tmp_path / "checkpoints") == [7, 6]


def test_the_best_of_another_run_is_not_this_ones(tmp_path: Path) -> None:
    _write(_manager(tmp_path / "other")[0], 3, best=3)
    given = str(tmp_path / "other" / "checkpoints" / "00000003")
    for spelling in (given, f"{given}/", f"file://{given}", f"file://{given}/"):
        checkpoint = _manager(tmp_path / "run", resume_from=spelling)[0].find()
        assert checkpoint is not None
        assert checkpoint[1]["best"] is None
        metadata = read_metadata([], spelling)
        assert metadata is not None
        assert metadata["best"] == {"step": 3}


def test_in_a_hurry_the_disk_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bucket that fails is tried for minutes, which a scheduler does not wait for."""
    for name, value in {
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_MAX_ATTEMPTS": "1",
        "FSSPEC_S3_ENDPOINT_URL": "http://127.0.0.1:9",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(store, "_hurry", type(store._hurry)())
    assert store.PATIENCE_SECONDS >= 60
    kept, said = _manager(tmp_path, checkpoint_dir="s3://bucket/run")
    began = time.monotonic()
    kept.write(1, {"a": torch.ones(1)}, {})
    time.sleep(1)
    assert not kept.idle, "it is still trying"
    kept.hurry()
    kept.write(2, {"a": torch.ones(1)}, {})
    assert kept.settle()
    assert time.monotonic() - began < 40
    assert _steps(tmp_path / "checkpoints") == [2, 1]
    assert ["it is in" in line for line in said] == [True, True]


def test_whatever_happens_to_a_checkpoint_the_training_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: object) -> str:
        raise MemoryError("of 8 GB")

    monkeypatch.setattr(manager, "write_checkpoint", no_memory)
    kept, said = _manager(tmp_path)
    assert not _write(kept, 1)
    assert "MemoryError of 8 GB; the newest is none" in said[0]
