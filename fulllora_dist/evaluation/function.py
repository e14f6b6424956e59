"""Robust accuracy of a model, in this process: what `fulllora_dist.evaluate` is."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fulllora_dist.attacks.arguments import checked_count, checked_size
from fulllora_dist.attacks.settings import Norm
from fulllora_dist.attacks.threat import Threat, threat_model
from fulllora_dist.attacks.victim import Victim
from fulllora_dist.core.errors import UserError
from fulllora_dist.data.loader import EvalStream
from fulllora_dist.data.subset import Subset
from fulllora_dist.distributed.comm import Comm
from fulllora_dist.evaluation.attack_names import further_norms
from fulllora_dist.evaluation.entering import CheckedImages, measured_precision, outputs_of
from fulllora_dist.evaluation.evaluator import Evaluator
from fulllora_dist.evaluation.images import EvalImages
from fulllora_dist.evaluation.own_images import BATCH_SIZE, OwnImages
from fulllora_dist.evaluation.report import EvaluationReport
from fulllora_dist.evaluation.trained import eval_transform, record_of, unwrapped
from fulllora_dist.evaluation.transfer import load_sources
from fulllora_dist.models.adapted_model import AdaptedModel
from fulllora_dist.models.adapter_file import adapter_sha256, load


def evaluate(
    model: nn.Module,
    data: str | Path | EvalImages | Iterable[Any],
    *,
    attacks: Sequence[str] = ("clean", "pgd20"),
    eps: float | str | None = None,
    norm: Norm | None = None,
    norms: Mapping[Norm, float | str] | None = None,
    num_samples: int | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
    gradient_masking_samples: int = 0,
    transfer_from: Mapping[str, nn.Module] | None = None,
    classes: Sequence[str] | None = None,
    workers: int = 0,
) -> EvaluationReport:
    """Accuracy of `model` under each attack, in this process, on the device where the model lies.

    Args:
        model: an adapted model, or any module from pixels in [0, 1] to logits. The report's precision is measured at
            one image; autocast around the call is off inside.
        data: folder or URL of shards, cropped as the adapter was trained with, or else as its backbone asks for (a
            module of one's own needs an `EvalStream`); a DataLoader or another iterable of (x, y), or of (x, y, ids);
            or one such pair. x [B, C, H, W] in [0, 1], not normalised, or uint8; y int [B]. An image without an id has
            its position as id. A loader is read once, and its images are kept in host memory. Labels are mapped to the
            adapter's classes by name, where names are known.
        attacks: `clean`, `fgsm`, `pgdK`, `cwK`, `dlrK`, `pgdKxR`, `autoattack`, `transfer:NAME`: see `EvalAttack`.
        eps: radius in pixels of [0, 1]; None is what the adapter was trained for, or else 4/255 for "linf"; for "l2"
            and "l1" there is no other default.
        norm: "linf", "l2" or "l1"; None is what the adapter was trained for, or else "linf".
        norms: further norms, each with its eps: {"l2": 2, "l1": 255}; report["more_norms"] has them.
        num_samples: how many images, drawn evenly over the classes; None takes all.
        gradient_masking_samples: on how many images symptoms of masked gradients are looked for; 0 looks for none.
        batch_size: images a batch; None is a loader's own, or else 64.
        seed: of the attacks' random starts; None is that of the adapter's run, or else 0.
        transfer_from: {NAME: the model of `transfer:NAME`}, any module from pixels to logits, which is moved to the
            device of `model`; other names are folders or URLs of adapters.
        classes: names of the labels of a loader or pair, in order; None takes those of the loader's data set, as
            torchvision's `ImageFolder` has them.
        workers: decoding threads, where `data` is a folder.

    Returns:
        The content of evaluation.json, a plain dict: report["attacks"]["pgd20"]["accuracy"].

    Raises:
        UserError: unknown attacks, no shards there, other classes than the model's (`match_classes`), pixels outside
            [0, 1], labels beyond the model's outputs, a loader that shuffles and yields no ids.

    Example:
        report = fd.evaluate(model, loader, attacks=("clean", "pgd20"), eps="4/255")
        report["worst_case"]["accuracy"]
    """
    if isinstance(attacks, str) or not isinstance(attacks, Sequence):
        raise UserError(f"attacks must be a list of names, e.g. ['clean', 'pgd20'], got {attacks!r}")
    if wrong := [name for name in attacks if not isinstance(name, str)]:
        raise UserError(f"attacks must be names, e.g. ['clean', 'pgd20'], got {wrong[0]!r}")
    if norms is not None and not isinstance(norms, Mapping):
        raise UserError(f'norms must be a mapping from norm to eps, e.g. {{"l2": 2}}, got {norms!r}')
    if batch_size is not None:
        batch_size = checked_count("batch_size", batch_size, at_least=1)
    gradient_masking_samples = checked_count("gradient_masking_samples", gradient_masking_samples, at_least=0)
    predict, model = Victim(model), unwrapped(model)
    info = model.info if isinstance(model, AdaptedModel) else None
    record = record_of(model)
    threat = _threat(norm, eps, record.threat)
    more = further_norms([f"{other}={size}" for other, size in (norms or {}).items()], threat.norm)
    given = transfer_from or {}
    sources = load_sources(attacks, lambda name: given[name] if name in given else _loaded(name, given))
    parameter = next(model.parameters(), torch.empty(0))
    images = CheckedImages(_images(data, predict, parameter.device, classes, num_samples, batch_size, workers))
    comm = Comm(0, 1, parameter.device, control=None)
    name = info.name if info else type(model).__name__
    evaluator = Evaluator(
        attacks,
        threat,
        comm,
        more_threats=[threat_model(*ball) for ball in more],
        seed=seed if seed is not None else record.seed or 0,
        gradient_masking_samples=gradient_masking_samples,
        sources=sources,
        backbone=name,
        adapter_sha256=adapter_sha256(model) if isinstance(model, AdaptedModel) and model.taken_off is None else None,
        precision=measured_precision(predict, images, comm.device),
    )
    with torch.inference_mode(False):
        return evaluator.run(predict, images)


def _loaded(name: str, given: Collection[str]) -> nn.Module:
    try:
        return load(name)
    except UserError as error:
        if not given:
            raise
        raise UserError(f"{error}; or one of transfer_from: {', '.join(given)}") from None


def _images(
    data: Any,
    predict: Victim,
    device: torch.device,
    classes: Sequence[str] | None,
    num_samples: int | None,
    batch_size: int | None,
    workers: int,
) -> EvalImages:
    """What an evaluation asks of its images, of all that `evaluate` takes.

    Raises:
        UserError: something else, or an argument that has no meaning for it.
    """
    shards, model = isinstance(data, (str, Path)), unwrapped(predict)
    if classes is not None and (shards or isinstance(data, EvalImages)):
        raise UserError("classes: shards and streams have their own class names; leave it out")
    if shards:
        if not isinstance(model, AdaptedModel):
            raise UserError(
                "evaluate: a folder needs a model of create_model or load, which knows its crop; give an EvalStream"
            )
        subset, transform = Subset(num_samples), eval_transform(model)
        return EvalStream(
            data, batch_size=batch_size or BATCH_SIZE, transform=transform, subset=subset, workers=workers
        )
    if isinstance(data, EvalImages):
        for name, given in (("num_samples", num_samples), ("batch_size", batch_size)):
            if given is not None:
                raise UserError(f"{name}: a stream has its own; give it to the EvalStream instead")
        return data
    own = OwnImages(data, classes, num_samples, batch_size)
    own.label(outputs_of(predict, own.read(own.ids[:1]).to(device).pixels()))
    return own


def _threat(norm: Norm | None, eps: float | str | None, trained: tuple[str, float] | None) -> Threat:
    """The ball that is asked for; what is left out is that of the training.

    Raises:
        UserError: an eps without a norm where the training's is not linf; an invalid one.
    """
    if norm is None and eps is not None and trained is not None and trained[0] != "linf":
        raise UserError(
            f"norm: the adapter was trained for {trained[0]}; give norm, as eps={eps} has no meaning without"
        )
    chosen = norm or (trained[0] if trained else "linf")
    threat_model(chosen, 0)  # a norm that it knows
    if eps is None:
        eps = trained[1] if trained and trained[0] == chosen else "4/255" if chosen == "linf" else None
    if eps is None:
        raise UserError(f"eps: norm {chosen} has no default; give a length in pixels of [0, 1], e.g. 0.5")
    return threat_model(chosen, checked_size("eps", eps, chosen))
