"""The result of training: the adapter's tensors and their provenance."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fulllora_dist.config.schema import Config
from fulllora_dist.data.index import Index
from fulllora_dist.models.adapted_model import AdaptedModel
from fulllora_dist.registry.registry import data_name
from fulllora_dist.training.guard import Guard
from fulllora_dist.training.trainer import Trainer


@dataclass(frozen=True)
class BestCheckpoint:
    """The checkpoint with the highest robust accuracy on held-out images.

    Attributes:
        step: batches trained on.
        training: how it was trained, for adapter.json; `updates` and `rollbacks` are in the checkpoint itself.
        comparison: one line that compares the best and the last checkpoint.
    """

    step: int
    training: Mapping[str, Any]
    comparison: str


@dataclass(frozen=True)
class TrainingSummary:
    """The result of a finished training.

    Attributes:
        model: the trained model.
        tensors: the adapter to ship, {timm name: fp32, full shape, host}.
        step: batches trained on.
        training: how it was trained, for adapter.json.
        best: None without held-out images.
    """

    model: AdaptedModel
    tensors: Mapping[str, Tensor]
    step: int
    training: Mapping[str, Any]
    best: BestCheckpoint | None


def summarize(config: Config, trainer: Trainer) -> TrainingSummary:
    """Summarize the training at its current step. A collective."""
    training = _provenance(config, trainer)
    best = None
    if trainer.guard is not None and trainer.guard.best is not None:
        step = trainer.guard.best["step"]
        then = {"batches": step, "made": trainer.phases.made(step), "held_out": trainer.guard.best}
        best = BestCheckpoint(step, training | then, _best_and_last(trainer.guard))
    return TrainingSummary(trainer.engine.model, trainer.engine.adapter(), trainer.step, training, best)


def _best_and_last(guard: Guard) -> str:
    why = "catastrophic overfitting" if guard.has_collapsed else "robust overfitting"
    better = f"; adapter_best/ is the more robust one ({why})" if guard.overfitted else ""
    return f"adapter: {guard.describe()}{better}"


def _provenance(config: Config, trainer: Trainer) -> dict[str, Any]:
    return {
        "threat": config.threat.model_dump(mode="json"),
        "method": config.method.model_dump(mode="json"),
        "phases": [phase.model_dump(mode="json") for phase in config.phases],
        "made": trainer.phases.made(trainer.step),
        "targets": config.targets.model_dump(mode="json"),
        "optim": config.optim.model_dump(mode="json"),
        "seed": config.run.seed,
        "batches": trainer.step,
        "updates": trainer.engine.updates,
        "rollbacks": trainer.rollbacks,
        "data": data_record(config, trainer.stream.index),
    }


def data_record(config: Config, train: Index) -> dict[str, Any]:
    """What adapter.json says of the training data."""
    return {
        "name": data_name(config.data.train),
        "index": train.hash,
        "classes": list(train.classes),
        "augment": config.data.augment,
        "crop_pct": config.data.crop_pct,
        "interpolation": config.data.interpolation,
        "decode": config.data.decode,
    }
