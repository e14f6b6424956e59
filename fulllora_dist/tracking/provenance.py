"""Which code runs: versions of packages and the git commit, or what a copy of the code says of it."""

import contextlib
import json
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
_PACKAGES = ("fulllora-dist", "torch", "deepspeed", "timm", "mlflow")
CHANGED = " with changes"
"""End of the commit of a checkout that differs from it."""


def package_versions() -> dict[str, str]:
    """{package: version} of those that are installed."""
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def git_commit() -> str | None:
    """Of the running code, with a note if it has changes; None if it is unknown. A launched run (jobs/launch.py) has
    a copy of the code, and a record of its commit."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        record = json.loads((PACKAGE.parents[1] / "code.json").read_text())
        return record["commit"] + (CHANGED if record["changed"] else "")
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return _commit() + (CHANGED if _git("status", "--porcelain", "--untracked-files=no", "--", ".") else "")
    return None


def record_code(folder: Path) -> None:
    """Write the record that `git_commit` reads, and code.diff; nothing if the package is not in a git checkout."""
    try:
        record = {"commit": _commit(), "changed": _git("status", "--porcelain", "--", ".").splitlines()}
        difference = _git("diff", "HEAD", "--", ".")
    except (OSError, subprocess.CalledProcessError):
        return
    (folder / "code.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder / "code.diff").write_text(difference)


def _commit() -> str:
    """HEAD of the checkout with the package: that around a virtual environment is of something else.

    Raises:
        OSError, CalledProcessError: there is no git, or none that tracks the package.
    """
    _git("ls-files", "--error-unmatch", "__init__.py")
    return _git("rev-parse", "HEAD").strip()


def _git(*command: str) -> str:
    """stdout of a git command in the package's folder."""
    return subprocess.run(["git", "-C", PACKAGE, *command], capture_output=True, text=True, check=True).stdout
