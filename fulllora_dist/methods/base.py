"""Base classes of training methods, which combine an attack with a weight step."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fulllora_dist.attacks.threat import Threat
from fulllora_dist.core.errors import UserError
from fulllora_dist.core.rng import sample_rng
from fulllora_dist.data.batch import Batch
from fulllora_dist.methods.settings import METHOD_SETTINGS, MethodSettings, TargetSettings
from fulllora_dist.methods.targets import Mixer
from fulllora_dist.methods.warmup import WarmupSchedule, ramp
from fulllora_dist.models.flops import PassCost


class WeightStep(Protocol):
    """The interface of the engine for methods."""

    @property
    def attack_view(self) -> nn.Module:
        """The model for attacks, which bypasses the engine."""

    @property
    def classes(self) -> int:
        """Number of model outputs."""

    def __call__(self, pixels: Tensor) -> Tensor:
        """Compute logits through the engine, once per micro-batch. `backward` takes losses of these logits only."""

    def backward(self, loss: Tensor) -> None:
        """Compute gradients of the adapter, and of the pixels if they need one."""

    def accumulate(self, batch: Batch) -> Iterator[Batch]:
        """Yield the micro-batches of one optimizer update, which is made when the loop ends."""


def check_step(engine: Any, batch: Any) -> None:
    """Raises UserError: `step` is given something else than an engine, such as the model, or than a `Batch`."""
    if not hasattr(engine, "attack_view"):
        raise UserError(f"engine must be fd.LocalEngine(model, optimizer), got {type(engine).__name__}")
    if not isinstance(batch, Batch):
        raise UserError(f"batch must be fd.Batch.of(x, y), got {type(batch).__name__}")


class Method(ABC):
    """A training method. Built once per run or phase; `step` is called once per batch.

    Args:
        settings: an instance of `Settings`.
        threat: the threat model after the warm-up.
        seed: seed of all randomness.
        warmup: warm-up of eps and step size.
        targets: how images and labels are mixed.

    Attributes:
        Settings: class of the settings.
        images_in_weight_step: number of versions of each image in a weight step, e.g. 2 for clean and perturbed.
        moves_pixels: whether the weight step's backward pass goes on to the pixels, as Free's does.
    """

    Settings: ClassVar[type[MethodSettings]]
    images_in_weight_step: ClassVar[int] = 1
    moves_pixels: ClassVar[bool] = False

    def __init__(
        self,
        settings: Any,
        threat: Threat,
        seed: int,
        warmup: WarmupSchedule | None = None,
        targets: TargetSettings | None = None,
    ):
        self.settings = settings
        self.threat = threat
        self.seed = seed
        self.warmup = warmup or WarmupSchedule()
        self.mix = Mixer(targets or TargetSettings(), seed)

    def threat_at(self, step: int) -> Threat:
        """The threat model of batch `step`, smaller during the warm-up."""
        return self.threat.scaled(ramp(self.warmup.at(step), self.warmup.eps))

    def step_size(self, size: float, step: int) -> float:
        """The attack's step size at batch `step`: `size` after the warm-ups, before in proportion to eps, too."""
        at = self.warmup.at(step)
        return size * ramp(at, self.warmup.eps) * ramp(at, self.warmup.step_size)

    def cross_entropy(self, logits: Tensor, y: Tensor) -> Tensor:
        """Mean cross-entropy with label smoothing; y: labels [B] or probabilities [B, classes]."""
        return F.cross_entropy(logits, y, label_smoothing=self.mix.settings.label_smoothing)

    def prepare(self, backbone: nn.Module, image_size: int, first: int) -> None:  # noqa: B027  # most need nothing
        """Called once before the run, to read properties of the backbone and reject settings that do not fit it.

        Args:
            image_size: side of the images in pixels.
            first: number of the first batch that it will train on.

        Raises:
            UserError: an invalid setting, which the message names.
        """

    @property
    def updates_per_batch(self) -> int:
        """Number of optimizer updates per batch."""
        return 1

    @abstractmethod
    def passes(self) -> tuple[int, int]:
        """Number of (forward, backward) passes over the model per batch."""

    def attack_passes(self) -> tuple[int, int]:
        """Number of attack passes per batch: (forward and backward, forward alone)."""
        forward, backward = self.passes()
        return backward - self.updates_per_batch * self.images_in_weight_step, forward - backward

    def flops(self, attack: PassCost, weight_step: PassCost) -> int:
        """FLOPs per batch and image, given the costs of a pass of the attack and of the weight step."""
        both, forward_alone = self.attack_passes()
        updated = self.updates_per_batch * self.images_in_weight_step
        return both * attack.flops + forward_alone * attack.forward_flops + updated * weight_step.flops

    @abstractmethod
    def step(self, engine: WeightStep, batch: Batch, step: int) -> dict[str, Tensor]:
        """Train on one batch.

        Args:
            batch: this rank's part of the global batch, on the device.
            step: number of batches before this one in the run; with the samples' ids it keys all randomness.

        Returns:
            Scalar metrics, averaged over this rank's part.
        """

    def slot_state(self) -> dict[str, Tensor]:
        """Tensors [slots of this rank, ...] that a resumed run needs, in slot order. Empty for most methods."""
        return {}

    def load_slot_state(self, state: Mapping[str, Tensor]) -> None:
        """Load this rank's part of `slot_state`, which may have been saved with another number of ranks."""
        assert not state, f"{type(self).__name__} has no state, but was given {sorted(state)}"


METHODS: dict[str, type[Method]] = {}
"""All methods by the `name` of their settings."""


def register_method(method: type[Method]) -> type[Method]:
    """Class decorator that registers a method under the default of its settings' `name`.

    Raises:
        ValueError: the name belongs to another method.
    """
    name = method.Settings.model_fields["name"].default
    if not isinstance(name, str):
        raise ValueError(f'{method.__name__}.Settings has no default name; write name: Literal["x"] = "x"')
    known: type = METHODS.get(name, method)
    if known is method and (settings := METHOD_SETTINGS.get(name)) is not None:
        known = method if _same(settings, method.Settings) else settings
    if not _same(known, method):
        raise ValueError(f"method {name!r} of {method.__module__} is already {known.__module__}'s; choose another name")
    METHODS[name], METHOD_SETTINGS[name] = method, method.Settings
    return method


def _same(one: type, other: type) -> bool:
    """Whether they are one class, which a second import of its module makes again."""
    return (one.__module__, one.__qualname__) == (other.__module__, other.__qualname__)


class MetricAverager:
    """Loss and accuracy of one update, averaged over its micro-batches without leaving the device."""

    def __init__(self) -> None:
        self._losses: list[Tensor] = []
        self._correct: list[Tensor] = []

    def add(self, loss: Tensor, logits: Tensor, y: Tensor) -> None:
        """Add a micro-batch; all have the same size. With probabilities the label is the largest one."""
        labels = y if y.ndim == 1 else y.argmax(dim=1)
        self._losses.append(loss.detach())
        self._correct.append((logits.detach().argmax(dim=1) == labels).float().mean())

    def result(self) -> dict[str, Tensor]:
        """The mean loss and accuracy, on the images of the weight step, perturbed or not."""
        return {"loss": torch.stack(self._losses).mean(), "accuracy": torch.stack(self._correct).mean()}


class PerturbedStep(Method):
    """Perturbs the images, then makes a weight step, by default on the perturbed images only.

    Attributes:
        clean_fraction: fraction of the images that the weight step takes as they are.
    """

    @property
    def clean_fraction(self) -> float:
        return float(getattr(self.settings, "clean_fraction", 0))

    @abstractmethod
    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, step: int, ids: Tensor) -> Tensor:
        """Create training examples [B, 3, H, W] in [0, 1] from `x`; `step` and `ids` key all randomness."""

    def loss(self, engine: WeightStep, x: Tensor, x_adv: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Mean loss of a weight step, and logits [B, classes] of the perturbed images. Calls the engine once."""
        logits = engine(x_adv)
        return self.cross_entropy(logits, y), logits

    def step(self, engine: WeightStep, batch: Batch, step: int) -> dict[str, Tensor]:
        check_step(engine, batch)
        means = MetricAverager()
        for micro in engine.accumulate(batch):
            x, y = self.mix(micro, step, engine.classes)  # [B, C, H, W] in [0, 1]; [B] or [B, K]
            x_adv = self.perturb(engine.attack_view, x, y, self.threat_at(step), step, micro.ids)
            if self.clean_fraction:
                u = sample_rng(self.seed, "train/clean", step, micro.ids).uniform((1, 1, 1))
                x_adv = torch.where(u < self.clean_fraction, x, x_adv)
            loss, logits = self.loss(engine, x, x_adv, y)
            engine.backward(loss)
            means.add(loss, logits, y)
        return means.result()
