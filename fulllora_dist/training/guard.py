"""Regular checks of robust accuracy on held-out images, which find the best checkpoint and detect a collapse."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fulllora_dist.attacks.pgd import attack_mode, is_correct
from fulllora_dist.attacks.threat import threat_model
from fulllora_dist.config.schema import Config
from fulllora_dist.core.errors import SharedUserError
from fulllora_dist.data.class_names import match_classes
from fulllora_dist.data.subset import Subset
from fulllora_dist.distributed.comm import Comm
from fulllora_dist.distributed.engine import Engine
from fulllora_dist.evaluation.attacks import EvalAttack
from fulllora_dist.models.adapted_model import AdaptedModel
from fulllora_dist.training.build import build_eval_stream
from fulllora_dist.training.inputs import load_index
from fulllora_dist.training.phases import Phases

_SHOWN = 4  # example images logged to the tracker
_FEWEST = 10  # images that the best check must have got right before a drop counts as a collapse
_GOOD = 0.9  # fraction of the best: a run does not roll back to where robust accuracy was already falling


@dataclass(frozen=True)
class Check:
    """The result of a check.

    Attributes:
        keep: whether to save a checkpoint, as it is the best so far or the newest good one.
        collapsed: whether to act on a collapse.
    """

    keep: bool
    collapsed: bool


@dataclass(frozen=True)
class Examples:
    """A few example images, on the host.

    Attributes:
        clean, adversarial: [N, 3, H, W] in [0, 1].
        labels, before, after: int64 [N], true classes and the predictions for clean and adversarial images.
    """

    clean: Tensor
    adversarial: Tensor
    labels: Tensor
    before: Tensor
    after: Tensor


class Guard:
    """Checks an adapter with PGD on held-out images.

    Every check takes the same images and the same random starts, so that only the adapter differs. The images are in
    neither the training nor the validation set: an adapter selected on the validation set would look too good there.
    The best adapter is selected among those that would be saved. With optim.ema_decay that is an average, which shows
    a collapse hundreds of updates late, so a collapse is detected on the trained parameters themselves.

    Attributes:
        attack: name of the attack, as in an evaluation.
        best: {"step", "robust_accuracy", "trained", "of"} of the check with the highest robust accuracy, the first
            one of equals; None before the first check. `trained` is the robust accuracy of the trained parameters, `of`
            identifies the images and the attack.
        last: {"step", "robust_accuracy", "trained"} of the newest check.
        highest: the highest robust accuracy of the trained parameters.
        good: step of the newest good checkpoint, to which a run rolls back; None if there is none.
        clean_accuracy: of the newest check; None before the first one.
        examples: of the newest check, from this rank's images.
        classes: names of the model's outputs.
        has_collapsed: whether the newest check is a collapse.
        images_computed: images that a check computes on all ranks together, with the padding of the last batches.

    Raises:
        SharedUserError: too few images to detect a collapse, although guard.on_collapse acts on one.
    """

    def __init__(self, config: Config, held_out: str, model: AdaptedModel, comm: Comm):
        settings, setting = config.guard, "data.held_out"
        n = min(settings.num_samples, len(load_index(held_out, setting)))
        size, count = batches_of_check(n, comm.world, config.evaluation.batch_size)
        self.images_computed = size * count * comm.world
        stream = build_eval_stream(config, held_out, model, comm, subset=Subset(n), batch_size=size, setting=setting)
        match = match_classes(model.record.classes, stream.index.classes)
        # kept in memory: few, and used in every check
        self._batches = [replace(batch, labels=match.of(batch.labels)) for batch in stream]
        self._n, self._batch_size = len(stream.ids), config.optim.batch_size
        self.attack = f"pgd{settings.steps}"
        self._threat = threat_model(config.threat.norm, config.threat.eps)
        self._comm, self._seed, self._settings = comm, config.run.seed, settings
        self._checkpoint_every, self._averages = config.run.checkpoint_every, config.optim.ema_decay > 0
        self._of = [stream.index.hash, self._n, self.attack]
        self._least = least_that_counts(self._n, model.info.num_classes)
        if self._least > 1 and settings.on_collapse != "warn":
            raise SharedUserError(
                f"guard.on_collapse: {settings.on_collapse}: {self._n} held-out images are too few to tell a "
                "collapse from chance; hold out more and set guard.num_samples to 100 or more"
            )
        self.best: dict[str, Any] | None = None
        self.last: dict[str, Any] | None = None
        self.good: int | None = None
        self.highest = 0.0
        self.clean_accuracy: float | None = None
        self.examples: Examples | None = None
        self.classes = model.record.classes or stream.index.classes
        self.has_collapsed = self._due = False

    def state_dict(self) -> dict[str, Any]:
        """The state to save in a checkpoint besides `best`."""
        rest = {"last": self.last, "highest": self.highest, "good": self.good}
        return rest | {"has_collapsed": self.has_collapsed, "due": self._due}

    def resume(self, best: dict[str, Any] | None, rest: Mapping[str, Any]) -> None:
        """Restore `best` and `state_dict` of a checkpoint, unless they are of other images or another attack and so not
        comparable."""
        if best is None or best["of"] != self._of:
            best, rest = None, {}
        self.best, self.last, self.good = best, rest.get("last", best), rest.get("good")
        self.highest = rest.get("highest", best["robust_accuracy"] if best else 0.0)
        self.has_collapsed, self._due = rest.get("has_collapsed", False), rest.get("due", False)

    def due(self, step: int, skipping: bool) -> bool:
        """Whether to check after `step` batches. While updates are skipped, a check is postponed."""
        self._due |= step % self._settings.every == 0
        check_now = self._due and not skipping
        self._due &= skipping
        return check_now

    def share(self, phases: Phases, batch_size: int) -> float:
        """Cost of all checks of a run as a fraction of its training's, both in passes of an image, of which a backward
        pass is one and a forward pass another."""
        passes = 2 * self._settings.steps + 2  # the attack's, and of the clean and the perturbed image
        checks = math.ceil(phases.total_steps / self._settings.every)
        trained = sum((phase.end - phase.first) * sum(phase.method.passes()) for phase in phases.phases) * batch_size
        return checks * (1 + self._averages) * passes * self.images_computed / trained

    def check(self, engine: Engine, step: int) -> Check:
        """Check the adapter that would be saved now, and update the attributes. A collective."""
        trained = self._attacked(engine.model)[0] if engine.keeps_average else None
        with engine.as_saved() as model:
            score, self.clean_accuracy, self.examples = self._attacked(model)
        return self.judge(score, step, trained)

    def judge(self, score: float, step: int, trained: float | None = None) -> Check:
        """Judge a robust accuracy of `score` after `step` batches.

        The good checkpoint is always one that was checked. Which one depends on the accuracies and
        `run.checkpoint_every` only, not on when writing a checkpoint finished, so that a rollback is reproducible.

        Args:
            trained: robust accuracy of the trained parameters, if it differs from `score` (optim.ema_decay).
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
            keep |= self.good is None or step // self._checkpoint_every > self.good // self._checkpoint_every
            if keep:
                self.good = step
        return Check(keep, collapsed)

    def metrics(self, last: bool) -> dict[str, float]:
        """Metrics of the newest check by name, with those of the best one if it is the run's `last` check."""
        assert self.best is not None
        assert self.last is not None
        metrics = {"robust_accuracy": self.last["robust_accuracy"]}
        if self.last["trained"] != self.last["robust_accuracy"]:
            metrics["trained_robust_accuracy"] = self.last["trained"]
        if self.clean_accuracy is not None:
            metrics["clean_accuracy"] = self.clean_accuracy
        if last:
            best = {"best_robust_accuracy": self.best["robust_accuracy"], "best_step": self.best["step"]}
            metrics |= best | {"last_robust_accuracy": self.last["robust_accuracy"]}
        return metrics

    @property
    def overfitted(self) -> bool:
        """Whether the newest check is significantly below the best one: robust overfitting."""
        if self.best is None or self.last is None:
            return False
        return surely_below(self.last["robust_accuracy"], self.best["robust_accuracy"], self._n)

    def describe(self) -> str:
        """One line about the newest and the best check. Call after a check."""
        assert self.best is not None
        assert self.last is not None
        last, best = (f"{100 * x['robust_accuracy']:.1f} % at batch {x['step']}" for x in (self.last, self.best))
        return f"{self.attack} on {self._n} held-out images: {last}, best {best}"

    def describe_collapse(self) -> str:
        """One line about the newest and the highest robust accuracy of the trained parameters. Call after a check."""
        assert self.last is not None
        figures = f"{100 * self.last['trained']:.1f} % at batch {self.last['step']}, best {100 * self.highest:.1f} %"
        return f"{self.attack} on {self._n} held-out images: {figures}"

    @property
    def good_steps(self) -> list[int]:
        """Steps of the checkpoints that a run may roll back to, in the order to try them."""
        steps = [self.good]
        # an average may be at its best when the parameters have already collapsed
        if self.best is not None and self._trained_at_best(self.best) >= _GOOD * self.highest:
            steps.append(self.best["step"])
        return list(dict.fromkeys(step for step in steps if step is not None))

    def _trained_at_best(self, best: Mapping[str, Any]) -> float:
        """Robust accuracy of the trained parameters at the best check, 0 if unknown."""
        return best.get("trained", 0.0 if self._averages else best["robust_accuracy"])

    def _attacked(self, model: AdaptedModel) -> tuple[float, float, Examples]:
        """Robust accuracy, clean accuracy and examples. All ranks have equally many batches, as the forward passes of
        ZeRO-3 are collectives."""
        attack = EvalAttack.parse(self.attack)
        correct = torch.zeros(2, dtype=torch.int64, device=self._comm.device)
        examples: Examples | None = None
        for host_batch in self._batches:
            batch = host_batch.to(self._comm.device)
            x, y = batch.pixels(), batch.labels
            x_adv = attack(model, x, y, threat=self._threat, seed=self._seed, ids=batch.ids)
            with torch.no_grad(), attack_mode(model):
                before, after = model(x), model(x_adv)
            clean = is_correct(before, y) & batch.mask
            robust = clean & is_correct(after, y)  # the clean image is in the ball, too
            correct += torch.stack([clean.sum(), robust.sum()])
            if examples is None:
                shown = (x, x_adv, y, before.argmax(dim=1), after.argmax(dim=1))
                examples = Examples(*(t[batch.mask][:_SHOWN].cpu() for t in shown))
        assert examples is not None
        clean_sum, robust_sum = self._comm.sum(correct).tolist()
        return robust_sum / self._n, clean_sum / self._n, examples


def build_guard(config: Config, model: AdaptedModel, comm: Comm) -> Guard | None:
    """Build the guard of a config; None if it has no data.held_out. `model.record` says which class each output is."""
    held_out = config.data.held_out
    return None if held_out is None else Guard(config, held_out, model, comm)


def batches_of_check(n: int, world: int, largest: int) -> tuple[int, int]:
    """Images of a batch, at most `largest`, and batches on each rank with which `n` images are the least padded.

    All ranks have equally many batches: with batches of `largest`, 64 ranks would compute 4,096 images for 256."""
    count = math.ceil(n / (world * largest))
    return math.ceil(n / (world * count)), count


def surely_below(score: float, best: float, n: int) -> bool:
    """Whether `score` is below `best`, both accuracies on n images, by more than two standard errors of the difference.

    The standard error is that of independent samples, which is conservative for the same images and random starts."""
    variance = (best * (1 - best) + score * (1 - score)) / n
    return best - score > 2 * math.sqrt(variance)


def least_that_counts(n: int, classes: int) -> float:
    """The least robust accuracy of the best check from which a collapse can be detected.

    At least ten images, and four standard deviations above chance, as the best of many checks is a lucky one. Half of
    anything less is noise."""
    chance = 1 / classes
    return max(_FEWEST / n, chance + 4 * math.sqrt(chance * (1 - chance) / n))
