"""Floating-point operations of a training, counted on its own model and methods."""

from fulllora_dist.config.schema import Config
from fulllora_dist.models.flops import pass_cost
from fulllora_dist.training.run import on_meta


def training_work(config: Config, images: int) -> dict[str, int]:
    """{"batches", "updates", "flops"} of a whole training, attack and weight steps.

    Args:
        config: of the training; the model's weights are not read.
        images: in the training data.
    """
    model, phases = on_meta(config, images)
    total = 0
    for phase in phases.phases:
        size = phase.image_size or model.info.image_size
        attack = pass_cost(model, size, attack=True)
        step = pass_cost(model, size, pixels=phase.method.moves_pixels)
        total += config.optim.batch_size * (phase.end - phase.first) * phase.method.flops(attack, step)
    return {"batches": phases.total_steps, "updates": phases.total_updates, "flops": total}
