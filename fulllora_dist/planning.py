"""What a run will cost, before a GPU is touched: counted on the meta device, where nothing is allocated."""

import os

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fulllora_dist.build import build_method, build_model, check_inputs
from fulllora_dist.config import Config
from fulllora_dist.data.index import Index
from fulllora_dist.errors import UserError
from fulllora_dist.models.finetune import AdaptedModel

IMAGENET = 1_281_167
ASSUMED_FLOPS = 3e14
"""Sustained FLOP/s of one GPU that the hours are given for: about 30 % of an H200's bf16 peak."""


class _SavedBytes:
    """Bytes that autograd keeps for backward, each storage once, parameters and buffers left out."""

    def __init__(self, model: AdaptedModel):
        self._own = {id_of(t) for t in (*model.parameters(), *model.buffers())}
        self._seen: dict[int, int] = {}
        self._kept: list[Tensor] = []  # a storage that died could lend its identity to another

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
    """Identity of a tensor's storage, on the meta device too."""
    return tensor.untyped_storage()._cdata


def _count(model: AdaptedModel) -> tuple[int, int]:
    """(FLOPs, saved bytes) of one forward and backward pass for one picture, to what requires a gradient."""
    size = model.info.image_size
    pixels = torch.empty(1, 3, size, size, device="meta", requires_grad=True)
    saved = _SavedBytes(model)
    with FlopCounterMode(display=False) as flops:
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
            logits = model(pixels)
            loss = F.cross_entropy(logits, torch.zeros(1, dtype=torch.int64, device="meta"))
        loss.backward()
    return flops.get_total_flops(), saved.total


def estimate(config: Config, ranks: int | None = None) -> str:
    """Parameters, passes, FLOPs, memory and communication of a run, as a table for people.

    Args:
        ranks: to plan for; the launcher's WORLD_SIZE, else the most up to 8 that divide the batch, unless given.

    Raises:
        UserError: settings that do not fit together.
    """
    parts = config.optim.batch_size // config.distributed.grad_accumulation
    likely = next(n for n in range(8, 0, -1) if parts % n == 0)
    world = ranks or int(os.environ.get("WORLD_SIZE", likely))
    notes = []
    try:
        check_inputs(config, world)
        pictures = len(Index.load(config.data.train))
    except UserError as error:
        if "does not divide" in str(error):
            raise
        notes.append(f"not ready: {error}; counts are for ImageNet-1k")
        pictures = IMAGENET
    with torch.device("meta"):
        model = build_model(config)
    method, batches = build_method(config, pictures // config.optim.batch_size)
    micro = config.optim.batch_size // world // config.distributed.grad_accumulation
    forward, backward = method.passes()
    checkpointing = config.distributed.activation_checkpointing

    trainable = list(model.trainable().values())
    model.set_activation_checkpointing(checkpointing != "off")
    step_flops, step_bytes = _count(model)
    model.set_activation_checkpointing(checkpointing == "all")
    for parameter in trainable:
        parameter.requires_grad_(False)
    attack_flops, attack_bytes = _count(model)

    attacks = backward - method.updates_per_batch
    flops_picture = attacks * attack_flops + method.updates_per_batch * step_flops
    total_flops = flops_picture * batches * config.optim.batch_size

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
        "average": adapter if config.optim.ema else 0,
        "activations": max(step_bytes, attack_bytes if attacks else 0) * micro,
    }
    reduced = 2 * adapter * (world - 1) / world
    passes = backward / method.updates_per_batch * config.distributed.grad_accumulation
    gathered = 2 * passes * (weights + adapter) if stage == 3 else 0
    lines = [
        f"{model.info.name} at {model.info.image_size} pixels, {config.finetune}, {config.method.name}, "
        f"{config.model.precision}, ZeRO-{stage}, {world} ranks",
        str(model.report),
        f"  rank of the branches: {model.spec.rank}" if model.spec.rank else "  no branches",
        f"passes a batch: {forward} forward, {backward} backward; {batches:,} batches, "
        f"{batches * method.updates_per_batch:,} optimizer updates on {pictures:,} pictures",
        f"FLOPs a picture: attack pass {attack_flops / 1e9:.1f} G, weight step {step_flops / 1e9:.1f} G; "
        f"whole run {total_flops / 1e18:.2f} EFLOP, {total_flops / ASSUMED_FLOPS / 3600:.1f} GPU-hours "
        f"at an assumed {ASSUMED_FLOPS / 1e12:.0f} TFLOP/s",
        f"memory a rank at micro-batch {micro}: "
        + ", ".join(f"{name} {size / 2**30:.2f}" for name, size in memory.items())
        + f"; together {sum(memory.values()) / 2**30:.1f} GiB, transients not counted",
        f"communication a rank and update: {reduced / 2**20:.1f} MiB of gradients"
        + (f", {gathered / 2**30:.1f} GiB of weights gathered" if gathered else ", attack passes none"),
    ]
    return "\n".join(lines + notes)
