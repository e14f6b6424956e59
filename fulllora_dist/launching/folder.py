"""The folder of a launch, `launches/<number>` in the run's output: the code and the config that its jobs use, whatever
is edited while they wait, and what became of them.

    code/          the package, and plugins that are files
    config.yaml    the resolved config
    code.json      git commit, and the files that differ from it
    code.diff      how they differ
    launch.json    the command line, resources and jobs
    attempts.jsonl when attempts began and ended, and why
    *_log.out      output of each task, over all attempts of its job
"""

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from fulllora_dist.config import Config
from fulllora_dist.launching.attempt import ATTEMPTS

LAUNCHES = "launches"
RECORD = "launch.json"
CONFIG = "config.yaml"
CODE = "code"
_PACKAGE = Path(__file__).parents[1]


def launch_folders(output: str) -> list[Path]:
    """Of a run's launches, the first one first."""
    folders = (path for path in (Path(output).absolute() / LAUNCHES).glob("[0-9]*") if (path / RECORD).exists())
    return sorted(folders, key=lambda path: int(path.name))


def make_folder(config: Config) -> Path:
    """The next launch's folder with its snapshot of code and config."""
    launches = Path(config.run.output).absolute() / LAUNCHES
    launches.mkdir(parents=True, exist_ok=True)
    number = max((int(path.name) for path in launches.glob("[0-9]*")), default=0) + 1
    folder = launches / f"{number:03d}"
    folder.mkdir()
    code = folder / CODE
    shutil.copytree(_PACKAGE, code / _PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    plugins = []
    for plugin in config.plugins:
        if plugin.endswith(".py"):
            plugin = str(shutil.copy(plugin, str(code)))
        plugins.append(plugin)
    values = config.model_dump(mode="json") | {"plugins": plugins}
    (folder / CONFIG).write_text(OmegaConf.to_yaml(OmegaConf.create(values)))
    _write_git(folder)
    return folder


def _write_git(folder: Path) -> None:
    """Nothing where the package is no git checkout."""

    def git(*command: str) -> str:
        done = subprocess.run(["git", "-C", str(_PACKAGE), *command], capture_output=True, text=True, check=True)
        return done.stdout

    try:
        commit = git("rev-parse", "HEAD").strip()
        changed = git("status", "--porcelain", "--", ".").splitlines()
        difference = git("diff", "HEAD", "--", ".")
    except (OSError, subprocess.CalledProcessError):
        return
    (folder / "code.json").write_text(json.dumps({"commit": commit, "changed": changed}, indent=1) + "\n")
    (folder / "code.diff").write_text(difference)


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Publish launch.json at once: `status` may be reading."""
    temporary = folder / (RECORD + ".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(temporary, folder / RECORD)


def read_record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / RECORD).read_text())


def read_attempts(folder: Path, job: str) -> list[dict[str, Any]]:
    """What attempts.jsonl says of a job, in order."""
    path = folder / ATTEMPTS
    lines = path.read_text().splitlines() if path.exists() else []
    return [note for note in map(json.loads, lines) if note["job"] == job]
