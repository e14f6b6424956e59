"""Streams of several ranks that do not see the same data."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fulllora_dist.config.schema import Config
from fulllora_dist.core.errors import UserError
from fulllora_dist.data.index import Index
from fulllora_dist.data.shards.indexing import index_shards
from fulllora_dist.data.subset import Subset
from fulllora_dist.distributed.comm import Comm
from fulllora_dist.models.backbone import BackboneInfo
from fulllora_dist.training.build import build_eval_stream, build_stream
from tests.ranks import RankServer
from tests.tiny import tiny

INFO = BackboneInfo(
    "none", None, False, 0, None, 3, None, True, 8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 0.9, "bicubic", {}
)


def _train(config: Config, comm: Comm) -> object:
    return build_stream(config, INFO, comm)


def _evaluate(config: Config, comm: Comm) -> object:
    return build_eval_stream(config, config.data.train, tiny(num_classes=3), comm, subset=Subset())


def _refusal(comm: Comm, folders: list[str], build: Callable[[Config, Comm], object]) -> str:
    config = Config.model_validate(
        {
            "model": {"backbone": "none"},
            "data": {"train": folders[comm.rank], "num_workers": 0},
            "run": {"output_dir": "none"},
            "threat": {"eps": 0.1},
            "method": {"name": "standard"},
            "optim": {"batch_size": 4, "epochs": 1},
        }
    )
    try:
        build(config, comm)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("build", "setting"), [(_train, "data.train"), (_evaluate, "data.validation")])
def test_a_stale_copy_on_one_machine_is_refused(
    server: RankServer, shards: str, tmp_path: Path, build: Callable, setting: str
) -> None:
    moved, stale = tmp_path / "moved", tmp_path / "stale"
    for copy in (moved, stale):
        shutil.copytree(shards, copy)
    assert server.run(2, _refusal, [shards, str(moved)], build) == ["", ""]
    (stale / "train-000002.tar").unlink()
    index_shards([str(stale)], classes=3, progress=False)
    first, other = server.run(2, _refusal, [shards, str(stale)], build)
    assert first == ""
    here, there = (Index.load(folder).hash[:12] for folder in (stale, shards))
    assert other == (
        f"{setting}: the index here ({here}, 18 samples) is not rank 0's ({there}); "
        "put the same shards and index on every machine"
    )
