"""Robust accuracy on pictures held out of the training data, every so many batches, and when it was best."""

from typing import Any

import torch
from torch import nn

from fulllora_dist.attacks.threat import threat_model
from fulllora_dist.build import build_eval_stream, load_index
from fulllora_dist.config import Config
from fulllora_dist.data.subset import Subset
from fulllora_dist.distributed.engine import Engine
from fulllora_dist.distributed.ranks import Ranks
from fulllora_dist.evaluation import EvalAttack
from fulllora_dist.models.backbone import BackboneInfo


class Guard:
    """PGD on the same held-out pictures each time, from the same starts: what differs is the adapter alone.

    An adapter that is chosen by the validation set looks too good there; these pictures are in neither set.

    Attributes:
        best: {"step", "robust_accuracy", "of"}: the highest figure so far, the first of equal ones; None before there
            is one. `of` says what was looked at.
    """

    def __init__(self, config: Config, held_out: str, model: BackboneInfo, ranks: Ranks):
        settings, setting = config.guard, "data.held_out"
        self._n = n = min(settings.n, len(load_index(held_out, setting)))
        stream = build_eval_stream(config, held_out, model, ranks, subset=Subset(n), setting=setting)
        self._batches = list(stream)  # few, and looked at again and again
        self.attack = f"pgd{settings.steps}"
        self._threat = threat_model(config.threat.norm, config.threat.eps)
        self._ranks, self._seed = ranks, config.run.seed
        self._every = settings.every
        self._of = [stream.index.hash, n, self.attack]
        self.best: dict[str, Any] | None = None

    def resume(self, best: dict[str, Any] | None) -> None:
        """Go on from a state's `best`. Figures of other pictures, or under another attack, cannot be compared."""
        self.best = best if best is not None and best["of"] == self._of else None

    def due(self, step: int) -> bool:
        """Whether to look after that many batches."""
        return step % self._every == 0

    def _accuracy(self, model: nn.Module) -> float:
        """Every rank has equally many batches, as the forward passes of ZeRO-3 are collectives."""
        attack, right = EvalAttack.parse(self.attack), torch.tensor(0)
        for kept in self._batches:
            batch = kept.to(self._ranks.device)
            x, y = batch.pixels(), batch.labels
            hits = attack.right(model, x, y, threat=self._threat, seed=self._seed, ids=batch.ids)
            right += int((hits & batch.mask).sum())
        return int(self._ranks.sum(right)) / self._n

    def look(self, engine: Engine, step: int) -> float:
        """Robust accuracy of what would be saved now; `best` is up to date then. A collective."""
        with engine.as_saved() as model:
            score = self._accuracy(model)
        if self.best is None or score > self.best["robust_accuracy"]:
            self.best = {"step": step, "robust_accuracy": score, "of": self._of}
        return score


def build_guard(config: Config, model: BackboneInfo, ranks: Ranks) -> Guard | None:
    """None where no pictures are held out."""
    held_out = config.data.held_out
    return None if held_out is None else Guard(config, held_out, model, ranks)
