"""What enters a step of a loop of one's own: labels, the engine, the batch."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fulllora_dist as fd
from fulllora_dist.core.errors import UserError
from tests.tiny import CLASSES, SIDE

NAMES = ["standard", "pgd", "fgsm_rs", "n_fgsm", "trades", "mart", "free"]


class Net(nn.Module):
    num_classes = CLASSES

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3 * SIDE * SIDE, CLASSES)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(pixels.flatten(1))


def local_engine(model: nn.Module, **settings: Any) -> fd.LocalEngine:
    return fd.LocalEngine(model, torch.optim.SGD(model.parameters(), lr=0.1), **settings)


@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("name", [*NAMES, "mixup"])
def test_a_label_without_a_logit_is_refused_before_the_update(name: str, parts: int, grey: bool) -> None:
    """By every method, with and without accumulation, also where the batch was moved and joined."""
    model = Net()
    method = fd.method("pgd", eps="8/255", targets={"mixup": 0.8}) if name == "mixup" else fd.method(name, eps="8/255")
    before = model.head.weight.detach().clone()
    x = (255 * torch.rand(4, 3, SIDE, SIDE)).byte() if grey else torch.rand(4, 3, SIDE, SIDE)
    batch = fd.Batch.cat([fd.Batch.of(x[:2], [0, CLASSES]), fd.Batch.of(x[2:], [0, 1])]).to("cpu")
    with pytest.raises(UserError) as error:
        method.step(local_engine(model, accumulation_steps=parts), batch, 0)
    assert str(error.value) == (
        f"y must be labels below {CLASSES}, one for each of the model's {CLASSES} outputs, got {CLASSES}; labels count "
        "from 0"
    )
    assert torch.equal(model.head.weight, before)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_names_what_it_was_given_in_place_of_engine_and_batch(name: str) -> None:
    method, model = fd.method(name, eps="8/255"), Net()
    batch: Any = fd.Batch.of(torch.rand(3, 3, SIDE, SIDE), [0, 1, 2])
    not_an_engine: Any = model
    with pytest.raises(UserError, match=r"^engine must be fd\.LocalEngine\(model, optimizer\), got Net$"):
        method.step(not_an_engine, batch, 0)
    batch = batch.images, batch.labels
    with pytest.raises(UserError, match=r"^batch must be fd\.Batch\.of\(x, y\), got tuple$"):
        method.step(local_engine(model), batch, 0)
