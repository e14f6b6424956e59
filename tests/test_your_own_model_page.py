"""The code of docs/your_own_model.md runs, block after block, with tiny random models in place of pretrained ones."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import torchvision
import transformers

import fulllora_dist as fd
from tests.models.own_modules import hugging_face_vit, torchvision_vit
from tests.tiny import CLASSES, SIDE, architecture, images

PAGE = Path(__file__).parents[1] / "docs" / "your_own_model.md"


def test_every_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    build = timm.create_model

    def tiny_timm(name: str, pretrained: bool) -> Any:
        assert pretrained
        assert name in timm.list_pretrained()
        return build("vit_tiny_patch16_224", num_classes=CLASSES, img_size=SIDE, **architecture("vit"))

    def from_pretrained(name: str) -> Any:
        torch.manual_seed(0)
        return hugging_face_vit()

    processor = SimpleNamespace(image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5])
    monkeypatch.setattr(timm, "create_model", tiny_timm)
    monkeypatch.setattr(torchvision.models, "vit_b_16", lambda weights: torchvision_vit())
    monkeypatch.setattr(transformers.ViTForImageClassification, "from_pretrained", from_pretrained)
    monkeypatch.setattr(transformers.AutoImageProcessor, "from_pretrained", lambda name: processor)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 7
    names: dict[str, Any] = {"x": images()}
    # 5 % of a tiny model is less than a branch
    for block, printed in zip(
        blocks, ("trainable_fraction=0.05", "std=std", 'head="trained"', "", "", "", ""), strict=True
    ):
        assert printed in block
        block = block.replace(printed, "rank=2" if "0.05" in printed else f"{printed}, rank=2") if printed else block
        exec(compile(block, str(PAGE), "exec"), names)
        assert isinstance(names["model"], fd.AdaptedModel)
        assert names["model"](images()).shape == (4, CLASSES)
    assert isinstance(names["vit"], transformers.ViTForImageClassification)
    theirs, merged = names["theirs"].base_model.model, names["merged"]
    torch.testing.assert_close(theirs(images()).logits, merged(images()).logits, rtol=1e-4, atol=1e-4)
