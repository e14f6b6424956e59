"""The parts of `gpu_check.py`: what each measures or compares, on the GPU or else on the CPU.

Each hands its figures to `put(name, **figures)` as soon as it knows them. Imports are within, as one that is missing
is to fail its part alone.
"""

import gc
import importlib.util
import statistics
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fulllora_dist.core.errors import UserError
from fulllora_dist.models.precision import convolve_in_full_fp32

ROUNDS = 5
# of zero: AdamW takes the first gradients by their sign, so that the rounding of those near zero counts in full, and on
# a GPU each backward pass rounds differently; an error in a stage makes about 1
TOLERANCE = {"zero": 0.05, "bf16": 0.1, "compile": 1e-3}
convolve_in_full_fp32()  # as in a run

Put = Callable[..., None]


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(work: Callable[[], object], rounds: int = ROUNDS, warm: int = 2) -> list[float]:
    """By the clock, of each round after the warm ones."""
    taken = []
    for _ in range(warm + rounds):
        wait()
        begin = time.perf_counter()
        work()
        wait()
        taken.append(time.perf_counter() - begin)
    return taken[warm:]


def attempt(put: Put, name: str, work: Callable[[], None], **more: Any) -> None:
    """Run `work`; what goes wrong is recorded."""
    try:
        work()
    except Exception as error:
        if not isinstance(error, UserError | ImportError):
            traceback.print_exc()
        put(name, **more, error=f"{type(error).__name__}: {error}".splitlines()[0])


def machine(put: Put) -> None:
    import timm

    versions = {"torch": torch.__version__, "timm": timm.__version__, "cuda": torch.version.cuda}
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    put("machine", device=name, **versions, deepspeed=importlib.util.find_spec("deepspeed") is not None)


def matmul(put: Put) -> None:
    size = 8192 if torch.cuda.is_available() else 256
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        a, b = (torch.randn(size, size, device=device(), dtype=dtype) for _ in range(2))
        median = statistics.median(seconds(partial(torch.matmul, a, b), rounds=20))
        put(name, tflops=2 * size**3 / median / 1e12, size=size)


def step(put: Put, row: str, arms: list[str], compiled: bool) -> None:
    """Each arm alone in memory."""
    from benchmark_step import CLASSES, Row, arm

    from fulllora_dist.data.batch import Batch
    from fulllora_dist.models.flops import OperationFlops

    size = Row.parse(row)
    pixels = torch.randint(0, 256, (size.batch, 3, size.image_size, size.image_size), dtype=torch.uint8)
    ids = torch.arange(size.batch)
    batch = Batch(pixels, ids % CLASSES, ids, torch.ones(size.batch, dtype=torch.bool)).to(device())

    def measure(name: str) -> None:
        work = arm(name + "_compiled" * compiled, size, "bf16", 1, batch)
        with OperationFlops() as operations, torch.compiler.set_stance("force_eager"):
            work()
        seconds(work, rounds=1)
        peak = {}
        if torch.cuda.is_available():
            gc.collect()
            torch.cuda.reset_peak_memory_stats()
        taken = seconds(work, warm=0)
        if torch.cuda.is_available():
            peak = {"peak_gib": torch.cuda.max_memory_allocated() / 2**30}
        median = statistics.median(taken)
        put(
            name, row=row, compiled=compiled, seconds=median, spread=[min(taken), max(taken)],
            images_per_second=size.batch / median, tflops=operations.flops / median / 1e12, **peak,
        )  # fmt: skip

    for name in arms:
        attempt(put, name, partial(measure, name), row=row, compiled=compiled)
        gc.collect()
        torch.cuda.empty_cache()


def nccl(put: Put) -> None:
    import torch.distributed as dist

    from fulllora_dist.distributed.comm import start_comm

    comm = start_comm(timeout_minutes=1)
    numbers = torch.randn(16 << 20, device=comm.device)  # 64 MiB of gradients
    before = numbers.clone()
    taken = statistics.median(seconds(partial(dist.all_reduce, numbers)))
    same = bool((numbers == before).all()) and comm.max_each([3.0]) == [3.0]
    put("one rank", backend=dist.get_backend(), all_reduce_ms=1000 * taken, ok=same)


def zero(put: Put) -> None:
    from fulllora_dist.data.batch import Batch
    from fulllora_dist.distributed.comm import start_comm
    from fulllora_dist.distributed.engine import Engine
    from fulllora_dist.distributed.settings import DistributedSettings, OptimSettings
    from fulllora_dist.methods.own_loop import LocalEngine, method

    updates, size, rate = 4, 8, 1e-3
    comm = start_comm(timeout_minutes=1)
    generator = torch.Generator().manual_seed(0)
    batches = [
        Batch(
            torch.randint(0, 256, (size, 3, 32, 32), dtype=torch.uint8, generator=generator),
            torch.randint(0, 10, (size,), generator=generator),
            torch.arange(i * size, (i + 1) * size),
            torch.ones(size, dtype=torch.bool),
        ).to(comm.device)
        for i in range(updates)
    ]
    pgd = method("pgd", eps="8/255", steps=2)
    start = {name: t.detach().clone() for name, t in small_model().trainable().items()}
    model = small_model().to(comm.device).train()
    optimizer = torch.optim.AdamW(model.trainable().values(), lr=rate, weight_decay=0)
    local = LocalEngine(model, optimizer, grad_clip=1.0)
    for number, batch in enumerate(batches):
        pgd.step(local, batch, number)
    plain = {name: t.detach().cpu() for name, t in model.trainable().items()}
    moved = largest_difference(plain, start)

    def against(stage: Any) -> None:
        optim = OptimSettings(lr=rate, min_lr=rate, warmup_ratio=0, batch_size=size, epochs=1)
        extra = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if stage == 3 else {}
        engine = Engine(small_model(), optim, DistributedSettings(zero_stage=stage), extra, comm, updates)
        for number, batch in enumerate(batches):
            pgd.step(engine, batch, number)
        state = engine.state()
        assert state is not None
        found = largest_difference({name: t.cpu() for name, t in state.tensors["master"].items()}, plain) / moved
        put(f"ZeRO-{stage}", difference=found, ok=found < TOLERANCE["zero"])

    for stage in range(4):
        attempt(put, f"ZeRO-{stage}", partial(against, stage))


def bf16(put: Put, row: str) -> None:
    exact, rounded = (gradient_and_logits(row, precision) for precision in ("fp32", "bf16"))
    logits = ((exact[1] - rounded[1]).norm() / exact[1].norm()).item()
    cosine = torch.cosine_similarity(exact[0].flatten(), rounded[0].flatten(), dim=0).item()
    ok = logits < TOLERANCE["bf16"] and cosine > 1 - TOLERANCE["bf16"]
    put("bf16 against fp32", difference=logits, gradient_cosine=cosine, ok=ok)


def compile_(put: Put, row: str) -> None:
    from torch._dynamo.utils import counters

    from fulllora_dist.models.compiled import compile_blocks, why_not_compiled

    reason = why_not_compiled(device())
    if reason is not None:
        raise UserError(reason)
    exact = gradient_and_logits(row, "fp32")
    begin = time.perf_counter()
    found = gradient_and_logits(row, "fp32", compile_blocks)
    took = time.perf_counter() - begin
    difference = max(((a - b).norm() / a.norm()).item() for a, b in zip(exact, found, strict=True))
    frames, breaks = counters["frames"]["ok"], sum(counters["graph_break"].values())
    ok = difference < TOLERANCE["compile"] and frames == 1 and not breaks
    put("compiled attack pass", difference=difference, seconds=took, frames=frames, graph_breaks=breaks, ok=ok)


def small_model() -> Any:
    from fulllora_dist.models.adapt import create_model

    kwargs = {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
    torch.manual_seed(0)
    model = create_model(
        "vit_tiny_patch16_224", pretrained=False, image_size=32, num_classes=10, rank=2, model_kwargs=kwargs, seed=0
    )
    for name, parameter in model.trainable().items():
        if name.endswith(".B"):
            torch.nn.init.normal_(parameter, 0, 0.1)
    return model


def gradient_and_logits(row: str, precision: str, prepare: Callable[..., None] | None = None) -> tuple[Tensor, Tensor]:
    """Of FullLoRA on the same images, in fp32 on the CPU."""
    from benchmark_step import Row, full_lora

    from fulllora_dist.attacks.pgd import attack_mode, cross_entropy, input_gradient

    size = Row.parse(row)
    torch.manual_seed(0)
    model = full_lora(size, precision).to(device())
    for name, parameter in model.trainable().items():
        if name.endswith(".B"):
            torch.nn.init.normal_(parameter, 0, 0.02)
    if prepare is not None:
        prepare(model)
    pixels = torch.rand(8, 3, size.image_size, size.image_size, generator=torch.Generator().manual_seed(1)).to(device())
    kept = []

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        kept.append(logits.detach())
        return cross_entropy(logits, labels)

    with attack_mode(model):
        gradient = input_gradient(model, pixels, torch.arange(8, device=device()), loss)
    return gradient.float().cpu(), kept[0].float().cpu()


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)
