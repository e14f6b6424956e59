"""The methods in a loop of one's own: `LocalEngine` against the loop in plain PyTorch of test_parity."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from cases import BATCH, CLASSES, OPTIM, RECIPES, SIDE, UPDATES, batches, build_data, build_method, build_model
from plain_loop import Result, plain_training
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

import fulllora_dist as fd
from fulllora_dist.core.errors import UserError
from fulllora_dist.distributed.comm import Comm
from fulllora_dist.distributed.schedule import learning_rate
from tests.ranks import RankServer

NO_GRADIENT = "qkv.lnlora.k.norm.bias"  # softmax does not see it: Adam makes rounding large
KEYS = ("images", "labels", "ids")
METHODS = [name for name in RECIPES if name != "phases"]


def local(model: nn.Module, wrapped: nn.Module, accumulation: int) -> fd.LocalEngine:
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if (p.ndim > 1) == matrix], "weight_decay": OPTIM.weight_decay * matrix}
        for matrix in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=OPTIM.betas)
    scheduler = LambdaLR(optimizer, lambda update: learning_rate(update, UPDATES, OPTIM))
    return fd.LocalEngine(
        wrapped, optimizer, scheduler=scheduler, grad_clip=OPTIM.grad_clip, accumulation_steps=accumulation
    )


def _trained(comm: Comm, accumulation: int) -> dict[str, dict[str, Tensor]]:
    """What each method makes of the adapter, in six updates."""
    found = {}
    for name in METHODS:
        model = build_model().train()
        engine = local(model, DistributedDataParallel(model) if comm.world > 1 else model, accumulation)
        method = build_method(name)
        for step, batch in enumerate(build_data(name)):
            part = batch.split(comm.world)[comm.rank]
            method.step(engine, fd.Batch.of(part.pixels(), part.labels, part.ids), step)
        assert engine.skipped == 0
        found[name] = {key: tensor.detach().clone() for key, tensor in model.trainable().items()}
    return found


@pytest.fixture(scope="module")
def plain() -> dict[str, list[Result]]:
    """The loop in plain PyTorch, on whole batches and on halves: by so much does rounding change it."""
    return {
        name: [plain_training(build_model(), name, build_data(name), parts) for parts in (1, 2)] for name in METHODS
    }


@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (1, 2), (2, 1)])
def test_the_numbers_are_those_of_plain_pytorch(
    server: RankServer, plain: dict[str, list[Result]], world: int, accumulation: int
) -> None:
    """To 1e-6, or ten times what splitting the batch changes in the plain loop itself, as test_parity for runs."""
    for found in server.run(world, _trained, accumulation):
        for name, tensors in found.items():
            whole, halves = (result.parameters for result in plain[name])
            split = {key: float((halves[key] - whole[key]).abs().max()) for key in whole}
            idle = max(value for key, value in split.items() if key.endswith(NO_GRADIENT))
            for key, tensor in tensors.items():
                tolerance = max(1e-6, 10 * (idle if key.endswith(NO_GRADIENT) else split[key]))
                assert float((tensor - whole[key]).abs().max()) <= tolerance, (name, key)
                assert tolerance < 1e-3 or key.endswith(NO_GRADIENT), (name, key)


def setup(**settings: Any) -> tuple[fd.AdaptedModel, fd.LocalEngine]:
    model = build_model().train()
    return model, fd.LocalEngine(model, torch.optim.SGD(model.trainable().values(), lr=0.1), **settings)


def test_an_update_that_is_not_finite_is_skipped() -> None:
    model, engine = setup()
    before = {name: tensor.clone() for name, tensor in model.trainable().items()}
    for _ in engine.accumulate(batches(1)[0]):
        engine.backward(engine(batches(1)[0].pixels()).sum() * float("nan"))
    assert engine.skipped == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.trainable().items())


@pytest.fixture
def accelerator() -> Iterator[Callable[..., Accelerator]]:
    """Accelerators, whose state is of the whole process."""
    yield lambda **settings: Accelerator(cpu=True, **settings)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_accelerate_changes_nothing(accelerator: Callable[..., Accelerator]) -> None:
    """Bit for bit, loader, optimizer, scheduler and accumulation included."""
    found = []
    for accelerated in (False, True):
        model = build_model().train()
        optimizer = torch.optim.AdamW(model.trainable().values(), lr=1e-2)
        scheduler = LambdaLR(optimizer, lambda update: 1 / (1 + update))
        loader: Any = DataLoader(
            TensorDataset(*(torch.cat([getattr(b, key) for b in batches(3)]) for key in KEYS)), BATCH
        )
        settings: dict[str, Any] = {"grad_clip": 0.1, "accumulation_steps": 2}
        wrapped: Any = model
        if accelerated:
            one = accelerator()
            wrapped, optimizer, scheduler, loader = one.prepare(model, optimizer, scheduler, loader)
            settings["backward"] = one.backward
        engine = fd.LocalEngine(wrapped, optimizer, scheduler=scheduler, **settings)
        for step, (x, y, ids) in enumerate(loader):
            build_method("pgd").step(engine, fd.Batch.of(x, y, ids), step)
        found.append({name: tensor.detach().clone() for name, tensor in model.trainable().items()})
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())
    start = build_model().trainable()
    assert not all(torch.equal(tensor, start[name]) for name, tensor in found[0].items())


def test_accelerate_s_bf16_holds_for_attacks_too(accelerator: Callable[..., Accelerator]) -> None:
    model = build_model().float().train()
    optimizer = torch.optim.SGD(model.trainable().values(), lr=0.1)
    one = accelerator(mixed_precision="bf16")
    wrapped, optimizer = one.prepare(model, optimizer)
    seen = []
    model.backbone.blocks[0].mlp.fc1.register_forward_hook(lambda *call: seen.append(call[2].dtype))
    x, y = torch.rand(4, 3, SIDE, SIDE), torch.arange(4) % CLASSES
    fd.method("pgd", eps="8/255", steps=2).step(
        fd.LocalEngine(wrapped, optimizer, backward=one.backward), fd.Batch.of(x, y), 0
    )
    assert len(seen) >= 3
    assert set(seen) == {torch.bfloat16}


def test_accelerate_s_fp16_is_refused(accelerator: Callable[..., Accelerator]) -> None:
    model = build_model()
    optimizer = torch.optim.SGD(model.trainable().values(), lr=0.1)
    accelerator()
    scaled = AcceleratedOptimizer(optimizer, scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(
        UserError, match=r"^optimizer: accelerate's fp16 scales the gradients, .*mixed_precision='bf16'"
    ):
        fd.LocalEngine(model, scaled)


def test_mixing_without_a_number_of_classes_is_refused() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, CLASSES))
    engine = fd.LocalEngine(model, torch.optim.SGD(model.parameters(), lr=0.1))
    batch = fd.Batch.of(torch.rand(4, 3, SIDE, SIDE), [0, 1, 2, 3])
    fd.method("fgsm_rs", eps="8/255").step(engine, batch, 0)
    with pytest.raises(UserError, match=r"^targets: mixing needs the number of the model's outputs; set model.num_c"):
        fd.method("fgsm_rs", eps="8/255", targets={"mixup": 0.8}).step(engine, batch, 0)
    model.num_classes = CLASSES
    fd.method("fgsm_rs", eps="8/255", targets={"mixup": 0.8}).step(engine, batch, 0)


def test_a_short_last_batch_of_free() -> None:
    """Its slots are the first ones, and the others keep their perturbation."""
    _, engine = setup()
    method = fd.method("free", eps="8/255", replays=2)
    x, y = torch.rand(BATCH, 3, SIDE, SIDE), torch.arange(BATCH) % CLASSES
    method.step(engine, fd.Batch.of(x, y), 0)
    kept = method.slot_state()["delta_sign"].clone()
    method.step(engine, fd.Batch.of(x[:3], y[:3]), 1)
    after = method.slot_state()["delta_sign"]
    assert torch.equal(after[3:], kept[3:])
    assert not torch.equal(after[:3], kept[:3])
    with pytest.raises(UserError, match=r"keep the shape of the first one, \[8, 3, 16, 16\], or be shorter, got \[9, "):
        method.step(engine, fd.Batch.of(torch.rand(9, 3, SIDE, SIDE), torch.zeros(9, dtype=torch.int64)), 2)


class Output(nn.Module):
    """A model whose logits are in a dict, as those of `ModelOutput` are."""

    num_classes = CLASSES

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(3 * SIDE * SIDE, CLASSES)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(pixels.flatten(1))}


class Logits(Output):
    def forward(self, pixels: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(pixels)["logits"]


@pytest.mark.parametrize("name", ["standard", "pgd", "n_fgsm", "trades", "mart", "free"])
def test_logits_in_an_output_are_attacked_too(name: str) -> None:
    found = []
    for kind in (Output, Logits):
        model = kind()
        engine = fd.LocalEngine(model, torch.optim.SGD(model.parameters(), lr=0.1))
        for step, batch in enumerate(batches(2)):
            fd.method(name, eps="8/255").step(engine, fd.Batch.of(batch.pixels(), batch.labels), step)
        found.append(model.head.weight.detach())
    assert torch.equal(*found)
    assert not torch.equal(found[0], Output().head.weight)


def one_step(**settings: Any) -> None:
    """Of PGD, on three images and a model without attention."""
    model = Logits()
    engine = fd.LocalEngine(model, torch.optim.SGD(model.parameters(), lr=0.1))
    x = torch.rand(3, 3, SIDE, SIDE)
    fd.method("pgd", eps="8/255", **settings).step(engine, fd.Batch.of(x, [0, 1, 2]), 0)


def test_standard_needs_no_eps() -> None:
    found = []
    for settings in ({}, {"eps": "8/255"}):
        model: Any = Logits()
        engine = fd.LocalEngine(model, torch.optim.SGD(model.parameters(), lr=0.1))
        (batch,) = batches(1)
        fd.method("standard", **settings).step(engine, fd.Batch.of(batch.pixels(), batch.labels), 0)
        found.append(model.head.weight.detach())
    assert torch.equal(*found)
    assert not torch.equal(found[0], Output().head.weight)


GREY = torch.zeros(2, 3, SIDE, SIDE, dtype=torch.uint8)
REFUSED = [
    (lambda: fd.method("pdg", eps=0.1), "method: 'pdg' is unknown; known: "),
    (lambda: fd.method("pgd"), "method pgd: eps must be given, e.g. eps='4/255'"),
    (lambda: fd.method("free", replays=2), "method free: eps must be given, e.g. eps='4/255'"),
    (lambda: fd.LocalEngine(build_model(), []), "optimizer must be a torch.optim.Optimizer, got list"),
    (lambda: fd.method("pgd", eps=8), "eps: 8 is outside [0, 1], the range of a pixel; for 8 of 255 grey levels write"),
    (lambda: fd.method("pgd", eps=0.1, beta=6), "method pgd: unknown setting beta; known: steps, step_size, "),
    (lambda: fd.method("pgd", eps=0.1, num_steps=6), "method pgd: unknown setting num_steps; did you mean steps?"),
    (lambda: fd.method("pgd", eps=0.1, steps=0), "method pgd: steps: Input should be greater than or equal to 1 (got"),
    (lambda: fd.method("pgd", eps=0.1, norm="l3"), "norm: 'l3' is unknown; known: linf, l2"),
    (lambda: fd.method("pgd", eps=0.1, targets={"mixup": -1}), "targets: mixup: Input should be greater than or equal"),
    (lambda: fd.method("pgd", eps=0.1, attention_drop=0.5), "total_steps: attention_drop is a fraction of the whole"),
    (
        lambda: fd.method("pgd", eps=0.1, perturbation_mask=0.5, total_steps=9),
        "mask_patch: must be set with perturbation_mask, to the side of the model's patches in pixels",
    ),
    (lambda: fd.LocalEngine(build_model(), torch.optim.SGD([torch.zeros(1)])), "optimizer: none of the model's"),
    (lambda: setup(accumulation_steps=0), "accumulation_steps must be an integer >= 1, got 0"),
    (lambda: next(setup(accumulation_steps=3)[1].accumulate(batches(1)[0])), "accumulation_steps: 3 does not divide a"),
    (lambda: fd.Batch.of(torch.rand(2, 3, 4, 4) * 3 - 1, [0, 1]), "x must be in [0, 1], got "),
    (lambda: fd.Batch.of(torch.rand(2, 3, 4, 4), [0]), "y must have a label for each image, got 1 for 2 images"),
    (lambda: fd.Batch.of([1, 2], [0, 1]), "x must be a tensor [B, C, H, W], got list"),
    (lambda: fd.Batch.of(GREY, [0, -100]), "y must be labels >= 0, got -100"),
    (
        lambda: fd.Batch.of(GREY.permute(0, 2, 3, 1), [0, 1]),
        "x must be [B, C, H, W], got [2, 16, 16, 3], channels last",
    ),
    (
        lambda: fd.method("mart", eps=0.1, targets={"cutmix": 1}),
        "targets: mart needs one label per image; remove mixup",
    ),
    (lambda: one_step(targets={"mixup": 0.8}), "targets: mixing needs an even number of images, got 3; set drop_last="),
    (
        lambda: one_step(attention_drop=1.0, total_steps=9),
        "attention_drop: the model has no modules named attn; set it",
    ),
    (
        lambda: one_step(perturbation_mask=1.0, total_steps=9, mask_patch=5),
        "mask_patch: 5 does not divide images of 16 x 16 pixels",
    ),
]


@pytest.mark.parametrize(("call", "line"), REFUSED)
def test_a_mistake_is_one_line(call: Any, line: str) -> None:
    with pytest.raises(UserError) as error:
        call()
    assert str(error.value).startswith(line)
    assert "\n" not in str(error.value)
