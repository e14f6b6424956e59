from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from harness import RankServer
from PIL import Image

from fulllora_dist.data.write import make_shards


@pytest.fixture(scope="session")
def server() -> Iterator[RankServer]:
    """Forks real ranks."""
    server = RankServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """24 noise pictures of three classes."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for label in range(3):
        (root / f"class{label}").mkdir()
        for i in range(8):
            pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(Path(root / f"class{label}" / f"{i}.png"))
    folder = tmp_path_factory.mktemp("shards")
    make_shards(root, folder, samples_per_shard=9, progress=False)
    return str(folder)
