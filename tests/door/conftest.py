"""What the tests of bad input share: a command must be refused with one line, and leave everything as it was."""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from tests.ranks import RankServer

ROOT = Path(__file__).parents[2]


def _contents(paths: tuple[Path, ...]) -> dict[str, str | None]:
    """Every file and folder below, with the sha256 of files."""
    found: dict[str, str | None] = {}
    for path in paths:
        for entry in [path, *path.rglob("*")] if path.is_dir() else [path]:
            if entry.exists():
                found[str(entry)] = hashlib.sha256(entry.read_bytes()).hexdigest() if entry.is_file() else None
    return found


@pytest.fixture
def unchanged() -> Callable[..., AbstractContextManager[None]]:
    """`with unchanged(path, ...)`: what is in these files and folders is the same after the block, or still absent."""

    @contextmanager
    def check(*paths: Path) -> Iterator[None]:
        before = _contents(paths)
        yield
        after = _contents(paths)
        different = {name for name in before.keys() | after.keys() if before.get(name, "") != after.get(name, "")}
        assert not different, f"changed: {sorted(different)}"

    return check


@pytest.fixture
def refused(rank_server: RankServer, unchanged: Callable[..., AbstractContextManager[None]]) -> Callable[..., str]:
    """`refused("tools/make_shards.py", *arguments, keep=(folder,))`: runs the script of the repository, asserts exit
    code 2, nothing on stdout, one line on stderr and the folders of `keep` as they were, and returns the line."""

    def run(
        script: str,
        *arguments: str | Path,
        keep: tuple[Path, ...] = (),
        ranks: int = 1,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> str:
        with unchanged(*keep):
            done = rank_server.launch(ROOT / script, *arguments, ranks=ranks, cwd=cwd, env=env).wait()
        assert done.returncode == 2, done.stderr
        assert not done.stdout, done.stdout
        lines = [line for line in done.stderr.strip().splitlines() if not re.match(r"\w+: +\d+%\|", line)]
        assert len(lines) == 1, done.stderr  # but for the progress that a slow machine shows
        return lines[0]

    return run
