"""What else enters an attack: labels, sizes, counts, models. Clear ones give what plain PyTorch gives."""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from plain_pgd import plain_pgd
from torch import Tensor, nn

import fulllora_dist as fd
from fulllora_dist.core.errors import UserError
from tests.tiny import CLASSES, SIDE, images, stir, tiny

EPS, STEP = 8 / 255, 3 / 255
KEY: dict[str, Any] = {"eps": EPS, "steps": 3, "step_size": STEP}
Y = torch.tensor([0, 1, 2, 3])
ONE_HOT = F.one_hot(Y, CLASSES)
PIXELS = 3 * SIDE * SIDE


class Net(nn.Module):
    """Two layers, dropout, a frozen bias; `change` of what it returns."""

    def __init__(self, change: Callable[[Tensor], Any] = lambda z: z, outputs: int = CLASSES):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.drop, self.last = nn.Linear(PIXELS, 8), nn.Dropout(0.5), nn.Linear(8, outputs)
        self.first.bias.requires_grad_(False)
        self.change = change

    def forward(self, x: Tensor) -> Any:
        return self.change(self.last(self.drop(torch.tanh(self.first(x.flatten(1))))))


def state(model: nn.Module) -> list[Any]:
    gradients = [None if p.grad is None else p.grad.tolist() for p in model.parameters()]
    flags = [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]
    return [gradients, *flags, {name: value.tolist() for name, value in model.state_dict().items()}]


def refused(line: str, model: Any = None, x: Any = None, y: Any = Y, **more: Any) -> None:
    """One line, and the model, the images and their gradients as before."""
    model, x = Net() if model is None else model, images() if x is None else x
    before = state(model) if isinstance(model, nn.Module) else None
    pixels = x.clone()
    with pytest.raises(UserError) as refusal:
        fd.pgd(model, x, y, **(KEY | more))
    assert str(refusal.value) == line
    assert torch.equal(x, pixels)
    assert not isinstance(model, nn.Module) or state(model) == before


# -- labels --------------------------------------------------------------------------------------------------------

SOFT = torch.tensor([[0.7, 0.3, 0, 0], [0, 0.5, 0.5, 0], [0.25] * 4, [0, 0, 0.1, 0.9]])
LABELS: dict[str, tuple[Any, Tensor]] = {
    "list": ([0, 1, 2, 3], Y),
    "tuple": ((0, 1, 2, 3), Y),
    "numpy": (Y.numpy(), Y),
    "int32": (Y.int(), Y),
    "int16 of numpy": (Y.numpy().astype(np.int16), Y),
    "uint8": (Y.byte(), Y),
    "soft": (SOFT, SOFT),
    "soft of float64": (SOFT.double(), SOFT),
    "soft of numpy": (SOFT.numpy(), SOFT),
    "soft lists": (SOFT.tolist(), SOFT),
    "soft in bf16": (SOFT.bfloat16(), SOFT.bfloat16().float()),
    "soft that asks for a gradient": (SOFT.clone().requires_grad_(), SOFT),
    "one-hot": (ONE_HOT, Y),
    "one-hot floats": (ONE_HOT.float(), Y),
}


@pytest.mark.parametrize("case", LABELS)
def test_labels_whose_meaning_is_clear(case: str) -> None:
    given, meant = LABELS[case]
    found = fd.pgd(Net(), images(), given, **KEY)
    assert (found - plain_pgd(Net().eval(), images(), meant, EPS, 3, STEP)).abs().max() <= 1e-7


ONES = "y must be probabilities [B, classes], >= 0 with a sum of 1 for each image"
BAD_LABELS: dict[str, tuple[Any, str]] = {
    "floats": (Y.float(), "y must be integer labels [B], got float32 [4]; write y.long()"),
    "float list": ([0.0, 1.0, 2.0, 3.0], "y must be integer labels [B], got float32 [4]; write y.long()"),
    "bool": (Y > 1, "y must be integer labels [B] or probabilities [B, classes], got bool"),
    "a column": (
        Y[:, None],
        "y must be labels [B] or probabilities [B, classes], got [4, 1]; write y.squeeze(1)",
    ),
    "one number": (3, "y must be labels [B] or probabilities [B, classes], got []"),
    "None": (None, "y must be labels [B] or probabilities [B, classes], got NoneType"),
    "names": (["cat", "dog", "cat", "dog"], "y must be labels [B] or probabilities [B, classes], got list"),
    "too few": (Y[:3], "y must have a label for each image, got 3 for 4 images"),
    "too many soft": (SOFT.repeat(2, 1), "y must have a label for each image, got 8 for 4 images"),
    "negative": (Y - 1, "y must be labels >= 0, got -1"),
    "torch's ignored label": (torch.tensor([0, 1, -100, 3]), "y must be labels >= 0, got -100"),
    "beyond the classes": (
        Y + 1,
        "y must be labels below 4, one for each of the model's 4 outputs, got 4; labels count from 0",
    ),
    "soft, one class too many": (
        F.pad(SOFT, (0, 1)),
        "y must be probabilities of the model's 4 classes, got 5",
    ),
    "soft, one class too few": (
        torch.full((4, 3), 1 / 3),
        "y must be probabilities of the model's 4 classes, got 3",
    ),
    "several classes": (torch.tensor([[1, 1, 0, 0.0]] * 4), ONES),
    "logits": (torch.tensor([[2.0, -1.0, 0, 0]] * 4), ONES),
    "soft NaN": (torch.tensor([[float("nan"), 1, 0, 0]] * 4), ONES),
    "percent": (100 * SOFT, ONES),
}


@pytest.mark.parametrize("case", BAD_LABELS)
def test_labels_that_are_none(case: str) -> None:
    given, line = BAD_LABELS[case]
    refused(line, y=given)


@pytest.mark.parametrize("loss", ["margin", "dlr"])
def test_probabilities_have_no_margin(loss: str) -> None:
    refused("y must be labels [B], got probabilities [4, 4]; write y.argmax(1), or loss='ce'", y=SOFT, loss=loss)


def test_a_batch_has_labels() -> None:
    with pytest.raises(UserError) as refusal:
        fd.Batch.of(images(), SOFT)
    assert str(refusal.value) == "y must be labels [B], got probabilities [4, 4]; write y.argmax(1)"


# -- sizes, counts, names ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("eps", "step_size"),
    [
        ("8/255", "3/255"),
        (EPS, STEP),
        (str(EPS), str(STEP)),
        (np.float64(EPS), np.float64(STEP)),
        (" 8/255 ", "3 / 255"),
    ],
)
def test_sizes_as_numbers_and_strings(eps: Any, step_size: Any) -> None:
    found = fd.pgd(Net(), images(), Y, eps=eps, steps=np.int64(3), step_size=step_size)
    assert (found - plain_pgd(Net().eval(), images(), Y, EPS, 3, STEP)).abs().max() <= 1e-7


def test_sizes_of_zero_and_no_steps() -> None:
    x = images()
    assert torch.equal(fd.pgd(Net(), x, Y, eps=0, steps=3, step_size=0), x)
    assert torch.equal(fd.pgd(Net(), x, Y, eps="0/255", steps=3, step_size="1/255"), x)
    assert torch.equal(fd.pgd(Net(), x, Y, **(KEY | {"steps": 0, "random_start": False})), x)
    start = fd.pgd(Net(), x, Y, **(KEY | {"steps": 0}))
    assert (start - plain_pgd(Net().eval(), x, Y, EPS, 0, STEP)).abs().max() <= 1e-7


PIXEL = "is outside [0, 1], the range of a pixel"
SIZE = "is not a size in pixels; write a number in [0, 1] or a fraction such as 4/255"
BAD_SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"eps": 8}, f"eps: 8 {PIXEL}; for 8 of 255 grey levels write 8/255"),
    ({"eps": "8"}, f"eps: 8 {PIXEL}; for 8 of 255 grey levels write 8/255"),
    ({"eps": -0.1}, f"eps: -0.1 {PIXEL}"),
    ({"eps": float("nan")}, f"eps: nan {PIXEL}"),
    ({"eps": "inf"}, f"eps: inf {PIXEL}"),
    ({"eps": "8/0"}, f"eps: '8/0' {SIZE}"),
    ({"eps": "big"}, f"eps: 'big' {SIZE}"),
    ({"eps": None}, "eps must be a number or a fraction such as '4/255', got None"),
    ({"eps": True}, "eps must be a number or a fraction such as '4/255', got True"),
    ({"eps": torch.tensor([0.1, 0.2])}, f"eps: tensor([0.1000, 0.2000]) {SIZE}"),
    ({"eps": torch.full((1, 2, 1, 1), 0.1)}, f"eps: tensor([[[[0.1000]], [[0.1000]]]]) {SIZE}"),
    ({"norm": "l2", "eps": -1}, f"eps: -1 {PIXEL}"),
    ({"step_size": 2}, f"step_size: 2 {PIXEL}; for 2 of 255 grey levels write 2/255"),
    ({"step_size": "-1/255"}, f"step_size: -1/255 {PIXEL}"),
    ({"step_size": None}, "step_size must be a number or a fraction such as '4/255', got None"),
    ({"step_size": 0}, "step_size must be > 0, got 0, with which no step moves"),
    ({"steps": -1}, "steps must be an integer >= 0, got -1"),
    ({"steps": 10.0}, "steps must be an integer >= 0, got 10.0"),
    ({"steps": True}, "steps must be an integer >= 0, got True"),
    ({"steps": "10"}, "steps must be an integer >= 0, got '10'"),
    ({"steps": torch.tensor([[1], [2]])}, "steps must be an integer >= 0, got tensor([[1], [2]])"),
    ({"steps": None}, "steps must be an integer >= 0, got None"),
    ({"restarts": 0}, "restarts must be an integer >= 1, got 0"),
    ({"restarts": 1.5}, "restarts must be an integer >= 1, got 1.5"),
    ({"norm": "Linf"}, "norm: 'Linf' is unknown; known: linf, l2, l1"),
    ({"norm": 2}, "norm: 2 is unknown; known: linf, l2, l1"),
    ({"norm": ["l2"]}, "norm: ['l2'] is unknown; known: linf, l2, l1"),
    ({"loss": "kl"}, "loss: 'kl' is unknown; known: ce, margin, dlr"),
    ({"loss": None}, "loss: None is unknown; known: ce, margin, dlr"),
    ({"loss": ["ce"]}, "loss: ['ce'] is unknown; known: ce, margin, dlr"),
    ({"random_start": "no"}, "random_start must be True or False, got 'no'"),
    ({"random_start": 0}, "random_start must be True or False, got 0"),
    ({"ids": [1, 2]}, "ids must be integers [4], one for each image, got int64 [2]"),
    ({"ids": torch.full((4,), 0.5)}, "ids must be integers [4], one for each image, got float32 [4]"),
]


@pytest.mark.parametrize(("settings", "line"), BAD_SETTINGS, ids=[str(settings) for settings, _ in BAD_SETTINGS])
def test_settings_that_are_none(settings: dict[str, Any], line: str) -> None:
    refused(line, **settings)


def test_an_empty_batch_is_attacked_without_a_pass() -> None:
    found = fd.pgd(Net(lambda z: pytest.fail("called")), images()[:0], [], **KEY)
    assert found.shape == (0, 3, SIDE, SIDE)
    refused("y must have a label for each image, got 4 for 0 images", x=images()[:0])


# -- models --------------------------------------------------------------------------------------------------------


class ModelOutput(dict):
    """As transformers' `ImageClassifierOutput`: a dictionary whose keys are attributes."""

    __getattr__ = dict.__getitem__


@dataclass
class Output:
    logits: Tensor
    hidden_states: None = None


LOGITS_IN: dict[str, Callable[[Tensor], Any]] = {
    "a ModelOutput": lambda z: ModelOutput(loss=None, logits=z),
    "a dict": lambda z: {"logits": z},
    "a dataclass": Output,
    "a namespace": lambda z: SimpleNamespace(logits=z),
}


@pytest.mark.parametrize("case", LOGITS_IN)
def test_logits_inside_of_an_output(case: str) -> None:
    found = fd.pgd(Net(LOGITS_IN[case]), images(), Y, **KEY, restarts=2)
    assert torch.equal(found, fd.pgd(Net(), images(), Y, **KEY, restarts=2))


NO_GRADIENT = (
    "model: its logits do not depend on the pixels by any gradient; look for no_grad, detach, argmax or numpy in its "
    "forward"
)
WRAP = "; wrap it in a module that does"
BAD_OUTPUTS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "a tuple": (lambda z: (z, None), f"model must return logits [B, classes], got tuple{WRAP}"),
    "None": (lambda z: None, f"model must return logits [B, classes], got NoneType{WRAP}"),
    "numpy": (lambda z: z.detach().numpy(), f"model must return logits [B, classes], got ndarray{WRAP}"),
    "features in a dict": (lambda z: {"x": z}, f"model must return logits [B, classes], got dict{WRAP}"),
    "a map": (lambda z: z[:, :, None, None], "model must return logits [4, classes], got float32 [4, 4, 1, 1]"),
    "one loss": (lambda z: z.sum(), "model must return logits [4, classes], got float32 []"),
    "classes": (lambda z: z.argmax(1), "model must return logits [4, classes], got int64 [4]"),
    "a mean": (lambda z: z.mean(0)[None], "model must return logits [4, classes], got float32 [1, 4]"),
    "one logit": (lambda z: z[:, :1], "model must return at least 2 logits for this loss, got 1"),
    "detached": (lambda z: z.detach(), NO_GRADIENT),
    "constants": (lambda z: torch.ones(4, 4), NO_GRADIENT),
    "one-hot answers": (lambda z: F.one_hot(z.argmax(1), 4).float(), NO_GRADIENT),
    "NaN": (lambda z: z * float("nan"), "model: the gradient of the loss is not finite at 4 of 4 images"),
    "NaN at one image": (
        lambda z: z * torch.tensor([1, 1, 1, float("nan")])[:, None],
        "model: the gradient of the loss is not finite at 1 of 4 images",
    ),
}  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", BAD_OUTPUTS)
def test_models_that_return_something_else(case: str, training: bool) -> None:
    change, line = BAD_OUTPUTS[case]
    refused(line, Net(change).train(training))


def test_too_few_classes_for_a_loss() -> None:
    least = "model must return at least {} logits for this loss, got {}"
    refused(least.format(3, 2), Net(outputs=2), y=[0, 1, 0, 1], loss="dlr")
    refused(least.format(2, 1), Net(outputs=1), y=[0, 0, 0, 0])
    line = "y must be labels below 2, one for each of the model's 2 outputs, got 3; labels count from 0"
    refused(line, Net(outputs=2), loss="margin")


def test_a_gradient_of_zero_is_said() -> None:
    """Not refused: a head that begins at zero has none at its first step."""
    model = Net()
    nn.init.zeros_(model.last.weight)
    words = r"^the gradient of the loss is zero at all 4 images, so that no step moves; look for detach, round or a "
    with pytest.warns(UserWarning, match=words):
        found = fd.pgd(model, images(), Y, **KEY)
    assert torch.equal(found, fd.pgd(Net(), images(), Y, **(KEY | {"steps": 0})))
    with pytest.warns(UserWarning, match=words):
        fd.pgd(Net(lambda z: (z * 9).round() + 0 * z), images(), Y, **KEY)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_gradient_that_is_not_finite_is_refused_in_either_norm(norm: str) -> None:
    """torch.sign(NaN) is 0 or NaN, depending on the device; the logits themselves are finite."""
    infinite = Net(lambda z: z + (z - z.detach()).abs().sqrt())
    refused("model: the gradient of the loss is not finite at 4 of 4 images", infinite, norm=norm)


def no_grad_inside() -> nn.Module:
    net = Net()
    net.forward = torch.no_grad()(net.forward)  # type: ignore[method-assign]
    return net


MODELS: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "a function": (lambda: lambda x: x, {}, "model must be a torch.nn.Module, got function"),
    "a path": (lambda: "adapter/", {}, "model must be a torch.nn.Module, got str"),
    "under no_grad": (no_grad_inside, {}, NO_GRADIENT),
    "on another device": (lambda: Net().to("meta"), {}, "model has no weights, as it was made on the device meta"),
    "float64": (
        lambda: Net().double(),
        {},
        "x is float32, the model's parameters are float64; write model.to(torch.float32), or cast in the model",
    ),
    "bfloat16": (
        lambda: Net().bfloat16(),
        {},
        "x is float32, the model's parameters are bfloat16; write model.to(torch.float32), or cast in the model",
    ),
    "float32 for float64 images": (
        Net,
        {"x": images(dtype=torch.float64)},
        "x is float64, the model's parameters are float32; write model.to(torch.float64), or cast in the model",
    ),
    "images of another size than timm's": (
        tiny,
        {"x": images(side=24)},
        "model does not take x [4, 3, 24, 24]: Input height (24) doesn't match model (16); resize the images to 16 "
        "pixels, or build the model with image_size=24 (timm's img_size)",
    ),
}


@pytest.mark.parametrize("case", [case for case in MODELS if case != "on another device"])
def test_models_that_do_not_take_the_images(case: str) -> None:
    make, more, line = MODELS[case]
    refused(line, make(), **more)


def test_a_model_that_torch_says_does_not_take_the_images() -> None:
    with pytest.raises(RuntimeError, match="4x192 and 768x8") as torch_s:
        Net()(images(side=8))
    refused(f"model does not take x [4, 3, 8, 8]: {torch_s.value}", x=images(side=8))


def test_a_model_without_weights() -> None:
    make, _, line = MODELS["on another device"]
    with pytest.raises(UserError) as refusal:
        fd.pgd(make(), images(), Y, **KEY)
    assert str(refusal.value) == line


class Broken(ArithmeticError):
    pass


def test_a_model_s_own_errors_come_through() -> None:
    """As they are, where they have a type of their own: that of a full GPU is caught by its type."""
    for error in (Broken("on purpose"), torch.OutOfMemoryError("full"), NotImplementedError("later")):

        def fail(z: Tensor, error: Exception = error) -> Tensor:
            raise error

        with pytest.raises(type(error)) as raised:
            fd.pgd(Net(fail), images(), Y, **KEY)
        assert raised.value is error


def test_images_that_are_in_a_graph() -> None:
    """Leaves and others; their gradients and the graph stay as they were."""
    expected = fd.pgd(Net(), images(), Y, **KEY)
    leaf = images().requires_grad_()
    assert torch.equal(fd.pgd(Net(), leaf, Y, **KEY), expected)
    assert leaf.grad is None
    computed = leaf * 1
    found = fd.pgd(Net(), computed, Y, **KEY)
    assert torch.equal(found, expected)
    assert not found.requires_grad
    computed.sum().backward()
    assert torch.equal(leaf.grad, torch.ones_like(leaf))


def test_an_adapted_model_in_float64_images() -> None:
    """It casts them itself, so that the ball is exact while the model computes in fp32."""
    model, x = stir(tiny()).eval(), images(dtype=torch.float64)
    found = fd.pgd(model, x, Y, **KEY)
    assert (found.dtype, (found - x).abs().max().item()) == (torch.float64, pytest.approx(EPS, abs=1e-15))
