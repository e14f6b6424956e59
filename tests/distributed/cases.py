"""A tiny model, its batches, and one training run of the engine: what the tests of this folder vary."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fulllora_dist.data.batch import Batch
from fulllora_dist.data.shards.make import make_shards
from fulllora_dist.distributed.comm import Comm
from fulllora_dist.distributed.engine import Engine
from fulllora_dist.distributed.settings import DistributedSettings, OptimSettings
from fulllora_dist.distributed.zero_state import TrainableState
from fulllora_dist.methods import Method
from fulllora_dist.models.adapt import create_model
from fulllora_dist.models.adapted_model import AdaptedModel
from fulllora_dist.models.settings import Finetune
from fulllora_dist.training.phases import Phases
from tests import recipes
from tests.recipes import SOFT, WEAKENED, Recipe

ARCHITECTURE = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
CLASSES = 4
SIDE = 16
EPS = 8 / 255
SEED = 7
UPDATES = 6
BATCH = 8
# the gradient's norm is above `clip` in some updates and below it in others: test_parity checks that
OPTIM = OptimSettings(
    lr=3e-3, min_lr=3e-4, warmup_ratio=0.34, weight_decay=0.1, grad_clip=2.3, ema_decay=0.8, batch_size=BATCH, epochs=1
)
# ways to train; in the plain loop the first five are written out, the others are `tests.recipes.plain_loss`
RECIPES: dict[str, Recipe] = {
    "standard": {"method": {"name": "standard"}},
    "pgd": {"method": {"name": "pgd", "steps": 2}},
    "free": {"method": {"name": "free", "replays": 2}},
    "fgsm_rs": {"method": {"name": "fgsm_rs"}},
    "n_fgsm": {"method": {"name": "n_fgsm"}},
    "trades": {"method": {"name": "trades", "steps": 2, "start": 0.1}},  # nearer, its first step is rounding
    "mart": {"method": {"name": "mart", "steps": 2}},
    "pgd_l2": {"method": {"name": "pgd", "steps": 2}, "threat": {"norm": "l2", "eps": 0.8}},
    "pgd_mixed": {"method": {"name": "pgd", "steps": 2}, "targets": SOFT},
    "pgd_weakened": {
        "method": {"name": "pgd", "steps": 2, **WEAKENED},
        "threat": {"eps_warmup_ratio": 0.5, "step_size_warmup_ratio": 0.3},
    },
    "phases": {
        "method": {"name": "pgd", "steps": 2},
        "phases": [
            {"fraction": 1 / 3, "image_size": 8, "eps": 0.02, "method": {"name": "pgd", "steps": 1}},
            {"fraction": 1 / 2},  # an interrupted run resumes within it
            {"fraction": 1 / 6, "image_size": 8},
        ],
    },
}
STAGES = (0, 1, 2, 3)
CHECKPOINTING: tuple[Literal["off", "weight_step", "all"], ...] = ("off", "weight_step", "all")


@dataclass(frozen=True, order=True)
class Case:
    method: str
    stage: int
    checkpointing: Literal["off", "weight_step", "all"] = "off"
    accumulation: int = 1
    finetune: Finetune = "fulllora"

    def __str__(self) -> str:
        return f"{self.finetune}-{self.method}-zero{self.stage}-{self.checkpointing}-accumulate{self.accumulation}"


def build_model(depth: int = 2, random_b: bool = True, **settings: Any) -> AdaptedModel:
    """The same weights at every call. With a random B every adapter tensor has a gradient from the first update on."""
    arguments = {"rank": 2, "head": "trained", "num_classes": CLASSES, "seed": 0} | settings
    model = create_model(
        "vit_tiny_patch16_224",
        pretrained=False,
        image_size=SIDE,
        input_sizes=[8],
        model_kwargs=ARCHITECTURE | {"depth": depth},
        **arguments,
    )
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.trainable().items():
        if random_b and name.endswith(".B"):
            with torch.no_grad():
                parameter.normal_(0, 0.1, generator=generator)
    return model


def build_phases(name: str) -> Phases:
    """The recipe over a run of six updates."""
    return recipes.build(RECIPES[name], eps=EPS, seed=SEED, updates=UPDATES)


def build_method(name: str) -> Method:
    """The recipe's method where it has no phases."""
    (phase,) = build_phases(name).phases
    return phase.method


def build_data(name: str) -> list[Batch]:
    """Global batches of the recipe, of the size that each phase asks for."""
    phases = build_phases(name)
    small = [phases.at(step).image_size for step in range(phases.total_steps)]
    return [
        replace(batch, images=batch.images[..., : size or SIDE, : size or SIDE])
        for batch, size in zip(batches(phases.total_steps), small, strict=True)
    ]


def batches(count: int) -> list[Batch]:
    """Global batches."""
    generator = torch.Generator().manual_seed(2)
    return [
        Batch(
            torch.randint(0, 256, (BATCH, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator),
            torch.randint(0, CLASSES, (BATCH,), generator=generator),
            torch.arange(i * BATCH, (i + 1) * BATCH),
            torch.ones(BATCH, dtype=torch.bool),
        )
        for i in range(count)
    ]


def build_engine(
    comm: Comm,
    case: Case,
    model: AdaptedModel | None = None,
    optim: OptimSettings = OPTIM,
    state: TrainableState | None = None,
    extra: dict[str, Any] | None = None,
) -> Engine:
    """At ZeRO-3 every tensor is partitioned: below 1e5 elements DeepSpeed would keep them whole."""
    zero = {"stage3_param_persistence_threshold": 0} if case.stage == 3 else {}
    settings = DistributedSettings(
        zero_stage=case.stage,  # type: ignore[arg-type]
        gradient_accumulation_steps=case.accumulation,
        activation_checkpointing=case.checkpointing,
    )
    block = {"zero_optimization": zero} | (extra or {})
    engine = Engine(model or build_model(), optim, settings, block, comm, UPDATES)
    if state is not None:
        engine.restore(state)
    return engine


def train(comm: Comm, engine: Engine, method: Method | Phases, data: Sequence[Batch]) -> list[float]:
    """Losses, averaged over the ranks."""
    losses = []
    for step, batch in enumerate(data):
        loss = method.step(engine, batch.split(comm.world)[comm.rank], step)["loss"]
        losses.append(comm.sum(loss.double()).item() / comm.world)
    return losses


def state_everywhere(comm: Comm, engine: Engine) -> TrainableState:
    """`Engine.state`, which rank 0 alone has, on every rank."""
    state = engine.state()
    assert (state is not None) == comm.is_main
    updates, skipped = comm.broadcast(state and (state.updates, state.skipped))
    return TrainableState.of_named(comm.broadcast_tensors(state and state.named()), updates, skipped)


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a)


def noise_shards(folder: Path, seed: int, brighter: int = 0, classes: int = 3) -> str:
    """Shards in `folder` of eight noise images of each class, each so many grey levels brighter than the one before.
    Returns where they lie."""
    root, shards = folder / "pictures", folder / "shards"
    rng = np.random.default_rng(seed)
    for label in range(classes):
        (root / f"class{label}").mkdir(parents=True)
        for i in range(8):
            pixels = rng.integers(0, 256 - (classes - 1) * brighter, (16, 16, 3), dtype=np.uint8)
            pixels += np.uint8(label * brighter)
            Image.fromarray(pixels).save(root / f"class{label}" / f"{i}.png")
    make_shards(root, shards, samples_per_shard=9, progress=False)
    return str(shards)
