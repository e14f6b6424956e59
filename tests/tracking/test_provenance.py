"""Which commit is said to be that of the running code."""

import shutil
import subprocess
import sys
from pathlib import Path

from fulllora_dist.tracking import provenance


def _git(folder: Path, *command: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    return subprocess.run(["git", "-C", folder, *identity, *command], capture_output=True, text=True, check=True).stdout


def _committed(folder: Path) -> str:
    _git(folder, "init")
    _git(folder, "add", "-A")
    _git(folder, "commit", "--allow-empty", "-m", "first")
    return _git(folder, "rev-parse", "HEAD").strip()


def _installed(folder: Path) -> Path:
    """A package with nothing but this module."""
    package = folder / "fulllora_dist"
    for room in (package, package / "tracking"):
        room.mkdir(parents=True)
        (room / "__init__.py").touch()
    shutil.copy(provenance.__file__, package / "tracking")
    return folder


def _said(path: Path) -> str:
    code = "from fulllora_dist.tracking.provenance import git_commit; print(git_commit())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=path, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True
    )
    assert not done.stderr
    return done.stdout.strip()


def test_the_commit_is_that_of_the_checkout_with_the_package(tmp_path: Path) -> None:
    _installed(tmp_path)
    commit = _committed(tmp_path)
    assert _said(tmp_path) == commit
    with open(tmp_path / "fulllora_dist" / "tracking" / "provenance.py", "a") as file:
        file.write("# more\n")
    assert _said(tmp_path) == f"{commit} with changes"


def test_a_repository_around_a_virtual_environment_is_not_the_code(tmp_path: Path) -> None:
    (tmp_path / ".gitignore").write_text(".venv\n")
    _committed(tmp_path)
    assert _said(_installed(tmp_path / ".venv" / "lib")) == "None"
