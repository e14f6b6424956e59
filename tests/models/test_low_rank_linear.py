"""The frozen layer and its branches as one operation: rounding, autocast, what is held and what is computed."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fulllora_dist.attacks.pgd import attack_mode, cross_entropy, input_gradient
from fulllora_dist.models.lnlora import Folding, LNLoRABranch, attach
from tests.tiny import ARCHITECTURE, CLASSES, images, stir, tiny

D_IN, D_OUT, RANK, EPS = 192, 64, 5, 1e-6
ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-9}


def layer_and_input(ratio: float, dtype: torch.dtype) -> tuple[nn.Linear, Tensor]:
    """A layer of the dtype with fp32 branch, and tokens whose mean is `ratio` deviations."""
    torch.manual_seed(0)
    layer, made = nn.Linear(D_IN, D_OUT), LNLoRABranch(D_IN, D_OUT, RANK, 2.0 * RANK, norm=True, eps=EPS)
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    layer = layer.to(dtype).requires_grad_(False)
    attach(layer, made)
    return layer, (torch.randn(2, 50, D_IN) + ratio * torch.randn(2, 50, 1).sign()).to(dtype).requires_grad_()


def formula(layer: nn.Linear, x: Tensor, cotangent: Tensor) -> list[Tensor]:
    """Output and gradients, to x and the branch, of the paper's formula in float64."""
    made = layer.lnlora
    weight, bias = layer.weight.double(), layer.bias.double()
    x = x.detach().double().requires_grad_()
    scale, shift, down, up = wrt = [
        p.detach().double().requires_grad_() for p in (made.norm.weight, made.norm.bias, made.A, made.B)
    ]
    y = F.linear(x, weight, bias) + 2.0 * F.layer_norm(x, (D_IN,), scale, shift, EPS) @ down.T @ up.T
    return [y, *torch.autograd.grad(y, [x, *wrt], cotangent.double())]


def gradients(y: Tensor, layer: nn.Linear, x: Tensor, cotangent: Tensor) -> tuple[Tensor, ...]:
    made = layer.lnlora
    return torch.autograd.grad(y, [x, made.norm.weight, made.norm.bias, made.A, made.B], cotangent)


def found(layer: nn.Linear, x: Tensor, cotangent: Tensor) -> list[Tensor]:
    y = layer(x)
    return [y, *gradients(y, layer, x, cotangent)]


@pytest.mark.parametrize("dtype", ROUNDING, ids=["fp32", "bf16"])
@pytest.mark.parametrize("ratio", [0.0, 1.0, 5.0, 30.0])
def test_error_against_float64(ratio: float, dtype: torch.dtype) -> None:
    """A few roundings, times mean / deviation: C takes the mean away up to its own rounding, and E[x^2] - mean^2 loses
    the square of it, in fp32 for any dtype."""
    layer, x = layer_and_input(ratio, dtype)
    cotangent = torch.randn(2, 50, D_OUT).to(dtype)
    bound = 4 * ROUNDING[dtype] * (1 + ratio) + 2 * ROUNDING[torch.float32] * ratio**2
    for ours, exact in zip(found(layer, x, cotangent), formula(layer, x, cotangent), strict=True):
        assert (ours.double() - exact).norm() < bound * exact.norm()


def test_autocast_is_the_same_as_bf16_tensors() -> None:
    layer, x = layer_and_input(1.0, torch.float32)
    cotangent = torch.randn(2, 50, D_OUT).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        inside = found(layer, x, cotangent)
        y = layer(x)
    outside = gradients(y, layer, x, cotangent)
    assert inside[0].dtype == torch.bfloat16
    assert {gradient.dtype for gradient in inside[1:]} == {torch.float32}
    by_hand, x_hand = layer_and_input(1.0, torch.bfloat16)
    for ours, theirs in zip(inside, found(by_hand, x_hand, cotangent), strict=True):
        assert torch.equal(ours, theirs.to(ours.dtype))
    for ours, theirs in zip(inside[1:], outside, strict=True):
        assert torch.equal(ours, theirs)


def test_what_an_attack_holds_is_dropped_behind_it() -> None:
    model, x, y = stir(tiny()), images(), torch.arange(4)
    foldings = [module for module in model.modules() if isinstance(module, Folding)]
    calls: Counter[str] = Counter()
    for folding in foldings:
        fold = folding.fold
        folding.fold = lambda dtype, fold=fold: (calls.update(["fold"]), fold(dtype))[1]  # type: ignore[method-assign]

    def gradient(times: int = 1) -> Tensor:
        with attack_mode(model):
            for _ in range(times):
                last = input_gradient(model, x, y, cross_entropy)
        return last

    gradient()
    once = calls.total()
    assert gradient(times=3).isfinite().all()
    assert calls.total() == 2 * once
    other = {name: p.detach() + 0.1 for name, p in model.trainable().items()}
    model.load_trainable(other)
    fresh = tiny()
    fresh.load_trainable(other)
    with attack_mode(fresh):
        expected = input_gradient(fresh, x, y, cross_entropy)
    assert torch.equal(gradient(), expected)
    with pytest.raises(IndexError), attack_mode(model):
        input_gradient(model, x, y + CLASSES, cross_entropy)
    assert all(folding._held is None for folding in foldings)


class Counted(TorchDispatchMode):
    """Counts operations that compute something: views are free."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def of_a_block(finetune: str, attack: bool) -> Counter[str]:
    """Operations of one more block, in an attack pass after the first, or in a weight step."""
    counts = []
    for depth in (1, 2):
        with torch.device("meta"):
            model = tiny(finetune=finetune, model_kwargs={**ARCHITECTURE, "depth": depth}, head="trained")
            x, y = torch.empty(4, 3, 16, 16), torch.zeros(4, dtype=torch.long)
        if attack:
            with attack_mode(model):
                input_gradient(model, x, y, cross_entropy)
                with Counted() as counted:
                    input_gradient(model, x, y, cross_entropy)
        else:
            with Counted() as counted:
                cross_entropy(model(x), y).backward()
        counts.append(counted.calls)
    return counts[1] - counts[0]


def products(count: Counter[str]) -> int:
    return sum(count[name] for name in ("mm", "addmm", "addmm_", "mv", "bmm"))


def test_an_attack_computes_nothing_for_parameters() -> None:
    """A block has four layers and six branches, those of q, k and v on one layer."""
    frozen, ours = of_a_block("layernorm", attack=True), of_a_block("fulllora", attack=True)
    added = ours - frozen
    assert products(added) == (4 + 6) + (6 + 4)
    assert added.total() <= 112
    weight_step = of_a_block("fulllora", attack=False)
    assert products(weight_step - ours) == 6 + 4  # those of B, and of A for q, k and v together
