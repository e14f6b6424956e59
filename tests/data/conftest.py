import io
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fulllora_dist.data.shards.make import make_shards

SIDE = 24
CLASS_SIZES = {"ant": 14, "bee": 10, "cat": 8}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own, for its subprocesses too."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "fulllora_dist"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Images that are lent to the project, not part of it."""
    folder = Path(__file__).parents[3] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    return folder


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 noise images of 24 x 24 in three classes: JPEG, greyscale JPEG, PNG."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name, count in CLASS_SIZES.items():
        (root / name).mkdir()
        for i in range(count):
            pixels = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
            image = Image.fromarray(pixels if i % 3 else pixels[:, :, 0])
            stem = f"{i:03d}" if i != 1 else "1.v2 é " + "n" * 120  # dots, not ASCII, too long for a plain tar header
            image.save(root / name / (stem + (".png" if i % 4 == 0 else ".JPEG")))
    return root


@pytest.fixture(scope="session")
def shards(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 32 images in five shards."""
    folder = tmp_path_factory.mktemp("shards")
    make_shards(image_folder, folder, samples_per_shard=7, progress=False)
    return folder


@pytest.fixture(scope="session")
def tar_contents() -> Callable[[Path], Counter]:
    """(label, crc32 of the RGB pixels) of every sample of a folder of shards, through tarfile and PIL alone."""

    def read(folder: Path) -> Counter:
        found: Counter = Counter()
        for path in folder.glob("*.tar"):
            with tarfile.open(path) as tar:
                files = {m.name: tar.extractfile(m).read() for m in tar.getmembers()}
            for name, data in files.items():
                key, _, extension = name.rpartition(".")
                if extension != "cls":
                    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
                    found[int(files[key + ".cls"]), zlib.crc32(pixels.tobytes())] += 1
        return found

    return read
