"""docs/backbones.md says what the code says."""

import json
import re
from pathlib import Path

import pytest
import timm
import torch

from fulllora_dist.models.adapt import create_model
from fulllora_dist.models.survey import NEW_CLASSES, Backbone, Refusal, architectures, examine, page, rows
from tests.ranks import RankServer

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "backbones.md").read_text()
ROWS = ["vit_tiny_patch16_224", "swin_s3_tiny_224", "swinv2_tiny_window8_256", "beit_base_patch16_224"]
ROWS += ["eva02_tiny_patch14_224", "cait_xxs24_224", "xcit_nano_12_p16_224", "convit_tiny", "deit3_medium_patch16_224"]
ROWS += ["vit_giant_patch14_224", "eva02_large_patch14_224", "swinv2_large_window12to16_192to256", "flexivit_base"]
ROWS += ["vit_base_patch16_224", "vit_base_patch16_224_miil", "vit_small_patch14_dinov2", "deit3_base_patch16_224"]


def table() -> dict[str, str]:
    """{architecture: the rest of its row}, refused ones included."""
    found: dict[str, str] = {}
    for line in PAGE.splitlines():
        if re.match(r"\| `[a-z0-9_]+`[ ,]", line):
            names, _, cells = line.removeprefix("| ").partition(" | ")
            for name in names.replace("`", "").split(", "):
                assert name not in found
                found[name] = cells
    return found


@pytest.mark.parametrize("name", ROWS)
def test_the_page_has_what_the_code_counts(name: str) -> None:
    found = examine(name)
    assert isinstance(found, Backbone)
    stale = "run tools/backbones.py --write docs/backbones.md"
    assert table()[name] == found.cells, stale
    with torch.device("meta"):
        own = timm.create_model(name).num_classes
        head = "frozen" if own else "trained"
        bare = timm.create_model(name, num_classes=own or NEW_CLASSES)
        model = create_model(name, pretrained=False, head=head, num_classes=None if own else NEW_CLASSES)
    trained = [n for n in model.trainable() if ".lnlora." not in n]
    assert found.new_head is bool(trained)
    assert all(n.startswith("head") for n in trained)
    assert found.parameters == sum(p.numel() for p in bare.parameters())
    assert found.trainable == sum(p.numel() for p in model.trainable().values())
    assert found.branches == sum(n.endswith(".A") for n, _ in model.backbone.named_parameters())
    fixed = sum(model.trainable()[n].numel() for n in trained)
    assert found.trainable <= 0.05 * found.parameters < fixed + (found.trainable - fixed) * (1 + 1 / found.rank)


def test_the_page_has_every_architecture_once() -> None:
    if f"Counted with timm {timm.__version__}." not in PAGE:
        pytest.skip("the page was counted with another timm, which has other models")
    assert sorted(table()) == architectures()


def test_every_family_is_on_the_page() -> None:
    for heading in ("ViT", "Swin", "SwinV2", "BEiT", "EVA", "CaiT", "XCiT", "ConViT"):
        assert f"\n### {heading}\n" in PAGE


def test_a_row_holds_for_each_name_in_it() -> None:
    a, b, c = (examine(name) for name in ("vit_tiny_patch16_224", "deit_tiny_patch16_224", "vit_tiny_patch16_384"))
    assert isinstance(a, Backbone)
    assert isinstance(b, Backbone)
    assert isinstance(c, Backbone)
    assert [[x.name for x in group] for group in rows([c, b, a])] == [[a.name, b.name], [c.name]]
    refused = examine("convnext_atto")
    assert isinstance(refused, Refusal)
    text = page([c, refused, b, a])
    assert "| `vit_tiny_patch16_224`, `deit_tiny_patch16_224` | 224 | 5.7 M |" in text
    assert "| `vit_tiny_patch16_384` | 384 | 5.8 M |" in text
    assert "| `convnext_atto` | has the model class ConvNeXt, where no branch is known to act |" in text
    assert {"vit_tiny_patch16_224", "samvit_base_patch16", "xcit_nano_12_p8_224"} <= set(architectures())


def test_a_name_on_the_command_line(rank_server: RankServer) -> None:
    command = [ROOT / "tools" / "backbones.py", "--json", "convit_tiny", "resnet18"]
    done = rank_server.launch(*command).wait()
    assert done.returncode == 0, done.stderr
    metadata = json.loads(done.stdout)
    assert metadata["convit_tiny"]["family"] == "ConViT"
    assert metadata["convit_tiny"]["branches"] == 1 + 12 * 6
    assert "resnet18 has the model class ResNet" in metadata["resnet18"]["reason"]
    unknown = rank_server.launch(*command, "convitt_tiny").wait()
    assert unknown.returncode == 2
    assert "timm has no 'convitt_tiny'; nearest: convit_tiny" in unknown.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--write", "page.md", "convit_tiny"],
            "--write: the page has all architectures at the default fraction; leave out",
        ),
        (["--write", "page.md", "--json"], "--write: the page has all architectures"),
        (["--write", "page.md", "--trainable-fraction", "0.1"], "--write: the page has all architectures"),
        (["--write", "missing/dir.md"], "--write: missing/dir.md cannot be written (No such file or directory); give"),
        (["--write", "page.md"], "--write: page.md has no line <!-- written by tools/backbones.py -->; add it"),
        (
            ["--trainable-fraction", "-1", "convit_tiny"],
            "--trainable-fraction must be > 0 and <= 1, got -1",
        ),
        (["--trainable-fraction", "nan", "convit_tiny"], "--trainable-fraction must be > 0 and <= 1, got nan"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_writes_nothing(
    rank_server: RankServer, arguments: list[str], words: str, tmp_path: Path
) -> None:
    (tmp_path / "page.md").write_text("mine\n")
    done = rank_server.launch(ROOT / "tools" / "backbones.py", *arguments, cwd=tmp_path).wait()
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {words}")
    assert done.stderr.count("\n") == 1
    assert (tmp_path / "page.md").read_text() == "mine\n"
