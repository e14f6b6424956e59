"""What is known of each image under each attack: who still stands, and so whom AutoAttack's next part attacks."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fulllora_dist.evaluation.attack_names import AttackName
from fulllora_dist.evaluation.work_items import WorkItem

_UNSEEN = 2
_CLEAN = ("clean",)


class Verdicts:
    """Of every image, under an attack: 1 where the model is correct, 0 where it is wrong, -k where it is wrong and k
    logits are not finite. AutoAttack's parts run one after the other on the images that the ones before left, the
    first one on those that are classified correctly.

    Args:
        ids: int64 [N], sorted.
    """

    def __init__(self, ids: np.ndarray):
        self.ids = ids
        self._known: dict[tuple[str, int, Sequence[str]], np.ndarray] = {}

    def record(self, items: Iterable[WorkItem], results: Mapping[str, Any]) -> None:
        """Take the results of finished items, of which each one's `attack` is known up to the part before."""
        for item in items:
            if item.attack is None:
                continue
            key = (item.variant, item.radius, item.attack.parts or (item.attack.name,))
            if key not in self._known:
                start = self._after(*key[:2], item.attack.parts[:-1]) if item.attack.parts else None
                self._known[key] = np.full(len(self.ids), _UNSEEN) if start is None else start.copy()
            self._known[key][np.searchsorted(self.ids, item.ids)] = results[item.name]

    def of(self, variant: str, radius: int, attack: AttackName) -> np.ndarray:
        """int64 [N], the verdict on each image."""
        if attack.parts:
            return self._after(variant, radius, attack.parts)
        found = self._known[variant, radius, (attack.name,)]
        assert (found < _UNSEEN).all(), f"{attack.name}: not every sample was seen"
        return found

    def survivors(self, variant: str, radius: int, parts: Sequence[str]) -> np.ndarray:
        """The ids that these parts, one after the other, leave; of no part, those that are classified correctly."""
        return self.ids[self._after(variant, radius, tuple(parts)) == 1]

    def _after(self, variant: str, radius: int, parts: tuple[str, ...]) -> np.ndarray:
        if not parts:
            return self._known[variant, 0, _CLEAN]
        known = self._known.get((variant, radius, parts))  # None where it had nobody to attack
        return self._after(variant, radius, parts[:-1]) if known is None else known
