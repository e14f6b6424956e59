"""The provenance of an adapter: how it was trained, for adapter.json."""

from typing import Any

from fulllora_dist.config.schema import Config
from fulllora_dist.data.index import Index
from fulllora_dist.registry.registry import data_name
from fulllora_dist.training.trainer import Trainer


def provenance(config: Config, trainer: Trainer) -> dict[str, Any]:
    """How the adapter was trained up to the current step."""
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
