import os
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient

from tests.ranks import RankServer


@pytest.fixture(autouse=True, scope="module")
def same_environment() -> Iterator[None]:
    """Each file starts from the same environment: MLflow writes the store that is set into it."""
    before = dict(os.environ)
    yield
    mlflow.set_tracking_uri(None)
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def rank_server() -> Iterator[RankServer]:
    """Forks real ranks, and runs scripts without their imports."""
    server = RankServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow store in sqlite that has been used, to copy: making one takes seconds."""
    file = tmp_path_factory.mktemp("database") / "mlflow.db"
    MlflowClient(f"sqlite:///{file}").search_experiments()
    return file
