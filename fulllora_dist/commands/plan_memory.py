"""Memory of a rank, from what was counted: its parts, the largest micro-batch, and the ZeRO stage that it advises."""

import math

from fulllora_dist.commands.plan_counts import Checkpointing, RunCounts
from fulllora_dist.core.errors import UserError

CARDS = (80.0, 141.0)
"""Memory of the GPUs that the tables are for, 10**9 bytes: what they have more is left for CUDA and NCCL."""
PIXEL_COPIES = 3
"""fp32 images a rank holds for each of its micro-batch beside those of the pass: the clean one, the perturbation, and
the perturbed one or its gradient."""


def rank_memory(
    counts: RunCounts, checkpointing: Checkpointing | None = None, stage: int | None = None, micro: int | None = None
) -> dict[str, float]:
    """Bytes of each part at the peak of a step; the settings that are None are the run's.

    Activations and transients are those of the pass that takes most, an attack's or a weight step's: what is alive
    between its forward and backward pass, and at most beyond that. From ZeRO-1 on DeepSpeed holds an fp32 copy of what
    a rank updates, and a bucket of all gradients. What an allocator wastes is not counted: glibc's up to a fifth.
    """
    config, world = counts.config, counts.world
    stage = config.distributed.zero_stage if stage is None else stage
    micro = counts.micro if micro is None else micro
    trainable = counts.model.trainable()
    weights = sum(
        p.numel() * p.element_size() for n, p in counts.model.backbone.named_parameters() if n not in trainable
    )
    adapter = 4 * counts.model.report.trainable
    pixels, saved, peak = 0, 0, 0
    for phase in counts.phases.phases:
        attack, step = counts.costs(phase, checkpointing or counts.checkpointing)
        seen = phase.method.images_in_weight_step
        passes = [(seen * step.peak_bytes, seen * step.saved_bytes)]
        passes += [(attack.peak_bytes, attack.saved_bytes)] if any(phase.method.attack_passes()) else []
        peak, saved = max((peak, saved), *passes)
        pixels = max(pixels, PIXEL_COPIES * 4 * 3 * counts.size(phase) ** 2)
    return {
        "frozen weights": weights / (world if stage == 3 else 1),
        "adapter": adapter / (world if stage == 3 else 1),
        "gradients": adapter * (1 + (stage > 0) / world),
        "optimizer": (2 + (stage > 0)) * adapter / (world if stage >= 1 else 1),
        "average": adapter if config.optim.ema_decay else 0,
        "activations": saved * micro,
        "transients": (peak - saved + pixels) * micro,
    }


def together(memory: dict[str, float]) -> float:
    return sum(memory.values())


def largest_micro_batch(counts: RunCounts, checkpointing: Checkpointing, card_gb: float) -> int:
    """The most images of a micro-batch that fit into a GPU of so many GB; 0 where the model alone does not."""
    fixed = together(rank_memory(counts, checkpointing, micro=0))
    each = together(rank_memory(counts, checkpointing, micro=1)) - fixed
    return max(0, math.floor((card_gb * 1e9 - fixed) / each))


def checkpointing_table(counts: RunCounts, cards: tuple[float, ...]) -> list[str]:
    """A line for each setting of distributed.activation_checkpointing that the model supports."""
    computed = counts.flops("off")
    lines = ["memory a rank, FLOPs that are computed again and largest micro-batch, by activation_checkpointing:"]
    for setting in ("off", "weight_step", "all"):
        try:
            again = 1 - computed / counts.flops(setting)
        except UserError:  # this family cannot
            continue
        gib = together(rank_memory(counts, setting)) / 2**30
        fits = ", ".join(f"{largest_micro_batch(counts, setting, card):,} in {card:g} GB" for card in cards)
        chosen = " (this run)" if setting == counts.checkpointing else ""
        lines.append(f"  {setting + chosen:<22} {gib:6.1f} GiB, {again:4.0%} again; {fits}")
    return lines


def stage_advice(counts: RunCounts, card_gb: float) -> str:
    """Which ZeRO stage fits, and what the next one would save."""
    sizes = [together(rank_memory(counts, stage=stage)) for stage in range(4)]
    gib = [size / 2**30 for size in sizes]
    mine = counts.config.distributed.zero_stage
    trainable = f"{counts.model.report.trainable / 1e6:.1f} M trainable numbers"
    fits = next((stage for stage in range(4) if sizes[stage] <= card_gb * 1e9), None)
    if fits is None:
        return (
            f"ZeRO: no stage fits into {card_gb:g} GB (stage 3 takes {gib[3]:.1f} GiB); take a smaller micro-batch "
            "(distributed.gradient_accumulation_steps) or activation_checkpointing"
        )
    less = [f"{gib[0] - size:.2f}" for size in gib]
    saved = f"of {trainable}, stage 1 saves {less[1]} GiB a rank, 2 {less[2]}, 3 {less[3]}"
    if fits <= 1:
        why = "stage 0 fits" if fits == 0 else "stage 0 does not fit"
        norm = ", and logs the gradient's norm, which 0 does not" if mine == 1 else ""
        return f"ZeRO: {why} into {card_gb:g} GB; {saved}{norm}"
    return f"ZeRO: stage {fits} is the first that fits into {card_gb:g} GB; {saved}"
