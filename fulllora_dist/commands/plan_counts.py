"""What a run computes and keeps, counted on the meta device: passes, FLOPs and bytes of each phase."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from fulllora_dist.config.schema import Config
from fulllora_dist.core.errors import UserError
from fulllora_dist.evaluation.attack_names import further_norms
from fulllora_dist.evaluation.attacks import EvalAttack
from fulllora_dist.models.adapted_model import AdaptedModel
from fulllora_dist.models.flops import PassCost, pass_cost
from fulllora_dist.training.inputs import check_evaluation, check_files, check_settings, load_index
from fulllora_dist.training.phases import Phase, Phases
from fulllora_dist.training.run import on_meta

IMAGENET, IMAGENET_VALIDATION = 1_281_167, 50_000
HELD_OUT = 10_000
"""Of ImageNet-1k's training images, ten of each class: make_shards.py --holdout 10."""
Checkpointing = Literal["off", "weight_step", "all"]


@dataclass
class RunCounts:
    """A run on `world` ranks.

    Attributes:
        images: of the training data.
        micro: images of a rank's micro-batch.
        notes: what is not ready yet, a line each.
    """

    config: Config
    model: AdaptedModel
    phases: Phases
    images: int
    world: int
    notes: list[str]
    _passes: dict[tuple[int, int, bool, bool, bool], PassCost] = field(default_factory=dict)

    @property
    def micro(self) -> int:
        return self.config.optim.batch_size // self.world // self.config.distributed.gradient_accumulation_steps

    @property
    def checkpointing(self) -> Checkpointing:
        return self.config.distributed.activation_checkpointing

    def size(self, phase: Phase) -> int:
        """Side of a phase's images in pixels."""
        return phase.image_size or self.model.info.image_size

    def costs(self, phase: Phase, checkpointing: Checkpointing) -> tuple[PassCost, PassCost]:
        """Cost of an attack pass and of a weight step of a phase, for one of the micro-batch's images."""
        size = self.size(phase)
        attack = self._pass(size, self.micro, attack=True, recompute=checkpointing == "all")
        in_step = self.micro * phase.method.images_in_weight_step
        pixels = phase.method.moves_pixels
        return attack, self._pass(size, in_step, attack=False, recompute=checkpointing != "off", pixels=pixels)

    def flops(self, checkpointing: Checkpointing) -> int:
        """FLOPs of the whole run."""
        images = self.config.optim.batch_size
        return images * sum(
            (phase.end - phase.first) * phase.method.flops(*self.costs(phase, checkpointing))
            for phase in self.phases.phases
        )

    def update_passes(self) -> float:
        """Forward and backward passes of a micro-batch for an optimizer update, the most of any phase; a pass without a
        backward pass is half of one."""
        most = 0.0
        for phase in self.phases.phases:
            attacks, forward_alone = phase.method.attack_passes()
            most = max(most, 1 + (attacks + forward_alone / 2) / phase.method.updates_per_batch)
        return most

    def _pass(self, size: int, images: int, *, attack: bool, recompute: bool, pixels: bool = True) -> PassCost:
        key = size, images, attack, recompute, pixels
        if key not in self._passes:
            self._passes[key] = count_pass(self.model, size, images, attack=attack, recompute=recompute, pixels=pixels)
        return self._passes[key]


def count_pass(
    model: AdaptedModel, size: int, images: int, *, attack: bool, recompute: bool = False, pixels: bool = True
) -> PassCost:
    """Cost of a pass for one of so many images, for the pixels' gradient alone (`attack`) or for the adapter's and,
    with `pixels`, theirs."""
    model.set_activation_checkpointing(recompute)
    return pass_cost(model, size, images, attack=attack, pixels=pixels)


def count_run(config: Config, ranks: int | None = None) -> RunCounts:
    """Count a run; without its data, on as many images as ImageNet-1k has, less those held out where it names such.

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
        held_out = HELD_OUT if config.data.held_out else 0
        less = f" without {held_out:,} held-out images" if held_out else ""
        notes.append(f"not ready: {error}; counts are for ImageNet-1k{less}")
        images = IMAGENET - held_out
        notes += _not_ready({"data.validation": config.data.validation, "data.held_out": config.data.held_out})
    else:
        check_files(config)
    model, phases = on_meta(config, images)
    return RunCounts(config, model, phases, images, world, notes)


def _not_ready(locations: Mapping[str, str | None]) -> list[str]:
    """A line for each setting whose shards cannot be read."""
    notes = []
    for setting, location in locations.items():
        try:
            if location is not None:
                load_index(location, setting)
        except UserError as error:
            notes.append(f"not ready: {error}")
    return notes


@dataclass(frozen=True)
class EvaluationCounts:
    """An evaluation in fp32.

    Attributes:
        images: number of images.
        size: their side in pixels.
        batch: images of a rank's batch.
        pass_flops: of a forward and backward pass of an image.
        attacks: what each attack costs an image, as text.
        flops: of all, where no image falls to an attack before its last part.
        half_flops: where half of them fall to the first part of each.
        batch_bytes: memory of the model and such a batch.
    """

    images: int
    size: int
    batch: int
    pass_flops: int
    attacks: list[str]
    flops: int
    half_flops: float
    batch_bytes: int


def count_evaluation(config: Config) -> EvaluationCounts | None:
    """Count the attacks of a config; None where it has no validation images."""
    if config.data.validation is None:
        return None
    settings, subset = config.evaluation, check_evaluation(config)
    try:
        images = len(subset.of(load_index(config.data.validation, "data.validation"), "data.validation"))
    except UserError:  # not there yet
        images = settings.num_samples or settings.first or IMAGENET_VALIDATION
    in_fp32 = config.model.model_copy(update={"precision": "fp32"})
    model, _ = on_meta(config.model_copy(update={"model": in_fp32}), max(IMAGENET, config.optim.batch_size))
    size, batch = model.info.image_size, min(settings.batch_size, images)
    cost = count_pass(model, size, batch, attack=True)
    backward = cost.flops - cost.forward_flops
    own, most, least, named = config.threat.norm, 0, 0, []
    others = [norm for norm, _ in further_norms(settings.norms, own)]
    for attack in EvalAttack.parse_all(settings.attacks):
        first = EvalAttack.parse(attack.parts[0]) if attack.parts else attack
        norms = [own] if attack.kind == "clean" else [own, *(own for _ in settings.eps), *others]
        for norm in norms:
            for counted, is_most in ((attack, True), (first, False)):
                forward, back = counted.forward_and_backward(norm)
                flops = images * (forward * cost.forward_flops + back * backward)
                most, least = (most + flops, least) if is_most else (most, least + flops)
        for norm in dict.fromkeys(norms if attack.parts else [own]):
            falls = f" where it stays robust, {first.passes(norm):,} where it falls to {first.name}"
            within = f" in {norm}" if others and attack.parts else ""
            named.append(f"{attack.name} {attack.passes(norm):,} passes an image{within}{falls * bool(attack.parts)}")
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    memory = weights + batch * cost.peak_bytes
    return EvaluationCounts(images, size, batch, cost.flops, named, most, (most + least) / 2, memory)
