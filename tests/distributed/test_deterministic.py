"""run.deterministic on all ranks, and what it leaves behind."""

import os
from pathlib import Path

import pytest
import torch
from test_resume import EPS

from fulllora_dist.config.schema import Config
from fulllora_dist.distributed.comm import Comm
from fulllora_dist.training.run import train
from fulllora_dist.training.trainer import Trainer
from tests.ranks import RankServer


def _switches() -> tuple:
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    return (
        torch.are_deterministic_algorithms_enabled(),
        cudnn.deterministic,
        not cudnn.benchmark,
        cuda.math_sdp_enabled(),
        cuda.flash_sdp_enabled(),
        not cuda.mem_efficient_sdp_enabled(),
        not cuda.cudnn_sdp_enabled(),
        os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    )


def _seen(_: Comm, settings: dict, fails: bool) -> tuple[tuple, tuple, set[tuple]]:
    before, seen, advance = _switches(), set(), Trainer.advance

    def watched(trainer: Trainer, *args: object) -> object:
        seen.add(_switches())
        if fails:
            raise ZeroDivisionError
        return advance(trainer, *args)

    Trainer.advance = watched
    try:
        train(Config.model_validate(settings))
    except ZeroDivisionError:
        assert fails
    return before, _switches(), seen


@pytest.mark.parametrize("fails", [False, True])
def test_it_holds_during_the_training_of_all_ranks_and_ends_with_it(
    server: RankServer, shards: str, tmp_path: Path, fails: bool
) -> None:
    settings = {
        "model": {
            "backbone": "vit_tiny_patch16_224",
            "pretrained": False,
            "num_classes": 3,
            "image_size": 16,
            "model_kwargs": {"patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2},
        },
        "adapter": {"rank": 2},
        "threat": {"eps": EPS},
        "method": {"name": "pgd", "steps": 1},
        "data": {"train": shards, "num_workers": 0},
        "optim": {"batch_size": 8, "epochs": 0.4},
        "run": {"output_dir": str(tmp_path / "run"), "deterministic": True},
        "tracking": {"enabled": False},
    }
    for before, after, seen in server.run(2, _seen, settings, fails):
        assert seen == {(*[True] * 7, ":4096:8")}
        assert before == after
        assert not before[0]
