"""The training methods in a loop of one's own: any model from pixels in [0, 1] to logits, any torch optimizer.

    method, engine = fd.method("trades", eps="4/255", steps=3), fd.LocalEngine(model, optimizer)
    for step, (x, y) in enumerate(loader):
        metrics = method.step(engine, fd.Batch.of(x, y), step)

`method.step` makes the attack and the weight step, the optimizer's update included; a run of `train.py` calls the same
function with DeepSpeed's engine in place of this one.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fulllora_dist.attacks.arguments import checked_count, checked_size
from fulllora_dist.attacks.settings import Norm
from fulllora_dist.attacks.threat import threat_model
from fulllora_dist.attacks.victim import Victim, logits_of
from fulllora_dist.core.errors import UserError
from fulllora_dist.core.settings import explain
from fulllora_dist.core.suggest import suggestion
from fulllora_dist.data.batch import Batch
from fulllora_dist.methods import METHODS
from fulllora_dist.methods.base import Method
from fulllora_dist.methods.settings import TargetSettings
from fulllora_dist.methods.standard import Standard
from fulllora_dist.methods.warmup import WarmupSchedule


def method(
    name: str,
    *,
    eps: float | str | None = None,
    norm: Norm = "linf",
    seed: int = 0,
    total_steps: int = 0,
    eps_warmup_steps: int = 0,
    step_size_warmup_steps: int = 0,
    targets: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Method:
    """A training method for one's own loop.

    Args:
        name: pgd, trades, mart, free, fgsm_rs, n_fgsm, standard, or one registered by `register_method`.
        eps: radius of the perturbations in pixels of [0, 1], e.g. "4/255" or 4 / 255; a length for "l2" and "l1". Only
            standard, which has no attack, needs none.
        norm: "linf", "l2" or "l1".
        seed: with the step and the ids of a batch it keys all random numbers.
        total_steps: batches of the whole run; needed by attention_drop and perturbation_mask alone.
        eps_warmup_steps, step_size_warmup_steps: batches over which eps and the attack's step size grow from zero.
        targets: mixing and smoothing, e.g. {"mixup": 0.8, "label_smoothing": 0.1}; see `TargetSettings`.
        settings: of the method, e.g. steps, step_size, beta; `train.py --help-settings` has them all.

    Raises:
        UserError: an unknown method or setting, a value that it cannot have, or no eps.

    Example:
        method, engine = fd.method("trades", eps="4/255", steps=3, beta=6.0), fd.LocalEngine(model, optimizer)
        for step, (x, y) in enumerate(loader):
            metrics = method.step(engine, fd.Batch.of(x, y), step)
    """
    if name not in METHODS:
        raise UserError(f"method: {name!r} is unknown; {suggestion(str(name), METHODS)}")
    kind = METHODS[name]
    if eps is None and not issubclass(kind, Standard):
        raise UserError(f"method {name}: eps must be given, e.g. eps='4/255'")
    radius = 0.0 if eps is None else checked_size("eps", eps, norm)
    checked = _checked(kind.Settings, {"name": name, **settings}, f"method {name}")
    schedule = WarmupSchedule(
        checked_count("eps_warmup_steps", eps_warmup_steps, 0),
        checked_count("step_size_warmup_steps", step_size_warmup_steps, 0),
        checked_count("total_steps", total_steps, 0),
    )
    weakened = [key for key in ("attention_drop", "perturbation_mask") if getattr(checked, key, 0)]
    if weakened and not schedule.run:
        raise UserError(f"total_steps: {weakened[0]} is a fraction of the whole run; give its number of batches")
    if "perturbation_mask" in weakened and checked.mask_patch is None:
        raise UserError("mask_patch: must be set with perturbation_mask, to the side of the model's patches in pixels")
    chosen = _checked(TargetSettings, dict(targets or {}), "targets")
    if chosen.mixes and checked.needs_labels:
        raise UserError(f"targets: {name} needs one label per image; remove mixup and cutmix")
    return kind(checked, threat_model(norm, radius), seed, schedule, chosen)


def _checked(of: type[BaseModel], values: dict[str, Any], what: str) -> Any:
    try:
        return of.model_validate(values)
    except ValidationError as error:
        known = [key for key in of.model_fields if key != "name"]
        raise UserError(f"{what}: {explain(error, lambda _, key: suggestion(key, known))}") from None


class LocalEngine:
    """The weight steps of a method on any model with any optimizer, in this process or under DistributedDataParallel.

    Updates whose gradients are not finite are skipped, as in a run of `train.py`.

    Args:
        model: pixels [B, C, H, W] in [0, 1] -> logits [B, classes]. DistributedDataParallel is bypassed by attacks.
        optimizer: over the model's trainable parameters.
        scheduler: of the learning rate; its step() is called after each update.
        grad_clip: largest norm of the gradients; None clips nothing.
        accumulation_steps: equal parts of a batch whose gradients are averaged before an update.
        scaler: a torch.amp.GradScaler, for fp16.
        backward: what takes the place of `loss.backward()`, such as accelerate's `accelerator.backward`.

    Attributes:
        skipped: number of updates that were skipped.

    Raises:
        UserError: no module, no optimizer, or one without a trainable parameter of the model; accelerate's optimizer
            of fp16.

    Example:
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-3)
        engine = fd.LocalEngine(model, optimizer, grad_clip=1.0)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        scheduler: Any = None,
        grad_clip: float | None = None,
        accumulation_steps: int = 1,
        scaler: Any = None,
        backward: Callable[[Tensor], Any] | None = None,
    ):
        self._model, self._optimizer, self._scheduler, self._scaler = model, optimizer, scheduler, scaler
        self._attacked = Victim(model)
        self._clip = float("inf") if grad_clip is None else grad_clip
        self._accumulation = checked_count("accumulation_steps", accumulation_steps, 1)
        self._backward = backward
        self.skipped = 0
        if not hasattr(optimizer, "param_groups"):
            raise UserError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        trainable = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
        self._parameters = [p for group in optimizer.param_groups for p in group["params"] if id(p) in trainable]
        if not self._parameters:
            raise UserError(
                "optimizer: none of the model's trainable parameters is in it; create it after the model is adapted, "
                "with (p for p in model.parameters() if p.requires_grad)"
            )
        if getattr(optimizer, "scaler", None) is not None:
            raise UserError(
                "optimizer: accelerate's fp16 scales the gradients, which would be clipped as they are; set "
                "mixed_precision='bf16', or give a torch.amp.GradScaler as scaler in place of accelerate"
            )

    @property
    def attack_view(self) -> nn.Module:
        """The model for attacks."""
        return self._attacked

    @property
    def classes(self) -> int:
        """Number of the model's outputs, by the first `num_classes` in it; 0 if not known."""
        counts = (getattr(module, "num_classes", None) for module in self.attack_view.modules())
        return next((count for count in counts if isinstance(count, int)), 0)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Logits [B, classes] of a weight step."""
        if pixels.requires_grad:  # Free's perturbation would keep a NaN forever
            pixels.register_hook(lambda gradient: gradient.nan_to_num(0, 0, 0))
        return self._attacked.checked(logits_of(self._model(pixels)), pixels)

    def backward(self, loss: Tensor) -> None:
        """Compute gradients, averaged over the parts of a batch."""
        loss = loss / self._accumulation
        if self._backward is not None:
            self._backward(loss)
        else:
            (loss if self._scaler is None else self._scaler.scale(loss)).backward()

    def accumulate(self, batch: Batch) -> Iterator[Batch]:
        """Yield the parts of a batch; make the update after the last one.

        Raises:
            UserError: `accumulation_steps` does not divide the batch.
        """
        self._attacked.needed = batch.logits_needed
        if len(batch) % self._accumulation:
            raise UserError(f"accumulation_steps: {self._accumulation} does not divide a batch of {len(batch)} images")
        self._optimizer.zero_grad()
        parts = batch.split(self._accumulation)
        for part in parts:
            waits = part is not parts[-1] and isinstance(self._model, DistributedDataParallel)
            with self._model.no_sync() if waits else nullcontext():  # type: ignore[operator]
                yield part
        if self._scaler is not None:
            self._scaler.unscale_(self._optimizer)
        finite = bool(torch.nn.utils.clip_grad_norm_(self._parameters, self._clip).isfinite())
        self.skipped += not finite
        if self._scaler is not None:
            self._scaler.step(self._optimizer)  # skips by itself
            self._scaler.update()
        elif finite:
            self._optimizer.step()
        if finite and self._scheduler is not None:
            self._scheduler.step()
