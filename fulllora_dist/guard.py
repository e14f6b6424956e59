"""Robust accuracy on pictures held out of the training data, every so many batches, and when it was best."""

from typing import Any

import torch
from torch import Tensor

from fulllora_dist.attacks.pgd import attacked, pgd
from fulllora_dist.attacks.threat import threat_model
from fulllora_dist.build import build_eval_stream, load_index
from fulllora_dist.config import Config
from fulllora_dist.data.batch import Batch
from fulllora_dist.distributed.engine import Engine
from fulllora_dist.distributed.ranks import Ranks
from fulllora_dist.models.backbone import BackboneInfo
from fulllora_dist.models.finetune import AdaptedModel


class Guard:
    """PGD on the same held-out pictures each time, from the same starts: what differs is the adapter alone.

    An adapter that is chosen by the validation set looks too good there; these pictures are in neither set.

    Attributes:
        best: {"step", "robust_accuracy", "of"}: the highest figure so far, the first of equal ones; None before there
            is one. `of` says what was looked at.
    """

    def __init__(self, config: Config, held_out: str, model: BackboneInfo, ranks: Ranks):
        settings, setting = config.guard, "data.held_out"
        n = min(settings.n, len(load_index(held_out, setting)))
        stream = build_eval_stream(config, held_out, model, ranks, n=n, setting=setting)
        self._batches = list(stream)  # in memory: they are few and looked at again and again
        self._n = len(stream.ids)
        self.attack = f"pgd{settings.steps}"
        self._threat = threat_model(config.threat.norm, config.threat.eps)
        self._ranks, self._seed, self._settings = ranks, config.run.seed, settings
        self._of = [stream.index.hash, self._n, self.attack]
        self.best: dict[str, Any] | None = None

    def resume(self, best: dict[str, Any] | None) -> None:
        """Go on from a state's `best`. Figures of other pictures, or under another attack, cannot be compared."""
        self.best = best if best is not None and best["of"] == self._of else None

    def due(self, step: int) -> bool:
        """Whether to look after that many batches."""
        return step % self._settings.every == 0

    def look(self, engine: Engine, step: int) -> float:
        """Robust accuracy of what would be saved now; `best` is up to date then. A collective."""
        with engine.as_saved() as model:
            score = self._robust_accuracy(model)
        if self.best is None or score > self.best["robust_accuracy"]:
            self.best = {"step": step, "robust_accuracy": score, "of": self._of}
        return score

    def _robust_accuracy(self, model: AdaptedModel) -> float:
        """Each rank has equally many batches, so that collectives inside the model (ZeRO-3) meet."""
        with attacked(model):
            correct = torch.stack([self._correct(model, batch.to(self._ranks.device)) for batch in self._batches]).sum()
        return int(self._ranks.sum(correct.cpu())) / self._n

    def _correct(self, model: AdaptedModel, batch: Batch) -> Tensor:
        """How many of a batch are right under the attack that an evaluation of that name makes, int64 scalar."""
        x, steps, eps = batch.pixels(), self._settings.steps, self._threat.eps
        if eps > 0:
            x = pgd(
                model,
                x,
                batch.labels,
                eps=eps,
                norm=self._threat.norm,
                steps=steps,
                step_size=min(2.5 * eps / steps, eps),
                seed=self._seed,
                ids=batch.ids,
                purpose=f"eval/{self.attack}",
            )
        with torch.no_grad():
            right = model(x).argmax(dim=1) == batch.labels
        return (right & batch.mask).sum()


def build_guard(config: Config, model: BackboneInfo, ranks: Ranks) -> Guard | None:
    """None where no pictures are held out."""
    held_out = config.data.held_out
    return None if held_out is None else Guard(config, held_out, model, ranks)
