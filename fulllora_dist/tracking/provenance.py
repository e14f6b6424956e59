"""Which code runs: versions of packages and the git commit."""

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


def git(*command: str) -> str:
    """stdout of a git command in the package's folder.

    Raises:
        OSError, CalledProcessError: there is no git, or the folder is not in a checkout.
    """
    return subprocess.run(["git", "-C", PACKAGE, *command], capture_output=True, text=True, check=True).stdout


def git_commit() -> str | None:
    """Of the running code, with a note if it has changes; None if it is unknown. A launched run (jobs/launch.py) has
    a copy of the code, and a record of its commit."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        record = json.loads((PACKAGE.parents[1] / "code.json").read_text())
        return record["commit"] + (CHANGED if record["changed"] else "")
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        commit = git("rev-parse", "HEAD").strip()
        return commit + (CHANGED if git("status", "--porcelain", "--untracked-files=no", "--", ".") else "")
    return None
