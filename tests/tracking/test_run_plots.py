"""Images of a run's end are a nicety."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fulllora_dist.config.schema import Config
from fulllora_dist.training.run_plots import show_end
from tests.tiny import tiny

CONFIG = {
    "model": {"backbone": "none"},
    "data": {"train": "none"},
    "run": {"output_dir": "none"},
    "optim": {"epochs": 1},
    "threat": {"eps": 0.1},
    "method": {"name": "fgsm_rs"},
}


class Full:
    """A stream of a GPU that has no memory left."""

    ids = torch.arange(4).numpy()

    def read(self, ids: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")


def test_no_memory_for_them_is_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    tracker: Any = SimpleNamespace(uri="sqlite:///none")
    show_end(tracker, Config.model_validate(CONFIG), tiny(), Full())  # type: ignore[arg-type]
    assert capsys.readouterr().err == (
        "warning: no final figures (OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB)\n"
    )
