"""Robust accuracy: every sample attacked once, counted exactly over all ranks, with its uncertainty."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from scipy.stats import binomtest
from torch import Tensor, nn
from tqdm import tqdm

from fulllora_dist.attacks.pgd import attacked, pgd
from fulllora_dist.attacks.threat import Norm, Threat, threat_model
from fulllora_dist.data.batch import Batch
from fulllora_dist.data.decode import EvalTransform
from fulllora_dist.data.index import Index
from fulllora_dist.data.index_file import published
from fulllora_dist.data.loader import EvalStream
from fulllora_dist.distributed.ranks import Ranks
from fulllora_dist.errors import UserError
from fulllora_dist.models.backbone import BackboneInfo
from fulllora_dist.models.finetune import AdaptedModel
from fulllora_dist.pixels import parse_size

_NAME = re.compile(r"(pgd|cw)([1-9]\d*)(?:x([1-9]\d*))?")
_LOSSES: dict[str, Literal["ce", "margin"]] = {"pgd": "ce", "cw": "margin"}


@dataclass(frozen=True)
class EvalAttack:
    """An attack by its name in the settings.

    Attributes:
        name: `clean`, `pgdK` (cross-entropy) or `cwK` (the margin loss of Carlini and Wagner under PGD), K steps;
            with `xR` behind it the best of R random starts.
        steps: 0 for `clean`.
    """

    name: str
    steps: int = 0
    loss: Literal["ce", "margin"] = "ce"
    restarts: int = 1

    @classmethod
    def parse(cls, name: str) -> "EvalAttack":
        """Raises UserError for a name that means nothing."""
        if name == "clean":
            return cls(name)
        match = _NAME.fullmatch(name)
        if match is None:
            raise UserError(
                f"evaluation.attacks: {name!r} is no attack; known: clean, pgdK and cwK for K steps, "
                "with restarts pgdKxR, e.g. clean,pgd20,cw20,pgd50x5"
            )
        kind, steps, restarts = match.groups()
        return cls(name, int(steps), _LOSSES[kind], int(restarts or 1))

    @property
    def passes(self) -> int:
        """Forward passes a picture, the prediction included; the measure of progress."""
        return 1 + self.restarts * self.steps + (self.restarts if self.restarts > 1 else 0)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, threat: Threat, seed: int, ids: Tensor) -> Tensor:
        """Adversarial examples for `x` (`pgd` says the shapes), with steps of 2.5 eps / K as Madry et al. take, at
        most eps. The random start is keyed by (seed, attack, id)."""
        if self.steps == 0 or threat.eps == 0:
            return x
        return pgd(
            model,
            x,
            y,
            eps=threat.eps,
            norm=threat.norm,
            steps=self.steps,
            step_size=min(2.5 * threat.eps / self.steps, threat.eps),
            restarts=self.restarts,
            loss=self.loss,
            seed=seed,
            ids=ids,
            purpose=f"eval/{self.name}",
        )


class EvalBatches(Protocol):
    """What is evaluated: `data.loader.EvalStream`, or anything alike.

    Attributes:
        ids: int64 [n], all samples over all ranks, ascending.
        index: class names and the labels by id.
    """

    ids: np.ndarray
    index: Index

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Batch]: ...


class Evaluator:
    """Accuracy under each attack, in the form of evaluation.json (docs: `evaluate`).

    Args:
        attacks: names, see `EvalAttack`.
        threat: the ball of perturbations.
        ranks: the batches of all of them are counted; each has a full replica of the model on its device.
        seed: of the random starts.
        backbone, adapter: names for the report.
        precision: what the model computes in, for the report.
        progress: whether rank 0 shows a bar.

    Raises:
        UserError: unknown or repeated attacks.
    """

    def __init__(
        self,
        attacks: Sequence[str],
        threat: Threat,
        ranks: Ranks,
        *,
        seed: int = 0,
        backbone: str | None = None,
        adapter: str | None = None,
        precision: str = "fp32",
        progress: bool = True,
    ):
        self._attacks = self.parse(attacks)
        self._threat = threat
        self._ranks = ranks
        self._seed = seed
        self._shows = progress and ranks.is_main
        self._facts = {"precision": precision, "backbone": backbone, "adapter": adapter}

    @staticmethod
    def parse(attacks: Sequence[str]) -> list[EvalAttack]:
        """The attacks by their names. Raises UserError for unknown, repeated or no attacks."""
        parsed = [EvalAttack.parse(name) for name in attacks]
        if not attacks or len(set(attacks)) < len(attacks):
            raise UserError(
                f"evaluation.attacks: {','.join(attacks) or 'nothing'}; name each attack once, e.g. clean,pgd20"
            )
        return parsed

    def run(self, predict: nn.Module, stream: EvalBatches) -> dict[str, Any]:
        """Evaluate on this rank's batches and sum over all ranks.

        Args:
            predict: fp32 pixels [B, 3, H, W] in [0, 1] -> logits [B, classes], on `ranks.device`; put into evaluation
                mode for the time.
            stream: gives every rank equally many batches, so that collectives inside `predict` (ZeRO-3) meet.

        Returns:
            On every rank the same: {"n", "eps", "norm", "precision", "backbone", "adapter", "ids": [n], "attacks":
            {name: {"accuracy", "low", "high", "correct": [n of 0/1 in the order of ids], "per_class": {class name:
            [correct, n]}}}, "warnings": []}. low and high bound Wilson's 95 % interval.

        Raises:
            UserError: the model has not as many outputs as the data has classes.
        """
        counts = torch.zeros(1 + len(self._attacks), len(stream.ids), dtype=torch.int64)  # seen, then correct by attack
        seen, correct = counts[0], counts[1:]
        with self._progress(len(stream)) as bar, attacked(predict):
            for batch in stream:
                mask = batch.mask.cpu()
                ids = batch.ids.cpu()[mask].numpy()
                positions = torch.from_numpy(np.searchsorted(stream.ids, ids))
                seen.index_add_(0, positions, torch.ones_like(positions))
                batch = batch.to(self._ranks.device)
                for attack, hits in zip(self._attacks, correct, strict=True):
                    hit = self._hits(predict, attack, batch, len(stream.index.classes)).cpu()
                    hits.index_add_(0, positions, hit[mask].to(torch.int64))
                    bar.update(attack.passes)
                shown = correct.sum(dim=1) / seen.sum().clamp(min=1)
                names = [attack.name for attack in self._attacks]
                bar.set_postfix({k: f"{v:.1%}" for k, v in zip(names, shown.tolist(), strict=True)}, refresh=False)
        counts = self._ranks.sum(counts)
        assert bool((counts[0] == 1).all()), (
            f"{int((counts[0] != 1).sum())} of {len(stream.ids)} ids not seen exactly once"
        )
        labels = stream.index.labels[stream.ids]
        return {
            "n": len(stream.ids),
            "eps": self._threat.eps,
            "norm": self._threat.norm,
            **self._facts,
            "ids": stream.ids.tolist(),
            "attacks": {
                attack.name: _score(hits.numpy(), labels, stream.index.classes)
                for attack, hits in zip(self._attacks, counts[1:], strict=True)
            },
            "warnings": [],
        }

    def _progress(self, batches: int) -> tqdm:
        return tqdm(
            total=batches * sum(attack.passes for attack in self._attacks),
            desc="evaluation",
            unit="pass",
            disable=not self._shows,
            dynamic_ncols=True,
            mininterval=0.5,
        )

    def _hits(self, predict: nn.Module, attack: EvalAttack, batch: Batch, classes: int) -> Tensor:
        """bool [B]. Padding is attacked like the rest, so that all ranks do the same passes."""
        x = attack(predict, batch.pixels(), batch.labels, threat=self._threat, seed=self._seed, ids=batch.ids)
        with torch.no_grad():
            logits = predict(x)
        if logits.shape[1] != classes:
            raise UserError(
                f"the data has {classes} classes, the model {logits.shape[1]} outputs; set model.num_classes={classes} "
                "for a new head, or model.classes to rows of the checkpoint's"
            )
        return logits.argmax(dim=1) == batch.labels


def _score(correct: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    right, n = int(correct.sum()), len(correct)
    interval = binomtest(right, n).proportion_ci(confidence_level=0.95, method="wilson")
    return {
        "accuracy": right / n,
        "low": float(interval.low),
        "high": float(interval.high),
        "correct": correct.tolist(),
        "per_class": {
            name: [int(correct[labels == label].sum()), int((labels == label).sum())]
            for label, name in enumerate(classes)
        },
    }


def eval_transform(
    info: BackboneInfo, crop_pct: float | None = None, interpolation: str | None = None
) -> EvalTransform:
    """The crop that a backbone was evaluated with, but for what is given."""
    return EvalTransform(
        size=info.image_size,
        crop_pct=crop_pct or info.crop_pct,
        interpolation=interpolation or info.interpolation,
        crop_mode=info.crop_mode,
    )


def evaluate(
    model: nn.Module,
    data: str | Path | EvalBatches,
    *,
    attacks: Sequence[str] = ("clean", "pgd20"),
    eps: float | str | None = None,
    norm: Norm = "linf",
    n: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    workers: int = 0,
) -> dict[str, Any]:
    """Accuracy of `model` under each attack, in this process, on the device where the model lies.

    Args:
        model: an adapted model, or any module from pixels in [0, 1] to logits.
        data: folder of shards, cropped as the adapted model's backbone asks for; a module of one's own needs a stream.
        attacks: `clean`, `pgdK`, `cwK`, `pgdKxR`: see `EvalAttack`.
        eps: radius in pixels of [0, 1]; None is 4/255 for "linf", for "l2" there is no default.
        norm: "linf" or "l2".
        n: how many pictures, drawn evenly over the classes; None takes all.
        workers: decoding processes.

    Returns:
        See `Evaluator.run`.

    Raises:
        UserError: unknown attacks, no shards there, classes that do not fit the model.
    """
    info = model.info if isinstance(model, AdaptedModel) else None
    if isinstance(data, (str, Path)):
        if info is None:
            raise UserError(
                "evaluate: a folder needs a model of create_model or load, which knows its crop; give an EvalStream"
            )
        data = EvalStream(data, batch_size=batch_size, transform=eval_transform(info), n=n, workers=workers)
    if eps is None and norm != "linf":
        raise UserError(f"eps: norm {norm} has no default; give a length in pixels of [0, 1], e.g. 0.5")
    try:
        radius = parse_size("4/255" if eps is None else eps)
    except ValueError as error:
        raise UserError(f"eps: {error}") from None
    assert isinstance(radius, float)
    parameter = next(model.parameters(), torch.empty(0))
    ranks = Ranks(0, 1, parameter.device, control=None)
    name = info.name if info else type(model).__name__
    in_bf16 = any(p.dtype == torch.bfloat16 for p in model.parameters())
    threat = threat_model(norm, radius)
    evaluator = Evaluator(attacks, threat, ranks, seed=seed, backbone=name, precision="bf16" if in_bf16 else "fp32")
    return evaluator.run(model, data)


def write_evaluation(results: Mapping[str, Any], path: str | Path) -> None:
    """evaluation.json, whole or not at all; its folder is made where there is none."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with published(path) as file:
        file.write((json.dumps(results) + "\n").encode())


def size_in(norm: str, eps: float) -> str:
    """A radius as the field writes it: Linf in grey levels, L2 as a length."""
    return f"{norm} eps = {eps * 255:.4g}/255" if norm == "linf" else f"{norm} eps = {eps:.4g}"


def table(results: Mapping[str, Any]) -> str:
    """The results for people: each attack with its interval, then the classes."""
    attacks: Mapping[str, Any] = results["attacks"]
    width = max(len("attack"), *(len(name) for name in attacks))
    lines = [f"n = {results['n']}, {size_in(results['norm'], results['eps'])}, {results['precision']}", ""]
    lines.append(f"{'attack':<{width}}  accuracy %  95 % interval")
    for name, score in attacks.items():
        low, high = 100 * score["low"], 100 * score["high"]
        lines.append(f"{name:<{width}}  {100 * score['accuracy']:>10.2f}  {low:.1f} to {high:.1f}")
    per_class = {name: score["per_class"] for name, score in attacks.items()}
    first = next(iter(per_class.values()))
    wide = max(len("class"), *(len(str(name)) for name in first))
    lines += ["", f"{'class':<{wide}}      n  " + "  ".join(f"{name:>{max(6, len(name))}}" for name in attacks)]
    for label, (_, n) in first.items():
        if n:
            cells = (f"{100 * per_class[name][label][0] / n:>{max(6, len(name))}.1f}" for name in attacks)
            lines.append(f"{label:<{wide}}  {n:>5}  " + "  ".join(cells))
    return "\n".join([*lines, *(f"warning: {text}" for text in results["warnings"])])
