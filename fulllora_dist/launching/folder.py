"""The folder of a launch, `launches/<number>` in the run's output: a copy of the code and the config that its jobs
use, whatever is edited while they wait, and what happened to them.

    code/          the package, and plugins that are files
    config.yaml    the resolved config
    code.json      git commit, and the files that differ from it
    code.diff      how they differ
    launch.json    the command line, resources and jobs
    restarts.jsonl when each start of a job began and ended, and why
    *_log.out      output of each task, over all restarts of its job
"""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from fulllora_dist.config.schema import Config
from fulllora_dist.core.atomic import write_text
from fulllora_dist.core.errors import UserError
from fulllora_dist.tracking.provenance import PACKAGE, record_code
from fulllora_dist.tracking.spool import Spool

RESTARTS = "restarts.jsonl"
LAUNCHES = "launches"
RECORD = "launch.json"
CONFIG = "config.yaml"
CODE = "code"
LOCK = ".lock"


def launches_of(output: str) -> Path:
    """The folder of all launches of a run."""
    return Path(output).absolute() / LAUNCHES


def launch_folders(output: str) -> list[Path]:
    """The folders of a run's launches, oldest first."""
    return [folder for folder in _numbered(output) if (folder / RECORD).exists()]


def _numbered(output: str) -> list[Path]:
    return sorted((path for path in launches_of(output).glob("*") if path.name.isdecimal()), key=lambda p: int(p.name))


@contextmanager
def launching(output: str) -> Iterator[None]:
    """One launch of a run at a time; a first one that fails leaves nothing behind.

    Raises:
        UserError: the output folder cannot be written.
    """
    launches = launches_of(output)
    while True:
        try:
            launches.mkdir(parents=True, exist_ok=True)
            lock = open(launches / LOCK, "w")  # noqa: SIM115 (it stays open during the launch)
        except FileNotFoundError:
            continue  # another launch that failed took the folder away
        except OSError as error:
            raise UserError(f"run.output_dir: {output} cannot be written ({error.strerror})") from None
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(lock.name), os.fstat(lock.fileno())):
                break
        lock.close()
    with lock:
        try:
            yield
        finally:
            if os.listdir(launches) == [LOCK]:
                shutil.rmtree(launches)


def make_folder(config: Config) -> Path:
    """The next launch's folder with its snapshot of code and config."""
    number = max((int(path.name) for path in _numbered(config.run.output_dir)), default=0) + 1
    folder = launches_of(config.run.output_dir) / f"{number:03d}"
    folder.mkdir()
    try:
        _fill(folder, config)
    except BaseException:
        shutil.rmtree(folder)
        raise
    return folder


def _fill(folder: Path, config: Config) -> None:
    code = folder / CODE
    shutil.copytree(PACKAGE, code / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    plugins = [str(shutil.copy(name, str(code))) if name.endswith(".py") else name for name in config.plugins]
    values = config.model_dump(mode="json") | {"plugins": plugins}
    (folder / CONFIG).write_text(OmegaConf.to_yaml(OmegaConf.create(values)))
    record_code(folder)


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Replace launch.json atomically: `status` may be reading."""
    write_text(folder / RECORD, json.dumps(record, indent=1) + "\n")


def read_record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / RECORD).read_text())


def read_restarts(folder: Path, job: str) -> list[dict[str, Any]]:
    """Entries of restarts.jsonl on a job, in order. A line may be torn if the disk was full or the node died."""
    return [entry for entry in Spool(folder / RESTARTS) if entry.get("job") == job]
