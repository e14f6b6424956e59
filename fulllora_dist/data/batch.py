"""What a stream yields."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from fulllora_dist.attacks.arguments import check_batch, check_images, checked_ids, checked_target


@dataclass(frozen=True)
class Batch:
    """Samples of one step on one rank. `Batch.of` makes one of images and labels.

    Attributes:
        images: uint8 (0..255) or floating point ([0, 1]) [B, 3, H, W].
        labels: int64 [B], class indices.
        ids: int64 [B], stable across topologies and restarts.
        mask: bool [B], False where a sample only pads the batch.
        slot: global batch slot of the first sample: slots are numbered over all ranks in plan order.
        logits_needed: how many logits the labels need at least; 0 where `of` has not looked.
    """

    images: torch.Tensor
    labels: torch.Tensor
    ids: torch.Tensor
    mask: torch.Tensor
    slot: int = 0
    logits_needed: int = 0

    @classmethod
    def of(cls, x: Any, y: Any, ids: Any = None) -> "Batch":
        """A batch of images and labels from one's own loader.

        Args:
            x: float [B, C, H, W] in [0, 1], or uint8 in 0..255; not normalised.
            y: labels, integers [B]; moved to the device of `x`.
            ids: int64 [B], which key the random numbers of each image; None numbers the images of this batch, over
                all ranks of torch.distributed.

        Raises:
            UserError: images or labels that are something else.

        Example:
            metrics = method.step(engine, fd.Batch.of(x, y), step)
        """
        check_images(x, grey_levels=True)
        labels = checked_target(y, x, instead="write y.argmax(1)")
        needed = check_batch(x, labels)
        ranked = dist.is_available() and dist.is_initialized()
        slot = len(x) * dist.get_rank() if ranked else 0
        known = torch.arange(slot, slot + len(x), device=x.device) if ids is None else checked_ids(ids, x)
        return cls(x.detach(), labels, known, torch.ones(len(x), dtype=torch.bool, device=x.device), slot, needed)

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on `device`, copied asynchronously from pinned memory."""
        to_host = torch.device(device).type == "cpu"  # where nothing waits for an asynchronous copy
        return self._each(lambda tensor: tensor.to(device, non_blocking=not to_host), self.slot)

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory."""
        return self._each(torch.Tensor.pin_memory, self.slot)

    def split(self, parts: int) -> list["Batch"]:
        """Equal micro-batches in slot order. `parts` divides the batch."""
        size = len(self) // parts
        assert size * parts == len(self), f"a batch of {len(self)} does not split into {parts}"
        return [self._each(lambda t, i=i: t[i : i + size], self.slot + i) for i in range(0, len(self), size)]  # type: ignore[misc]

    def _each(self, function: Callable[[torch.Tensor], torch.Tensor], slot: int) -> "Batch":
        images, labels, ids, mask = map(function, (self.images, self.labels, self.ids, self.mask))
        return Batch(images, labels, ids, mask, slot, self.logits_needed)

    @classmethod
    def cat(cls, parts: "Sequence[Batch]") -> "Batch":
        """Batches of neighbouring slots as one."""
        first = parts[0]
        if len(parts) == 1:
            return first
        names = ("images", "labels", "ids", "mask")
        images, labels, ids, mask = (torch.cat([getattr(part, name) for part in parts]) for name in names)
        return cls(images, labels, ids, mask, first.slot, max(part.logits_needed for part in parts))

    def pixels(self) -> torch.Tensor:
        """fp32 [B, 3, H, W] in [0, 1] (float64 images stay float64)."""
        if self.images.dtype == torch.uint8:
            return self.images.to(torch.float32) / 255
        return self.images if self.images.dtype == torch.float64 else self.images.to(torch.float32)
