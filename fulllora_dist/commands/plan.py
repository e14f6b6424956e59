"""Estimate the cost of a run without a GPU, on the meta device, where no memory is allocated."""

import os
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fulllora_dist.config.schema import Config
from fulllora_dist.core.errors import UserError
from fulllora_dist.evaluation import EvalAttack, size_in
from fulllora_dist.models.adapted_model import AdaptedModel
from fulllora_dist.training.inputs import check_evaluation, check_files, check_settings, load_index
from fulllora_dist.training.run import on_meta

IMAGENET, IMAGENET_VALIDATION = 1_281_167, 50_000
ASSUMED_FLOPS = 3e14
"""Assumed sustained FLOP/s of one GPU for the estimate of GPU-hours: about 30 % of an H200's bf16 peak."""

ASSUMED_FP32_FLOPS = 4e13
"""The same for an evaluation, which computes in full fp32: about 60 % of an H200's peak."""


def _flops_in_place(_: torch.Size, left: torch.Size, right: torch.Size, **__: object) -> int:
    return 2 * left[0] * left[1] * right[1]


IN_PLACE = {torch.ops.aten.addmm_: _flops_in_place}
"""The operation of the branches (models/low_rank_linear.py) that torch's counter does not know."""


class _SavedBytes:
    """Bytes that autograd saves for the backward pass; counts each storage once, without parameters and buffers."""

    def __init__(self, model: AdaptedModel):
        self._own = {id_of(t) for t in (*model.parameters(), *model.buffers())}
        self._seen: dict[int, int] = {}
        self._kept: list[Tensor] = []  # a freed storage could pass its identity on to another

    def pack(self, tensor: Tensor) -> Tensor:
        key = id_of(tensor)
        if key not in self._own:
            self._seen[key] = tensor.untyped_storage().nbytes()
            self._kept.append(tensor)
        return tensor

    @property
    def total(self) -> int:
        return sum(self._seen.values())


def id_of(tensor: Tensor) -> int:
    """Identity of a tensor's storage, also on the meta device."""
    return tensor.untyped_storage()._cdata


class _Cost(NamedTuple):
    """Cost of a forward and backward pass for one image; `flops` is the sum of both."""

    forward_flops: int
    flops: int
    saved_bytes: int


def _count(model: AdaptedModel, size: int) -> _Cost:
    pixels = torch.empty(1, 3, size, size, device="meta", requires_grad=True)
    saved = _SavedBytes(model)
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as flops:
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
            logits = model(pixels)
            loss = F.cross_entropy(logits, torch.zeros(1, dtype=torch.int64, device="meta"))
        forward = flops.get_total_flops()
        loss.backward()
    return _Cost(forward, flops.get_total_flops(), saved.total)


def estimate(config: Config, ranks: int | None = None) -> str:
    """Estimate parameters, passes, FLOPs, memory and communication of a run, as readable text.

    Args:
        ranks: number of ranks; defaults to the launcher's WORLD_SIZE, else the largest number up to 8 that divides the
            batch.

    Raises:
        UserError: invalid settings.
    """
    parts = config.optim.batch_size // config.distributed.gradient_accumulation_steps
    likely = next(n for n in range(8, 0, -1) if parts % n == 0)
    world = ranks or int(os.environ.get("WORLD_SIZE", likely))
    notes = []
    check_settings(config, world)
    try:
        images = len(load_index(config.data.train, "data.train"))
    except UserError as error:
        notes.append(f"not ready: {error}; counts are for ImageNet-1k")
        images = IMAGENET
    else:
        check_files(config)
    model, phases = on_meta(config, images)
    micro = config.optim.batch_size // world // config.distributed.gradient_accumulation_steps
    checkpointing = config.distributed.activation_checkpointing

    sizes = [phase.image_size or model.info.image_size for phase in phases.phases]
    model.set_activation_checkpointing(checkpointing != "off")
    weight_step = {size: _count(model, size) for size in sizes}
    model.set_activation_checkpointing(checkpointing == "all")
    for parameter in model.trainable().values():
        parameter.requires_grad_(False)
    attack_pass = {size: _count(model, size) for size in sizes}

    total_flops, activations, update_passes, phase_lines = 0, 0, 0.0, []
    for phase, size in zip(phases.phases, sizes, strict=True):
        method, batches = phase.method, phase.end - phase.first
        forward, backward = method.passes()
        updates, seen = method.updates_per_batch, method.images_in_weight_step
        attacks, without_backward = backward - updates * seen, forward - backward
        step, attack = weight_step[size], attack_pass[size]
        total_flops += batches * (
            attacks * attack.flops + without_backward * attack.forward_flops + updates * seen * step.flops
        )
        activations = max(activations, seen * step.saved_bytes, attack.saved_bytes if attacks else 0)
        update_passes = max(update_passes, 1 + (attacks + without_backward / 2) / updates)
        phase_lines.append(
            f"{method.settings.name} at {size} pixels, {size_in(method.threat.norm, method.threat.eps)}: "
            f"{forward} forward, {backward} backward passes a batch; {batches:,} batches, {phase.updates:,} updates; "
            f"attack pass {attack.flops / 1e9:.1f} GFLOP, weight step {seen * step.flops / 1e9:.1f} GFLOP an image"
        )
    total_flops *= config.optim.batch_size

    stage = config.distributed.zero_stage
    weights = sum(
        p.numel() * p.element_size() for n, p in model.backbone.named_parameters() if n not in model.trainable()
    )
    adapter = 4 * model.report.trainable
    memory = {
        "frozen weights": weights / (world if stage == 3 else 1),
        "adapter": adapter / (world if stage == 3 else 1),
        "gradients": adapter / (world if stage >= 2 else 1),
        "optimizer": (2 + (stage > 0)) * adapter / (world if stage >= 1 else 1),
        "average": adapter if config.optim.ema_decay else 0,
        "activations": activations * micro,
    }
    reduced = 2 * adapter * (world - 1) / world
    passes = update_passes * config.distributed.gradient_accumulation_steps
    gathered = 2 * passes * (weights + adapter) if stage == 3 else 0
    evaluation = _evaluation_line(config, _count(model, model.info.image_size))
    lines = [
        f"{model.info.name} at {model.info.image_size} pixels, {config.finetune}, "
        f"{config.model.precision}, ZeRO-{stage}, {world} ranks",
        str(model.report),
        f"  rank of the branches: {model.spec.rank}" if model.spec.rank else "  no branches",
        *phase_lines,
        f"{phases.total_steps:,} batches, {phases.total_updates:,} optimizer updates on {images:,} images; "
        f"whole run {total_flops / 1e18:.2f} EFLOP, {total_flops / ASSUMED_FLOPS / 3600:.1f} GPU-hours "
        f"at an assumed {ASSUMED_FLOPS / 1e12:.0f} TFLOP/s",
        f"memory a rank at micro-batch {micro}: "
        + ", ".join(f"{name} {size / 2**30:.2f}" for name, size in memory.items())
        + f"; together {sum(memory.values()) / 2**30:.1f} GiB, transients not counted",
        f"communication a rank and update: {reduced / 2**20:.1f} MiB of gradients"
        + (f", {gathered / 2**30:.1f} GiB of weights gathered" if gathered else ", attack passes none"),
    ]
    return "\n".join([*lines, *([evaluation] if evaluation else []), *notes])


def estimate_evaluation(config: Config) -> str:
    """Estimate the passes and FLOPs of an evaluation, as readable text.

    Raises:
        UserError: invalid settings.
    """
    model, _ = on_meta(config, IMAGENET)
    for parameter in model.trainable().values():
        parameter.requires_grad_(False)
    size = model.info.image_size
    return f"{model.info.name} at {size} pixels\n{_evaluation_line(config, _count(model, size))}"


def _evaluation_line(config: Config, cost: _Cost) -> str | None:
    """What the attacks of a config cost; None where it has no validation images."""
    if config.data.validation is None:
        return None
    settings, subset = config.evaluation, check_evaluation(config)
    try:
        images = len(subset.of(load_index(config.data.validation, "data.validation"), "data.validation"))
    except UserError:  # not there yet
        images = settings.num_samples or settings.first or IMAGENET_VALIDATION
    backward = cost.flops - cost.forward_flops
    most, least, named = 0, 0, []
    for attack in EvalAttack.parse_all(settings.attacks):
        first = EvalAttack.parse(attack.parts[0]) if attack.parts else attack
        balls = 1 if attack.kind == "clean" else 1 + len(settings.eps) + len(settings.norms)
        for passes, is_most in ((attack.forward_and_backward, True), (first.forward_and_backward, False)):
            flops = balls * images * (passes[0] * cost.forward_flops + passes[1] * backward)
            most, least = (most + flops, least) if is_most else (most, least + flops)
        falls = f" where it stays robust, {first.passes:,} where it falls to {first.name}" if attack.parts else ""
        named.append(f"{attack.name} {attack.passes:,} passes an image" + falls)
    hours = [flops / ASSUMED_FP32_FLOPS / 3600 for flops in (most, (most + least) / 2)]
    half = f", {hours[1]:.2g} where half of the images fall to its first part" if most > least else ""
    return (
        f"evaluation of {images:,} images: {', '.join(named)}; {hours[0]:.2g} GPU-hours at an assumed "
        f"{ASSUMED_FP32_FLOPS / 1e12:.0f} TFLOP/s of fp32{half}"
    )
