"""Bad images over several ranks: counted together, and all ranks stop at the same batch."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from fulllora_dist.core.errors import SharedUserError
from fulllora_dist.data.loader import TrainStream
from fulllora_dist.data.plan import epoch_plan
from fulllora_dist.data.shards.indexing import index_shards
from fulllora_dist.data.transforms import TrainTransform
from fulllora_dist.distributed.comm import Comm
from tests.ranks import RankServer

BAD = (2, 13, 21)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """24 images, three of them text."""
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    with tarfile.open(folder / "train-000.tar", "w") as tar:
        for i in range(24):
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(buffer, "PNG")
            image = b"a text" if i in BAD else buffer.getvalue()
            for extension, data in (("png", image), ("cls", b"0")):
                member = tarfile.TarInfo(f"{i:02d}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    index_shards([str(folder)], progress=False)
    return str(folder)


def _stream(folder: str, world: int, rank: int, allowed: int) -> TrainStream:
    transform = TrainTransform(size=8, augment="none")
    return TrainStream(
        folder, batch_size=4, seed=0, transform=transform, world=world, rank=rank, max_bad_samples=allowed
    )


def _train(comm: Comm, folder: str, allowed: int) -> tuple[int, str, list[int]]:
    """As train.py does: the batch that this rank came to, what stopped it, and the bad samples that are saved."""
    stream = _stream(folder, comm.world, comm.rank, allowed)
    step = 0
    for step, _ in zip(range(1, 13), stream, strict=False):  # two epochs
        stream.commit(step)
        try:
            stream.count_bad(comm.all_gather_list)
        except SharedUserError as error:
            return step, str(error), []
        comm.barrier()
    return step, "", stream.state_dict()["bad_samples"]


def _batch_of(bad: int) -> int:
    """The batch, from 1 on, in which a sample would come."""
    return int(np.argwhere(bad == epoch_plan(24, 0, 0, 4).lanes(0, 4).T)[0][0]) + 1


def test_they_are_counted_over_all_ranks_once(server: RankServer, folder: str) -> None:
    assert server.run(2, _train, folder, 3) == [(12, "", list(BAD))] * 2


def test_all_ranks_stop_at_the_same_batch(server: RankServer, folder: str) -> None:
    """No rank alone meets more than are allowed, together they do."""
    first = sorted(_batch_of(bad) for bad in BAD)
    found = server.run(2, _train, folder, 2)
    assert [step for step, _, _ in found] == [first[2]] * 2
    assert found[0][1] == found[1][1]
    assert "3 unreadable images exceed data.max_bad_samples=2; " in found[0][1]
    assert "at offset" in found[0][1]
    assert "\n" not in found[0][1]
