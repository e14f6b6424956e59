"""Robust accuracy of a model, in this process: what `fulllora_dist.evaluate` is."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from fulllora_dist.attacks.settings import Norm
from fulllora_dist.attacks.threat import threat_model
from fulllora_dist.attacks.victim import Victim
from fulllora_dist.core.errors import UserError
from fulllora_dist.core.units import parse_size
from fulllora_dist.data.loader import EvalStream
from fulllora_dist.data.subset import Subset
from fulllora_dist.data.transforms import EvalTransform
from fulllora_dist.distributed.comm import Comm
from fulllora_dist.evaluation.entering import CheckedImages, measured_precision, unwrapped
from fulllora_dist.evaluation.evaluator import Evaluator
from fulllora_dist.evaluation.images import EvalImages
from fulllora_dist.evaluation.report import EvaluationReport
from fulllora_dist.models.adapted_model import AdaptedModel
from fulllora_dist.models.backbone import BackboneInfo


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
    data: str | Path | EvalImages,
    *,
    attacks: Sequence[str] = ("clean", "pgd20"),
    eps: float | str | None = None,
    norm: Norm = "linf",
    num_samples: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    gradient_masking_samples: int = 0,
    workers: int = 0,
) -> EvaluationReport:
    """Accuracy of `model` under each attack, in this process, on the device where the model lies.

    Args:
        model: an adapted model, or any module from pixels in [0, 1] to logits. The report's precision is measured at
            one image; autocast around the call is off inside.
        data: folder of shards, cropped as the adapted model's backbone asks for; a module of one's own needs a stream.
        attacks: `clean`, `fgsm`, `pgdK`, `cwK`, `dlrK`, `pgdKxR`, `autoattack`: see `EvalAttack`.
        eps: radius in pixels of [0, 1]; None is 4/255 for "linf", for "l2" there is no default.
        norm: "linf" or "l2".
        num_samples: how many images, drawn evenly over the classes; None takes all.
        gradient_masking_samples: on how many images symptoms of masked gradients are looked for; 0 looks for none.
        batch_size: images a batch, where `data` is a folder.
        seed: of the attacks' random starts.
        workers: decoding threads, where `data` is a folder.

    Returns:
        The content of evaluation.json, a plain dict: report["attacks"]["pgd20"]["accuracy"].

    Raises:
        UserError: unknown attacks, no shards there, classes that do not fit the model, pixels outside [0, 1].
    """
    if isinstance(attacks, str):
        raise UserError(f"attacks must be a list of names, e.g. [{attacks!r}], got {attacks!r}")
    predict, model = Victim(model), unwrapped(model)
    info = model.info if isinstance(model, AdaptedModel) else None
    if isinstance(data, (str, Path)):
        if info is None:
            raise UserError(
                "evaluate: a folder needs a model of create_model or load, which knows its crop; give an EvalStream"
            )
        data = EvalStream(
            data, batch_size=batch_size, transform=eval_transform(info), subset=Subset(num_samples), workers=workers
        )
    if eps is None and norm != "linf":
        raise UserError(f"eps: norm {norm} has no default; give a length in pixels of [0, 1], e.g. 0.5")
    try:
        radius = parse_size("4/255" if eps is None else eps)
    except ValueError as error:
        raise UserError(f"eps: {error}") from None
    assert isinstance(radius, float)
    parameter = next(model.parameters(), torch.empty(0))
    comm = Comm(0, 1, parameter.device, control=None)
    name = info.name if info else type(model).__name__
    images = CheckedImages(data)
    threat = threat_model(norm, radius)
    evaluator = Evaluator(
        attacks,
        threat,
        comm,
        seed=seed,
        gradient_masking_samples=gradient_masking_samples,
        backbone=name,
        precision=measured_precision(predict, images, comm.device),
    )
    with torch.inference_mode(False):
        return evaluator.run(predict, images)
