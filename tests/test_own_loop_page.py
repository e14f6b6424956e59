"""The code of docs/own_loop.md runs, block after block, with a tiny model in place of a pretrained ViT-B."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from torch.utils.data import DataLoader, TensorDataset

import fulllora_dist as fd
from tests.tiny import CLASSES, SIDE, tiny

PAGE = Path(__file__).parents[1] / "docs" / "own_loop.md"


def test_every_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny()
    monkeypatch.setattr("fulllora_dist.models.adapt.create_model", lambda name, num_classes: model)
    before = {name: tensor.detach().clone() for name, tensor in model.trainable().items()}
    generator = torch.Generator().manual_seed(0)
    pixels, labels = (
        torch.rand(8, 3, SIDE, SIDE, generator=generator),
        torch.randint(0, CLASSES, (8,), generator=generator),
    )
    loader = DataLoader(TensorDataset(pixels, labels), batch_size=4)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 5
    names: dict[str, Any] = {"loader": loader}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for block in blocks:
            exec(compile(block, str(PAGE), "exec"), names)
            assert torch.isfinite(names["metrics"]["loss"])
    finally:
        dist.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in model.trainable().items())
    assert fd.load("adapter/").spec == model.spec
