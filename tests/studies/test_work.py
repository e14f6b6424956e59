"""The work of a training against torch's own counter, in loops of their own."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fulllora_dist as fd
from fulllora_dist.config.load import load_config
from fulllora_dist.studies.work import training_work
from tests.studies.conftest import CONFIG

BATCHES = 6
KWARGS = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}


def in_place(_: Any, left: Any, right: Any, **__: Any) -> int:
    """Of the branches' addmm_, which torch's counter does not know."""
    return 2 * left[0] * left[1] * right[1]


def counted(model: nn.Module, passes: int = 1) -> int:
    mapping = {torch.ops.aten.addmm_: in_place}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        model(torch.zeros(8, 3, 16, 16)).sum().backward()
    return BATCHES * passes * counter.get_total_flops()


def branched(**settings: Any) -> nn.Module:
    return fd.create_model(
        "vit_tiny_patch16_224", pretrained=False, num_classes=3, image_size=16, model_kwargs=KWARGS, **settings
    )


@pytest.fixture
def work(tmp_path: Path) -> Any:
    (tmp_path / "config.yaml").write_text(CONFIG.format(data=tmp_path))

    def of(*overrides: str) -> dict[str, int]:
        path = str(tmp_path / "config.yaml")
        return training_work(load_config(path, ["run.output_dir=unset", "optim.epochs=1", *overrides]), 48)

    return of


def test_on_clean_images_it_is_what_torch_counts(work: Any) -> None:
    """Full finetuning of a plain timm model; the branches; and the head alone, whose gradient ends there."""
    plain = timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=16, **KWARGS)
    full = work("method=standard", "finetune=full", "adapter.rank=null")
    assert full == {"batches": 6, "updates": 6, "flops": counted(plain)}
    assert work("method=standard")["flops"] == counted(branched(rank=2))
    head = work("method=standard", "finetune=head", "adapter.rank=null")["flops"]
    assert head == counted(branched(finetune="head"))
    assert head < 0.5 * full["flops"]


def test_attacks_are_passes_to_the_pixels_without_the_adapters_gradient(work: Any) -> None:
    frozen = branched(rank=2)
    for parameter in frozen.parameters():
        parameter.requires_grad_(False)
    with sdpa_kernel(SDPBackend.MATH):
        mapping = {torch.ops.aten.addmm_: in_place}
        with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
            frozen(torch.zeros(8, 3, 16, 16, requires_grad=True)).sum().backward()
    attack, weight_step = BATCHES * counter.get_total_flops(), counted(branched(rank=2))
    assert work("method=pgd", "method.steps=3")["flops"] == 3 * attack + weight_step


def test_an_attack_that_is_weakened_is_counted(work: Any) -> None:
    """As its passes are, without its mask, which needs the patches of a model that is prepared."""
    weakened = work("method=pgd", "method.perturbation_mask=0.25", "method.attention_drop=0.25")
    assert weakened == work("method=pgd")
