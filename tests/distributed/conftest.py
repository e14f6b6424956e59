from collections.abc import Iterator

import pytest
from cases import noise_shards
from harness import RankServer


@pytest.fixture(scope="session")
def server() -> Iterator[RankServer]:
    """Forks real ranks."""
    server = RankServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """24 noise images of three classes."""
    return noise_shards(tmp_path_factory.mktemp("noise"), seed=0)
