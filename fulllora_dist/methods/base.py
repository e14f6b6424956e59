"""What a training method is: the only place where an attack and a weight step meet."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from fulllora_dist.attacks.threat import Linf
from fulllora_dist.data.batch import Batch


class WeightStep(Protocol):
    """The two doors of the engine that a method may use."""

    @property
    def attack_view(self) -> nn.Module:
        """The model for attacks: nothing of the engine is touched through it."""

    def __call__(self, pixels: Tensor) -> Tensor:
        """Logits, through the engine: only these may be given to `backward`."""

    def backward(self, loss: Tensor) -> None:
        """Gradients of the adapter, and of a leaf that the pixels came from."""

    def accumulate(self, batch: Batch) -> Iterator[Batch]:
        """The micro-batches of one optimizer update, which is made when the loop ends."""


class MethodSettings(BaseModel):
    """Settings every method has. Subclasses narrow `name` to one value."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    name: str
    """Which method."""


class Method(ABC):
    """One way to train. Made once a run; `step` is called once a batch.

    Args:
        settings: an instance of `Settings`.
        threat: the threat model at full strength.
        seed: of everything random.
        warmup_steps: batches over which eps rises linearly to its full size.

    Attributes:
        Settings: its settings.
        updates_per_batch: optimizer updates that one batch is used for.
    """

    Settings: ClassVar[type[MethodSettings]]
    updates_per_batch: int = 1

    def __init__(self, settings: Any, threat: Linf, seed: int, warmup_steps: int = 0):
        self.settings = settings
        self.threat = threat
        self.seed = seed
        self.warmup_steps = warmup_steps

    def threat_at(self, step: int) -> Linf:
        """The threat model of batch `step`: the full one, but for the warm-up."""
        if step >= self.warmup_steps:
            return self.threat
        return Linf(self.threat.eps * (step + 1) / (self.warmup_steps + 1))

    @abstractmethod
    def passes(self) -> tuple[int, int]:
        """(forward, backward) passes over the model that one batch costs."""

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


class Means:
    """Loss and accuracy of one update, averaged over its micro-batches without leaving the device."""

    def __init__(self) -> None:
        self._losses: list[Tensor] = []
        self._correct: list[Tensor] = []

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """One micro-batch; all are of one size."""
        self._losses.append(loss.detach())
        self._correct.append((logits.detach().argmax(dim=1) == labels).float().mean())

    def result(self) -> dict[str, Tensor]:
        """`accuracy` is that on the pictures that the weight step saw, perturbed or not."""
        return {"loss": torch.stack(self._losses).mean(), "accuracy": torch.stack(self._correct).mean()}


class PerturbedStep(Method):
    """Perturb, then one weight step on the perturbed pictures."""

    @abstractmethod
    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, threat: Linf, step: int, ids: Tensor) -> Tensor:
        """Training examples [B, 3, H, W] in [0, 1] made from `x`; `step` and `ids` key what is random."""

    def step(self, engine: WeightStep, batch: Batch, step: int) -> dict[str, Tensor]:
        means = Means()
        for micro in engine.accumulate(batch):
            threat = self.threat_at(step)
            x = self.perturb(engine.attack_view, micro.pixels(), micro.labels, threat, step, micro.ids)
            logits = engine(x)
            loss = F.cross_entropy(logits, micro.labels)
            engine.backward(loss)
            means.add(loss, logits, micro.labels)
        return means.result()
