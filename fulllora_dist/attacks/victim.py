"""The model that a public attack attacks: what it is must be clear before, and what it returns at the first pass."""

import re
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from fulllora_dist.attacks.arguments import check_labels, dtype_name
from fulllora_dist.core.errors import UserError


class Victim(nn.Module):
    """pixels [B, C, H, W] -> logits [B, classes] of a foreign model, checked without waiting for the device.

    DistributedDataParallel is taken off: an attack needs no parameter gradients, for which DDP would wait. Outputs with
    logits in them (`ModelOutput` of transformers, a dict) are unpacked.

    Args:
        model: any module.
        least, exactly: how many logits it must return, for the loss or for probabilities.
        needed: how many logits the labels need.

    Attributes:
        needed: as above.

    Raises:
        UserError: not a module; or parameters that autograd cannot use.
    """

    def __init__(self, model: Any, least: int = 2, exactly: int | None = None, needed: int = 0):
        super().__init__()
        if not isinstance(model, nn.Module):
            raise UserError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        self.model = model.module if isinstance(model, DistributedDataParallel) else model
        self.least, self.exactly, self.needed = least, exactly, needed
        self._tried = False
        self._gradient: tuple[Tensor, Tensor] | None = None  # bool [B]: not finite, zero
        if any(tensor.is_inference() for tensor in (*self.model.parameters(), *self.model.buffers())):
            raise UserError(
                "model: its tensors were made under torch.inference_mode, and gradients cannot pass them; create or "
                "load it outside"
            )

    def forward(self, pixels: Tensor) -> Tensor:
        return self.checked(logits_of(self.model(pixels) if self._tried else self._first(pixels)), pixels)

    def checked(self, logits: Tensor, pixels: Tensor) -> Tensor:
        """The logits of these pixels themselves.

        Raises:
            UserError: they are none, too few, or do not depend on pixels that need a gradient.
        """
        shape = list(logits.shape)
        if logits.ndim != 2 or len(logits) != len(pixels) or not logits.is_floating_point():
            raise UserError(f"model must return logits [{len(pixels)}, classes], got {dtype_name(logits)} {shape}")
        if shape[1] < self.least:
            raise UserError(f"model must return at least {self.least} logits for this loss, got {shape[1]}")
        check_labels(self.needed, shape[1])
        if self.exactly is not None and shape[1] != self.exactly:
            raise UserError(f"y must be probabilities of the model's {shape[1]} classes, got {self.exactly}")
        if torch.is_grad_enabled() and pixels.requires_grad and not logits.requires_grad:
            raise UserError(
                "model: its logits do not depend on the pixels by any gradient; look for no_grad, detach, argmax or "
                "numpy in its forward"
            )
        return logits

    def _first(self, pixels: Tensor) -> Any:
        """The first pass, in which the model may turn out not to take such images."""
        if pixels.requires_grad:
            pixels.register_hook(self._look)
        try:
            output = self.model(pixels)
        except (RuntimeError, AssertionError) as error:
            # subclasses, such as that of a full GPU, say enough, and are caught by their type
            if type(error) not in (RuntimeError, AssertionError) or not str(error):
                raise
            if mismatch := self._mismatch(pixels):
                raise UserError(mismatch) from None
            reason = str(error).strip().splitlines()[0]
            if fixed := re.match(r"Input (?:height|width) \((\d+)\) doesn't match model \((\d+)\)", reason):  # timm's
                reason = f"{fixed[0]}; resize the images to {fixed[2]} pixels, or build the model with "
                reason += f"image_size={fixed[1]} (timm's img_size)"
            raise UserError(f"model does not take x {list(pixels.shape)}: {reason}") from error
        self._tried = True
        return output

    def _look(self, gradient: Tensor) -> None:
        rows = gradient.flatten(1)
        self._gradient = ~rows.isfinite().all(dim=1), (rows == 0).all(dim=1)

    def check_gradient(self, x_adv: Tensor) -> None:
        """Look at the gradient of the first pass, after the attack, so that it is waited for only once.

        Args:
            x_adv: what the attack has found.

        Raises:
            UserError: it was not finite, or it became so on the way: an attack moves nothing there, or to NaN.
        """
        broken, zero = ~x_adv.isfinite().flatten(1).all(dim=1), torch.zeros_like(x_adv[:, 0, 0, 0], dtype=torch.bool)
        if self._gradient is not None:
            broken, zero = broken | self._gradient[0], self._gradient[1]
        count, n_zero = torch.stack([broken.sum(), zero.sum()]).tolist()
        if count:
            raise UserError(f"model: the gradient of the loss is not finite at {count} of {len(x_adv)} images")
        if n_zero == len(x_adv):  # not refused: it is so at the first step of a new head that begins at zero
            warnings.warn(
                f"the gradient of the loss is zero at all {len(x_adv)} images, so that no step moves; look for detach, "
                "round or a saturated softmax in the model",
                stacklevel=3,
            )

    def _mismatch(self, pixels: Tensor) -> str | None:
        """Why parameters and pixels do not meet; DataParallel brings pixels to its devices itself."""
        floats = [parameter for parameter in self.model.parameters() if parameter.is_floating_point()]
        devices = {str(parameter.device) for parameter in floats} or {str(pixels.device)}
        dtypes = {dtype_name(parameter) for parameter in floats} or {dtype_name(pixels)}
        theirs, mine = " and ".join(sorted(devices)), str(pixels.device)
        if "meta" in devices - {mine}:
            return "model has no weights, as it was made on the device meta"
        if mine not in devices and not isinstance(self.model, DataParallel):
            return f"x is on {mine}, the model on {theirs}; write x.to({str(floats[0].device)!r})"
        theirs, mine = " and ".join(sorted(dtypes)), dtype_name(pixels)
        if mine not in dtypes:
            return (
                f"x is {mine}, the model's parameters are {theirs}; write model.to(torch.{mine}), or cast in the model"
            )
        return None


def logits_in(output: Any) -> Tensor | None:
    """The logits in what a model returns: a tensor, or a `ModelOutput`, dict or object with `logits`; None without."""
    if isinstance(output, Tensor):
        return output
    found = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", None)
    return found if isinstance(found, Tensor) else None


def logits_of(output: Any) -> Tensor:
    """`logits_in`.

    Raises:
        UserError: there are none.
    """
    found = logits_in(output)
    if found is None:
        raise UserError(
            f"model must return logits [B, classes], got {type(output).__name__}; wrap it in a module that does"
        )
    return found
