"""Modes of torch around a call, and wrappers around a model.

The numbers are those without, and the report says what was computed in.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from plain_pgd import plain_pgd
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fulllora_dist as fd
from fulllora_dist.core.errors import UserError
from fulllora_dist.data.loader import EvalStream
from fulllora_dist.data.shards.make import make_shards
from fulllora_dist.data.transforms import EvalTransform
from fulllora_dist.distributed.comm import Comm
from tests.ranks import RankServer
from tests.tiny import CLASSES, SIDE, images, stir, tiny

EPS, STEP = 8 / 255, 3 / 255
KEY: dict[str, Any] = {"eps": EPS, "steps": 3, "step_size": STEP, "restarts": 2}
Y = torch.arange(8) % CLASSES


def autocast() -> Any:
    return torch.autocast("cpu", torch.bfloat16)


@contextmanager
def default_float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def all_at_once() -> Iterator[None]:
    with autocast(), default_float64(), deterministic(), torch.inference_mode():
        yield


MODES: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": autocast,
    "default dtype": default_float64,
    "deterministic": deterministic,
    "all at once": all_at_once,
}


class Watched(nn.Module):
    """A model with the dtypes of its logits, and whether autocast was on."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.seen = model, set()

    def forward(self, x: Tensor) -> Tensor:
        logits = self.model(x)
        self.seen.add((logits.dtype, torch.is_autocast_enabled("cpu")))
        return logits


def linear() -> nn.Module:
    """Of which autocast makes bf16 logits, as of any module of one's own."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 16), nn.Tanh(), nn.Linear(16, CLASSES))


def adapted() -> nn.Module:
    return stir(tiny()).eval()


@pytest.mark.parametrize("make", [linear, adapted])
@pytest.mark.parametrize("mode", MODES)
def test_an_attack_under_a_mode(mode: str, make: Callable[[], nn.Module]) -> None:
    """Also where images and labels were made under it."""
    model = Watched(make())
    expected = fd.pgd(model, images(8), Y, **KEY)
    with MODES[mode]():
        within = fd.pgd(model, images(8) * 1, Y * 1, **KEY)
        soft = fd.pgd(model, images(8), F.one_hot(Y, CLASSES).float(), **KEY)
    assert torch.equal(within, expected)
    assert torch.equal(fd.pgd(model, images(8), F.one_hot(Y, CLASSES).float(), **KEY), soft)
    assert not within.is_inference()
    assert model.seen == {(torch.float32, False)}


@pytest.mark.parametrize("mode", MODES)
def test_an_attack_under_a_mode_is_plain_pytorch_s(mode: str) -> None:
    model = linear()
    with MODES[mode]():
        found = fd.pgd(model, images(8), Y, eps=EPS, steps=3, step_size=STEP)
    assert (found - plain_pgd(model, images(8), Y, EPS, 3, STEP)).abs().max() <= 1e-7


def test_modes_are_as_before_afterwards() -> None:
    model, returns_rows = adapted(), nn.Sequential(linear(), nn.Flatten(0))
    with autocast(), torch.inference_mode():
        fd.pgd(model, images(8), Y, **KEY)
        assert torch.is_inference_mode_enabled()
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
        with pytest.raises(UserError):
            fd.pgd(returns_rows, images(8), Y, **KEY)
        assert torch.is_inference_mode_enabled()
        assert torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("make", [linear, adapted])
def test_a_model_made_under_inference_mode_is_refused(make: Callable[[], nn.Module]) -> None:
    with torch.inference_mode():
        model = make()
        with pytest.raises(UserError) as refusal:
            fd.pgd(model, images(8), Y, **KEY)
    assert str(refusal.value) == (
        "model: its tensors were made under torch.inference_mode, and gradients cannot pass them; create or load it "
        "outside"
    )


# -- wrappers ------------------------------------------------------------------------------------------------------


def test_a_compiled_model() -> None:
    model = linear()
    compiled = torch.compile(model, backend="aot_eager")
    assert (fd.pgd(compiled, images(8), Y, **KEY) - fd.pgd(model, images(8), Y, **KEY)).abs().max() <= 1e-7


def test_a_model_in_data_parallel() -> None:
    model = adapted()
    assert torch.equal(fd.pgd(nn.DataParallel(model), images(8), Y, **KEY), fd.pgd(model, images(8), Y, **KEY))


def _under_ddp(comm: Comm, attacked: bool) -> list[float]:
    """Three steps of adversarial training in plain DDP, each rank on images of its own; a last attack by one alone."""
    model = stir(tiny())
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for k in range(3):
        x, y = images(4, seed=2 * k + comm.rank), Y[:4]
        target = parallel if attacked else model
        x_adv = fd.pgd(target, x, y, eps=EPS, steps=2, step_size=STEP, step=k)
        optimizer.zero_grad()
        F.cross_entropy(parallel(x_adv), y).backward()
        optimizer.step()
    if comm.is_main:
        fd.pgd(parallel, x, y, eps=EPS, steps=2, step_size=STEP)  # waits for nobody
    return [float(p.detach().double().sum()) for p in model.parameters()]


def test_a_model_in_ddp_is_attacked_without_a_collective(rank_server: RankServer) -> None:
    """Training goes on as if the bare module had been attacked."""
    (one, other), (bare, _) = (rank_server.run(2, _under_ddp, attacked) for attacked in (True, False))
    assert one == other == bare


# -- evaluations ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> EvalStream:
    root, folder = tmp_path_factory.mktemp("pictures"), tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    for label in range(CLASSES):
        (root / f"class{label}").mkdir()
        for i in range(5):
            pixels = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / f"class{label}" / f"{i}.png")
    make_shards(root, folder, progress=False)
    return EvalStream(folder, batch_size=10, transform=EvalTransform(size=SIDE, crop_pct=1.0))


def report(model: nn.Module, stream: Any) -> Any:
    return fd.evaluate(model, stream, attacks=("clean", "fgsm", "pgd2"), eps=2 / 255)


@pytest.mark.parametrize("make", [linear, adapted])
@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "autocast", "all at once"])
def test_an_evaluation_under_a_mode(mode: str, make: Callable[[], nn.Module], stream: EvalStream) -> None:
    model = Watched(make())
    expected = report(model, stream)
    with MODES[mode]():
        assert report(model, stream) == expected
    assert model.seen == {(torch.float32, False)}
    assert expected["precision"] == "fp32"
    batches = [(batch.pixels(), batch.labels) for batch in stream]
    with torch.no_grad():
        right = torch.cat([model(x).argmax(1) == y for x, y in batches])
    assert expected["attacks"]["clean"]["correct"] == right.int().tolist()


class Cast(nn.Module):
    """A model of one's own that keeps fp32 and says itself what it computes in."""

    def __init__(self, dtype: torch.dtype, back: bool):
        super().__init__()
        self.model, self.dtype, self.back = linear(), dtype, back

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", self.dtype):
            logits = self.model(x)
        return logits.float() if self.back else logits


PRECISIONS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "fp32": (linear, "fp32"),
    "adapted": (adapted, "fp32"),
    "adapted, of bf16": (lambda: stir(tiny(precision="bf16")), "bf16"),
    "adapted, cast by hand": (lambda: adapted().bfloat16(), "bf16"),
    "adapted, of float64": (lambda: adapted().double(), "fp64"),
    "autocast in its forward": (lambda: Cast(torch.bfloat16, back=False), "bf16"),
    "autocast, but for its logits": (lambda: Cast(torch.bfloat16, back=True), "bf16"),
    "fp16 in its forward": (lambda: Cast(torch.float16, back=True), "fp16"),
}


@pytest.mark.parametrize("case", PRECISIONS)
def test_a_report_says_what_the_model_computes_in(case: str, stream: EvalStream) -> None:
    make, precision = PRECISIONS[case]
    found = report(make(), stream)
    assert found["precision"] == precision
    warned = [line for line in found["warnings"] if line.startswith("precision: ")]
    line = f"precision: computed in {precision}; a figure to report is computed in fp32"
    assert warned == ([] if precision in ("fp32", "fp64") else [line])


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_a_wrapped_model_is_evaluated_as_the_bare_one(
    wrap: Callable[[nn.Module], nn.Module], stream: EvalStream
) -> None:
    model = adapted()
    found, bare = (fd.evaluate(m, stream, attacks=("clean",)) for m in (wrap(model), model))
    assert found == bare
    assert found["backbone"] == "vit_tiny_patch16_224"


def test_an_evaluation_takes_logits_out_of_outputs(stream: EvalStream) -> None:
    class Output(nn.Module):
        def __init__(self, key: str):
            super().__init__()
            self.model, self.key = linear(), key

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {self.key: self.model(x)}

    assert report(Output("logits"), stream)["attacks"] == report(linear(), stream)["attacks"]
    with pytest.raises(UserError) as refusal:
        report(Output("scores"), stream)
    assert str(refusal.value) == "model must return logits [B, classes], got dict; wrap it in a module that does"


@pytest.mark.parametrize("change", [lambda z: z.double(), lambda z: z.bfloat16()])
def test_an_evaluation_refuses_a_model_of_another_dtype(
    change: Callable[[nn.Module], nn.Module], stream: EvalStream
) -> None:
    model = change(linear())
    with pytest.raises(UserError) as refusal:
        report(model, stream)
    theirs = str(next(model.parameters()).dtype).removeprefix("torch.")
    assert str(refusal.value) == (
        f"x is float32, the model's parameters are {theirs}; write model.to(torch.float32), or cast in the model"
    )
