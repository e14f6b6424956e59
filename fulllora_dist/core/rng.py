"""Randomness keyed by (seed, purpose, step, sample id).

There is no global generator state, so the noise of a sample does not depend on which rank, worker or
micro-batch holds it, on the device, or on what was drawn before a restart. The generator is SplitMix64 used as a
counter-based generator (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014):
output i of key k is mix64(k + (i + 1) * GOLDEN).
"""

import hashlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLY_1 = 0xBF58476D1CE4E5B9
_MULTIPLY_2 = 0x94D049BB133111EB


def _signed(value: int) -> int:
    """The two's complement int64 with the same bits as `value` mod 2**64 (torch has no uint64 arithmetic)."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _shift_right(z: "torch.Tensor", bits: int) -> "torch.Tensor":
    """Logical right shift of int64: torch's `>>` copies the sign bit, which the mask removes."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix64(z: "torch.Tensor") -> "torch.Tensor":
    z = (z ^ _shift_right(z, 30)) * _signed(_MULTIPLY_1)
    z = (z ^ _shift_right(z, 27)) * _signed(_MULTIPLY_2)
    return z ^ _shift_right(z, 31)


def base_key(seed: int, purpose: str, step: int) -> int:
    """64 bits for (seed, purpose, step), from sha256."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{step}".encode()).digest()
    return int.from_bytes(digest[:8], "little")


class SampleRng:
    """Random numbers for a batch, with an independent stream per sample. Draws advance a shared counter."""

    def __init__(self, keys: "torch.Tensor"):
        self._keys = keys  # int64 [B]
        self._drawn = 0

    def uniform(self, shape: Sequence[int]) -> "torch.Tensor":
        """fp32 [B, *shape] in [0, 1), multiples of 2**-24, on the device of the ids."""
        import torch  # here and below: what needs numpy alone need not wait for it

        count = int(np.prod(shape))
        counter = torch.arange(self._drawn + 1, self._drawn + count + 1, device=self._keys.device)
        self._drawn += count
        bits = _mix64(self._keys[:, None] + counter * _signed(_GOLDEN))
        return (_shift_right(bits, 40).to(torch.float32) * 2.0**-24).view(-1, *shape)

    def normal(self, shape: Sequence[int]) -> "torch.Tensor":
        """fp32 [B, *shape] of the standard normal distribution, by Box and Muller's transform of two uniforms each."""
        import torch

        radius = (-2 * torch.log1p(-self.uniform(shape))).sqrt()  # 1 - u is never 0
        return radius * torch.cos(2 * math.pi * self.uniform(shape))


def sample_rng(seed: int, purpose: str, step: int, ids: "torch.Tensor") -> SampleRng:
    """Create random number streams for the samples of a batch.

    Args:
        seed: the run's seed.
        purpose: what the numbers are for, e.g. "pgd/start/0"; different purposes are independent.
        step: the optimizer update (or epoch) they belong to.
        ids: int64 [B], the samples' ids; the numbers are generated on their device.
    """
    return SampleRng(_mix64((ids + 1) * _signed(_GOLDEN) ^ _signed(base_key(seed, purpose, step))))


def numpy_rng(seed: int, purpose: str, step: int, sample_id: int = 0) -> np.random.Generator:
    """Create a numpy Philox generator from the same keys, for code on the host (epoch order, augmentation)."""
    key = base_key(seed, purpose, step)
    # a key above 2**63 is rounded to a float64, as numpy does with a list of it and an id below: the orders of trained
    # runs come from that, and must not depend on numpy's promotion of lists
    words = np.array([key, sample_id], dtype=np.float64 if key >> 63 else np.int64).astype(np.uint64)
    return np.random.Generator(np.random.Philox(key=words))
