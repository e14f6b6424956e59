"""docs/backbones.md says what the code says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

from fulllora_dist.models.finetune import create_model
from fulllora_dist.models.survey import Backbone, Refusal, architectures, examine, page, row, sizes

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "backbones.md").read_text()
ROWS = ["vit_tiny_patch16_224", "swin_s3_tiny_224", "swinv2_tiny_window8_256", "beit_base_patch16_224"]
ROWS += ["eva02_tiny_patch14_224", "cait_xxs24_224", "xcit_nano_12_p16_224", "convit_tiny", "deit3_medium_patch16_224"]


@pytest.mark.parametrize("name", ROWS)
def test_the_page_has_what_the_code_counts(name: str) -> None:
    found = examine(name)
    assert isinstance(found, Backbone)
    cells = row([found]).split("|")[2:]
    lines = [line for line in PAGE.splitlines() if line.startswith("|") and line.split("|")[2:] == cells]
    assert lines, f"no row of docs/backbones.md has{'|'.join(cells)}; run tools/backbones.py --write docs/backbones.md"
    with torch.device("meta"):
        bare = timm.create_model(name)
        model = create_model(name, pretrained=False, head="frozen")
    assert found.parameters == sum(p.numel() for p in bare.parameters())
    assert found.trainable == sum(p.numel() for n, p in model.backbone.named_parameters() if ".lnlora." in n)
    assert found.branches == sum(n.endswith(".A") for n, _ in model.backbone.named_parameters())
    assert found.share <= 0.05 < found.share * (1 + 1 / found.rank)


def test_every_family_and_the_large_ones_are_on_the_page() -> None:
    for heading in ("ViT", "Swin", "SwinV2", "BEiT", "EVA", "CaiT", "XCiT", "ConViT"):
        assert f"\n### {heading}\n" in PAGE
    for name in (
        "vit_giant_patch14_dinov2",
        "vit_giant_patch14_224",
        "eva02_large_patch14_224",
        "vit_gigantic_patch14_224",
    ):
        assert f"| `{name}`" in PAGE


def test_names_of_one_size_share_a_row() -> None:
    a, b, c = (examine(name) for name in ("vit_tiny_patch16_224", "deit_tiny_patch16_224", "vit_tiny_patch16_384"))
    assert isinstance(a, Backbone)
    assert isinstance(b, Backbone)
    assert isinstance(c, Backbone)
    assert [[x.name for x in group] for group in sizes([c, a, b])] == [[a.name, c.name, b.name]]
    refused = examine("convnext_atto")
    assert refused == Refusal("convnext_atto", str(refused.reason))  # type: ignore[union-attr]
    text = page([c, refused, b, a])
    assert "| `vit_tiny_patch16_224` (+2) | 224 | 5.7 M |" in text
    assert "| `convnext_atto` | has the model class ConvNeXt, where no branch is known to act |" in text
    assert {"vit_tiny_patch16_224", "samvit_base_patch16", "xcit_nano_12_p8_224"} <= set(architectures())


def test_a_name_on_the_command_line() -> None:
    command = [sys.executable, "tools/backbones.py", "--json", "convit_tiny", "resnet18"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300)
    facts = json.loads(done.stdout)
    assert facts["convit_tiny"]["family"] == "ConViT"
    assert facts["convit_tiny"]["branches"] == 1 + 12 * 6
    assert "resnet18 has the model class ResNet" in facts["resnet18"]["reason"]
    unknown = subprocess.run([*command, "convitt_tiny"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert unknown.returncode == 2
    assert "timm has no 'convitt_tiny'; nearest: convit_tiny" in unknown.stderr
