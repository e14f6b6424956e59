"""Which samples are evaluated."""

import dataclasses
import http.server
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fulllora_dist.core.errors import UserError
from fulllora_dist.data.index import Index
from fulllora_dist.data.loader import EvalStream
from fulllora_dist.data.shards.make import make_shards
from fulllora_dist.data.subset import Subset
from fulllora_dist.data.transforms import EvalTransform


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 images of three classes, named as ImageNet's are."""
    root, folder = tmp_path_factory.mktemp("images"), tmp_path_factory.mktemp("shards")
    for i in range(12):
        (root / f"n{i % 3}").mkdir(exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 20 * i, np.uint8)).save(
            root / f"n{i % 3}" / f"ILSVRC2012_val_{i:08d}.JPEG", format="PNG"
        )
    make_shards(root, folder, progress=False)
    return folder


def _of(shards: Path, subset: Subset) -> list[int]:
    return subset.of(Index.load(shards), str(shards)).tolist()


def test_all_first_and_balanced(shards: Path) -> None:
    labels = Index.load(shards).labels
    assert _of(shards, Subset()) == list(range(12))
    assert _of(shards, Subset(first=5)) == list(range(5))
    balanced = _of(shards, Subset(6))
    assert np.bincount(labels[balanced]).tolist() == [2, 2, 2]


def test_a_file_of_ids_or_of_names(shards: Path, tmp_path: Path) -> None:
    index, file = Index.load(shards), tmp_path / "ids.txt"
    file.write_text("# mine\n7\n\n2\n")
    assert _of(shards, Subset(ids=str(file))) == [2, 7]
    names = [index.key(i) for i in (9, 4, 1)]
    file.write_text("\n".join(names))
    assert _of(shards, Subset(ids=str(file))) == [1, 4, 9]
    file.write_text("".join(f"{index.classes[index.labels[i]]}/{Path(index.key(i)).name}.JPEG 3\n" for i in (8, 3)))
    assert _of(shards, Subset(ids=str(file))) == [3, 8], "with folder, extension and a label, as RobustBench's list"


def test_a_file_at_a_url(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("3\n")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: object, **kwargs: object):
            super().__init__(*args, directory=str(tmp_path), **kwargs)  # type: ignore[arg-type]

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert _of(shards, Subset(ids=f"http://127.0.0.1:{server.server_port}/ids.txt")) == [3]
        server.shutdown()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("12\n", "has id 12; .* has 12 samples"),
        ("1\n1\n", "names 1 twice"),
        ("ILSVRC2012_val_00000099.JPEG\n", "matches no sample"),
        ("# nothing\n", "names no samples"),
        (b"\xff\xfe\xfa", "is not a text file"),
        ("3\nILSVRC2012_val_00000001.JPEG\n", "3 of .* matches no sample of .*; a file holds either ids or names"),
        (b"\xef\xbb\xbf12\n", "has id 12; .* has 12 samples"),
    ],
)
def test_bad_files_are_refused(shards: Path, tmp_path: Path, content: str | bytes, message: str) -> None:
    file = tmp_path / "ids.txt"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=rf"evaluation.ids: .*{message}"):
        _of(shards, Subset(ids=str(file)))


def test_names_that_are_numbers_are_no_ids(shards: Path, tmp_path: Path) -> None:
    """img2dataset numbers its images: 000000003 may be an id or a name; so may 0003 in a folder of a class."""
    index, file = Index.load(shards), tmp_path / "ids.txt"

    def named(keys: list[str]) -> Index:
        columns = {"keys": np.frombuffer("".join(keys).encode(), np.uint8), "key_end": np.cumsum([*map(len, keys)])}
        return dataclasses.replace(index, columns=dict(index.columns) | columns)

    numbered = named([f"{i + 5:09d}" for i in range(12)])
    file.write_text("000000008.jpg\n000000006.jpg\n")
    assert Subset(ids=str(file)).of(numbered, "them").tolist() == [1, 3]
    file.write_text("000000008\n000000006\n")
    with pytest.raises(
        UserError, match=r"these may be ids or names; give names with their folder or extension, e.g. 000000006.jpg"
    ):
        Subset(ids=str(file)).of(numbered, "them")
    in_folders = named([f"{folder}/{i:04d}" for folder in ("cat", "dog") for i in range(6)])
    file.write_text("0003\n0005\n")
    with pytest.raises(UserError, match=r"give names with their folder or extension, e.g. cat/0003"):
        Subset(ids=str(file)).of(in_folders, "them")
    file.write_text("cat/0003\ndog/0005.jpg\n")
    with pytest.raises(UserError, match=r"dog/0005.jpg of .* matches several samples"):
        Subset(ids=str(file)).of(in_folders, "them")
    file.write_text("cat/0003\ndog/0005\n")
    assert Subset(ids=str(file)).of(in_folders, "them").tolist() == [3, 11]
    file.write_text("3\n11\n")
    assert Subset(ids=str(file)).of(in_folders, "them").tolist() == [3, 11], "ids, as no image is called so"
    in_folders = named([f"{folder}/{i}" for folder in ("cat", "dog") for i in range(6)])
    assert Subset(ids=str(file)).of(in_folders, "them").tolist() == [3, 11], "ids, as names have their folders"


def test_bad_settings_are_refused(shards: Path) -> None:
    with pytest.raises(UserError, match=r"at most one of evaluation.num_samples, evaluation.first and evaluation.ids"):
        Subset(3, first=3)
    with pytest.raises(UserError, match=r"evaluation.first must be between 1 and the 12 samples of .*, got 13"):
        _of(shards, Subset(first=13))
    with pytest.raises(UserError, match=r"evaluation.ids: nowhere.txt: cannot be read"):
        _of(shards, Subset(ids="nowhere.txt"))


@pytest.mark.parametrize("workers", [0, 3])
def test_read_gives_what_an_iteration_does(shards: Path, workers: int) -> None:
    stream = EvalStream(shards, batch_size=5, transform=EvalTransform(size=8, crop_pct=1.0), workers=0)
    reader = EvalStream(shards, batch_size=5, transform=EvalTransform(size=8, crop_pct=1.0), workers=workers)
    for batch, ids in zip(stream, stream.batches, strict=True):
        read = reader.read(ids)
        assert read.ids.tolist() == ids.tolist() == batch.ids[batch.mask].tolist()
        assert (read.images == batch.images[batch.mask]).all()
        assert read.labels.tolist() == batch.labels[batch.mask].tolist()
        assert read.mask.all()


def test_the_digest_tells_streams_apart(shards: Path) -> None:
    def digest(size: int = 8, batch_size: int = 5, n: int | None = None) -> str:
        transform = EvalTransform(size=size, crop_pct=1.0)
        return EvalStream(shards, batch_size=batch_size, transform=transform, subset=Subset(n)).digest

    assert digest() == digest()
    assert len({digest(), digest(size=9), digest(batch_size=4), digest(n=11)}) == 4
