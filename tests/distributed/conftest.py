import pytest
from cases import noise_shards

from tests.ranks import RankServer


@pytest.fixture(scope="session")
def server(rank_server: RankServer) -> RankServer:
    """Forks real ranks."""
    return rank_server


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """24 noise images of three classes."""
    return noise_shards(tmp_path_factory.mktemp("noise"), seed=0)
