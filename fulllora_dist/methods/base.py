"""What a training method is: the only place where an attack and a weight step meet."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fulllora_dist.attacks.threat import Threat
from fulllora_dist.core.settings import Settings
from fulllora_dist.data.batch import Batch
from fulllora_dist.methods.targets import Mixer, TargetSettings
from fulllora_dist.methods.warmup import WarmupSchedule, ramp


class WeightStep(Protocol):
    """The two doors of the engine that a method may use."""

    @property
    def attack_view(self) -> nn.Module:
        """The model for attacks: nothing of the engine is touched through it."""

    @property
    def classes(self) -> int:
        """Outputs of the model."""

    def __call__(self, pixels: Tensor) -> Tensor:
        """Logits, through the engine: only these may be given to `backward`. Once a micro-batch."""

    def backward(self, loss: Tensor) -> None:
        """Gradients of the adapter, and of a leaf that the pixels came from."""

    def accumulate(self, batch: Batch) -> Iterator[Batch]:
        """The micro-batches of one optimizer update, which is made when the loop ends."""


class MethodSettings(Settings):
    """Settings every method has. Subclasses narrow `name` to one value."""

    name: str
    """Which method."""


class Method(ABC):
    """One way to train. Built once a run or phase; `step` is called once a batch.

    Args:
        settings: an instance of `Settings`.
        threat: the threat model at full strength.
        seed: of everything random.
        ramps: what grows over the first batches.
        targets: how images and labels are mixed.

    Attributes:
        Settings: its settings.
        needs_labels: whether it needs each image's one label, so that images cannot be mixed.
        images_in_weight_step: how many versions of each image a weight step sees: clean and perturbed are 2.
    """

    Settings: ClassVar[type[MethodSettings]]
    needs_labels: ClassVar[bool] = False
    images_in_weight_step: ClassVar[int] = 1

    def __init__(
        self,
        settings: Any,
        threat: Threat,
        seed: int,
        ramps: WarmupSchedule | None = None,
        targets: TargetSettings | None = None,
    ):
        self.settings = settings
        self.threat = threat
        self.seed = seed
        self.ramps = ramps or WarmupSchedule()
        self.mix = Mixer(targets or TargetSettings(), seed)

    def threat_at(self, step: int) -> Threat:
        """The threat model of batch `step`: the full one, but for the warm-up."""
        return self.threat.scaled(ramp(self.ramps.at(step), self.ramps.eps))

    def step_size(self, size: float, step: int) -> float:
        """The attack's step size at batch `step`, which is `size` after the warm-up."""
        return size * ramp(self.ramps.at(step), self.ramps.step_size)

    def cross_entropy(self, logits: Tensor, y: Tensor) -> Tensor:
        """Mean over the samples, label smoothing included; y: labels [B] or probabilities [B, classes]."""
        return F.cross_entropy(logits, y, label_smoothing=self.mix.settings.label_smoothing)

    def prepare(self, backbone: nn.Module, image_size: int, first: int) -> None:  # noqa: B027  # most need nothing
        """Called once before the run: learn from the backbone what training needs of it, and refuse what cannot be.

        Args:
            image_size: side of the images in pixels.
            first: number of the first batch that it will train on.

        Raises:
            UserError: naming the setting.
        """

    @property
    def updates_per_batch(self) -> int:
        """Optimizer updates that one batch is used for."""
        return 1

    @abstractmethod
    def passes(self) -> tuple[int, int]:
        """(forward, backward) passes of a batch over the model that one batch costs."""

    @abstractmethod
    def step(self, engine: WeightStep, batch: Batch, step: int) -> dict[str, Tensor]:
        """Train on one batch.

        Args:
            batch: this rank's part of the global batch, on the device.
            step: number of batches before this one in the run; with the samples' ids it keys what is random.

        Returns:
            Scalar means over this rank's part.
        """

    def slot_state(self) -> dict[str, Tensor]:
        """Tensors [slots of this rank, ...] that a resumed run needs, in slot order. Most methods have none."""
        return {}

    def load_slot_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back this rank's part of what `slot_state` gave, whatever the number of ranks was."""
        assert not state, f"{type(self).__name__} has no state, but was given {sorted(state)}"


METHODS: dict[str, type[Method]] = {}
"""All methods by the `name` of their settings."""


def register_method(method: type[Method]) -> type[Method]:
    """Class decorator: make a method known under the default of its settings' `name`.

    Raises:
        ValueError: the name is another method's.
    """
    name = method.Settings.model_fields["name"].default
    if not isinstance(name, str):
        raise ValueError(f'{method.__name__}.Settings has no default name; write name: Literal["x"] = "x"')
    known = METHODS.setdefault(name, method)
    if (known.__module__, known.__qualname__) != (method.__module__, method.__qualname__):
        raise ValueError(f"method {name!r} of {method.__module__} is already {known.__module__}'s; choose another name")
    METHODS[name] = method
    return method


class MetricAverager:
    """Loss and accuracy of one update, averaged over its micro-batches without leaving the device."""

    def __init__(self) -> None:
        self._losses: list[Tensor] = []
        self._correct: list[Tensor] = []

    def add(self, loss: Tensor, logits: Tensor, y: Tensor) -> None:
        """One micro-batch; all are of one size. Of probabilities, the largest is the label."""
        labels = y if y.ndim == 1 else y.argmax(dim=1)
        self._losses.append(loss.detach())
        self._correct.append((logits.detach().argmax(dim=1) == labels).float().mean())

    def result(self) -> dict[str, Tensor]:
        """`accuracy` is that on the images that the weight step saw, perturbed or not."""
        return {"loss": torch.stack(self._losses).mean(), "accuracy": torch.stack(self._correct).mean()}


class PerturbedStep(Method):
    """Perturb, then one weight step; on the perturbed images alone, unless `loss` says otherwise."""

    @abstractmethod
    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, step: int, ids: Tensor) -> Tensor:
        """Training examples [B, 3, H, W] in [0, 1] made from `x`; `step` and `ids` key what is random."""

    def loss(self, engine: WeightStep, x: Tensor, x_adv: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """(the mean loss of a weight step, logits [B, classes] of the perturbed images); one call of the engine."""
        logits = engine(x_adv)
        return self.cross_entropy(logits, y), logits

    def step(self, engine: WeightStep, batch: Batch, step: int) -> dict[str, Tensor]:
        means = MetricAverager()
        for micro in engine.accumulate(batch):
            x, y = self.mix(micro, step, engine.classes)  # [B, C, H, W] in [0, 1]; [B] or [B, K]
            x_adv = self.perturb(engine.attack_view, x, y, self.threat_at(step), step, micro.ids)
            loss, logits = self.loss(engine, x, x_adv, y)
            engine.backward(loss)
            means.add(loss, logits, y)
        return means.result()
