"""Robust accuracy on images held out of the training data, every so many batches, and when it was best."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fulllora_dist.attacks.pgd import attack_mode
from fulllora_dist.attacks.threat import threat_model
from fulllora_dist.config.schema import Config
from fulllora_dist.core.errors import SharedUserError
from fulllora_dist.data.subset import Subset
from fulllora_dist.distributed.comm import Comm
from fulllora_dist.distributed.engine import Engine
from fulllora_dist.evaluation import EvalAttack, is_right
from fulllora_dist.models.adapted_model import AdaptedModel
from fulllora_dist.models.backbone import BackboneInfo
from fulllora_dist.training.build import build_eval_stream, load_index

_SHOWN = 4  # images that people get to see
_FEWEST = 10  # images that have to be right at the best look, before fewer of them are a collapse
_GOOD = 0.9  # of the best: a run does not go back to where it has begun to fall


@dataclass(frozen=True)
class Check:
    """What a look has found.

    Attributes:
        robust_accuracy: of what would be saved now.
        keep: whether the state is to be kept: the best so far, or the newest good one.
        collapsed: whether a collapse is to be answered.
    """

    robust_accuracy: float
    keep: bool
    collapsed: bool


@dataclass(frozen=True)
class Examples:
    """A few of the images, on the host.

    Attributes:
        clean, adversarial: [N, 3, H, W] in [0, 1].
        labels, before, after: int64 [N], true classes and the predictions for both.
    """

    clean: Tensor
    adversarial: Tensor
    labels: Tensor
    before: Tensor
    after: Tensor


class Guard:
    """PGD on the same held-out images each time, from the same starts: what differs is the adapter alone.

    An adapter that is chosen by the validation set looks too good there; these images are in neither set. What would
    be saved is judged for the best; where that is an average of many updates, a collapse shows in it hundreds of
    updates late, so the parameters that train are looked at too, and judged for a collapse.

    Attributes:
        attack: its name, as in an evaluation.
        best: {"step", "robust_accuracy", "trained", "of"}: the highest figure so far, the first of equal ones; None
            before there is one. `trained` is that of the parameters that train, `of` says what was looked at.
        last: {"step", "robust_accuracy", "trained"} of the newest look, the last of the parameters that train.
        highest: the highest figure of the parameters that train.
        good: step of the newest good state, to which a run goes back; None where it never does.
        clean_accuracy: of the newest look; None before.
        examples: of the newest look, of this rank's images.
        classes: names of all classes.
        has_collapsed: whether the newest check is a collapse.

    Raises:
        SharedUserError: too few images to notice a collapse by, where one is to be answered.
    """

    def __init__(self, config: Config, held_out: str, model: BackboneInfo, comm: Comm):
        settings, setting = config.guard, "data.held_out"
        n = min(settings.num_samples, len(load_index(held_out, setting)))
        stream = build_eval_stream(config, held_out, model, comm, subset=Subset(n), setting=setting)
        self._batches = list(stream)  # in memory: they are few and looked at again and again
        self._n = len(stream.ids)
        self.attack = f"pgd{settings.steps}"
        self._threat = threat_model(config.threat.norm, config.threat.eps)
        self._comm, self._seed, self._settings = comm, config.run.seed, settings
        self._save_every, self._averages = config.run.checkpoint_every, config.optim.ema_decay > 0
        self._of = [stream.index.hash, self._n, self.attack]
        self._least = least_that_counts(self._n, model.num_classes)
        if self._least > 1 and settings.on_collapse != "warn":
            raise SharedUserError(
                f"guard.on_collapse: {settings.on_collapse}: {self._n} held-out images are too few to tell a "
                "collapse from chance; hold more out, with guard.num_samples of 100 or more"
            )
        self.best: dict[str, Any] | None = None
        self.last: dict[str, Any] | None = None
        self.good: int | None = None
        self.highest = 0.0
        self.clean_accuracy: float | None = None
        self.examples: Examples | None = None
        self.classes = stream.index.classes
        self.has_collapsed = self._due = False

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to know besides `best`."""
        rest = {"last": self.last, "highest": self.highest, "good": self.good}
        return rest | {"has_collapsed": self.has_collapsed, "due": self._due}

    def resume(self, best: dict[str, Any] | None, rest: Mapping[str, Any]) -> None:
        """Go on from a state's `best` and `state_dict`. Figures of other images, or under another attack, cannot be
        compared."""
        if best is None or best["of"] != self._of:
            best, rest = None, {}
        self.best, self.last, self.good = best, rest.get("last", best), rest.get("good")
        self.highest = rest.get("highest", best["robust_accuracy"] if best else 0.0)
        self.has_collapsed, self._due = rest.get("has_collapsed", False), rest.get("due", False)

    def due(self, step: int, skipping: bool) -> bool:
        """Whether to look after that many batches; while updates are skipped a look waits for one that is made."""
        self._due |= step % self._settings.every == 0
        looks = self._due and not skipping
        self._due &= skipping
        return looks

    def check(self, engine: Engine, step: int) -> Check:
        """Look at what would be saved now; the attributes are up to date then. A collective."""
        trained = self._attacked(engine.model)[0] if engine.keeps_average else None
        with engine.as_saved() as model:
            score, self.clean_accuracy, self.examples = self._attacked(model)
        return self.judge(score, step, trained)

    def judge(self, score: float, step: int, trained: float | None = None) -> Check:
        """What a robust accuracy of `score` after `step` batches means, with that of the parameters that train where it
        is another.

        The good state is one that was looked at, and which one it is follows from the figures and
        `run.checkpoint_every` alone, not from when the writing of a state was done: a run that goes back does so to
        the same state always.
        """
        trained = score if trained is None else trained
        self.last = {"step": step, "robust_accuracy": score, "trained": trained}
        best = self.best is None or score > self.best["robust_accuracy"]
        if best:
            self.best = {"step": step, "robust_accuracy": score, "trained": trained, "of": self._of}
        self.highest = highest = max(self.highest, trained)
        below = trained < self._settings.collapse_below * highest
        has_collapsed = below and highest >= self._least and surely_below(trained, highest, self._n)
        warns = self._settings.on_collapse == "warn"
        collapsed = has_collapsed and not (warns and self.has_collapsed)
        self.has_collapsed = has_collapsed
        keep = best
        if not warns and trained >= _GOOD * highest:
            keep |= self.good is None or step // self._save_every > self.good // self._save_every
            if keep:
                self.good = step
        return Check(score, keep, collapsed)

    def metrics(self, last: bool) -> dict[str, float]:
        """Of the newest look, by name; of the run's `last` one with the best."""
        assert self.best is not None
        assert self.last is not None
        found = {"robust_accuracy": self.last["robust_accuracy"]}
        if self.last["trained"] != self.last["robust_accuracy"]:
            found["trained_robust_accuracy"] = self.last["trained"]
        if self.clean_accuracy is not None:
            found["clean_accuracy"] = self.clean_accuracy
        if last:
            best = {"best_robust_accuracy": self.best["robust_accuracy"], "best_step": self.best["step"]}
            found |= best | {"last_robust_accuracy": self.last["robust_accuracy"]}
        return found

    @property
    def overfitted(self) -> bool:
        """Whether the last look is surely below the best: robust overfitting."""
        if self.best is None or self.last is None:
            return False
        return surely_below(self.last["robust_accuracy"], self.best["robust_accuracy"], self._n)

    def describe(self) -> str:
        """Last and best look, for people; after a look."""
        assert self.best is not None
        assert self.last is not None
        last, best = (f"{100 * x['robust_accuracy']:.1f} % at batch {x['step']}" for x in (self.last, self.best))
        return f"{self.attack} on {self._n} held-out images: {last}, best {best}"

    def describe_collapse(self) -> str:
        """Newest and highest figure of the parameters that train, for people; after a look."""
        assert self.last is not None
        figures = f"{100 * self.last['trained']:.1f} % at batch {self.last['step']}, best {100 * self.highest:.1f} %"
        return f"{self.attack} on {self._n} held-out images: {figures}"

    @property
    def good_steps(self) -> list[int]:
        """Steps of the states that a run may go back to, the one to try first first."""
        steps = [self.good]
        # an average may be at its best when the parameters have fallen
        if self.best is not None and self._trained_at_best(self.best) >= _GOOD * self.highest:
            steps.append(self.best["step"])
        return list(dict.fromkeys(step for step in steps if step is not None))

    def _trained_at_best(self, best: Mapping[str, Any]) -> float:
        """Earlier states do not say it; with an average it is not known then."""
        return best.get("trained", 0.0 if self._averages else best["robust_accuracy"])

    def _attacked(self, model: AdaptedModel) -> tuple[float, float, Examples]:
        """Robust and clean accuracy. Every rank has equally many batches, as the forward passes of ZeRO-3 are
        collectives."""
        attack, right = EvalAttack.parse(self.attack), torch.zeros(2, dtype=torch.int64)
        examples: Examples | None = None
        for kept in self._batches:
            batch = kept.to(self._comm.device)
            x, y = batch.pixels(), batch.labels
            made = attack(model, x, y, threat=self._threat, seed=self._seed, ids=batch.ids)
            with torch.no_grad(), attack_mode(model):
                before, after = model(x), model(made)
            clean = is_right(before, y) & batch.mask
            robust = clean & is_right(after, y)  # the image is in the ball, too
            right += torch.stack([clean.sum(), robust.sum()]).cpu()
            if examples is None:
                shown = (x, made, y, before.argmax(dim=1), after.argmax(dim=1))
                examples = Examples(*(t[batch.mask][:_SHOWN].cpu() for t in shown))
        assert examples is not None
        clean_sum, robust_sum = self._comm.sum(right).tolist()
        return robust_sum / self._n, clean_sum / self._n, examples


def build_guard(config: Config, model: BackboneInfo, comm: Comm) -> Guard | None:
    """None where no images are held out."""
    held_out = config.data.held_out
    return None if held_out is None else Guard(config, held_out, model, comm)


def surely_below(score: float, best: float, n: int) -> bool:
    """Whether an accuracy is below another one on as many images by more than two standard errors of the difference.
    Of the same images, from the same starts, the difference varies less than these independent ones would."""
    variance = (best * (1 - best) + score * (1 - score)) / n
    return best - score > 2 * math.sqrt(variance)


def least_that_counts(n: int, classes: int) -> float:
    """Robust accuracy from which on a best look can be fallen below: ten images, and four standard deviations above
    that of guessing, as the best of many looks is a lucky one. Less is noise, and half of it too."""
    chance = 1 / classes
    return max(_FEWEST / n, chance + 4 * math.sqrt(chance * (1 - chance) / n))
