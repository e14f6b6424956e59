"""Which code runs: versions of packages and the git commit."""

import contextlib
import json
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

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
    """Of the running code, with a note where it has changes; None where it is unknown. A launched run
    (jobs/launch.py) has a copy of the code, and a record of its commit."""
    package = Path(__file__).parents[1]
    with contextlib.suppress(OSError, ValueError, KeyError):
        record = json.loads((package.parents[1] / "code.json").read_text())
        return record["commit"] + (CHANGED if record["changed"] else "")
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        commit, changes = (
            subprocess.run(["git", "-C", package, *command], capture_output=True, text=True, check=True).stdout.strip()
            for command in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no", "--", "."))
        )
        return commit + (CHANGED if changes else "")
    return None
