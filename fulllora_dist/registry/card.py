"""The model card of an adapter: what it is, what it withstands, how far to believe it, and how to load it."""

from collections.abc import Mapping
from typing import Any

from fulllora_dist.core.messages import redacted
from fulllora_dist.core.units import size_in
from fulllora_dist.evaluation.report import scores, worst_scores
from fulllora_dist.models.adapter_description import AdapterDescription
from fulllora_dist.models.backbone import BackboneInfo
from fulllora_dist.models.training_record import TrainingData

_SHOWN_SETTINGS = ("finetune", "rank", "alpha", "placement", "blocks", "qkv", "head", "train_norms")


def model_card(
    description: AdapterDescription, evaluation: Mapping[str, Any] | None = None, name: str | None = None
) -> str:
    """Markdown.

    Args:
        description: of the adapter.
        evaluation: in the form of evaluation.json.
        name: of the registered model.
    """
    backbone, threat = description.backbone, description.threat
    intro = (
        f"An adapter for the frozen backbone `{backbone.name}`, which is not included. Inputs: RGB images of "
        f"{backbone.image_size} pixels a side; outputs: {backbone.num_classes} class scores (logits)."
    )
    made_for = (
        f"Made for {size_in(*threat)}, in pixels of [0, 1]; white box, untargeted." if threat else "Not recorded."
    )
    sections = {
        "Threat model": [made_for],
        "Accuracy": _accuracy(evaluation),
        "Warnings of the checks": _warnings(evaluation),
        "Data": _data(description.data),
        "Recipe": _recipe(description),
        "Known limits": _limits(threat, evaluation),
        "How to load": _loading(backbone, f"models:/{name}@champion" if name else "the folder of this file"),
    }
    parts = [f"# {name or backbone.name}", intro]
    for title, lines in sections.items():
        parts += [f"## {title}", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def _accuracy(evaluation: Mapping[str, Any] | None) -> list[str]:
    if evaluation is None:
        return ["Not evaluated."]
    figures = scores(evaluation) | worst_scores(evaluation)  # type: ignore[arg-type]
    rows = [
        f"| {key.attack} | {'' if key.attack == 'clean' else size_in(key.norm, key.eps)} | "
        f"{100 * score['accuracy']:.2f} % | {100 * score['low']:.1f} to {100 * score['high']:.1f} % |"
        for key, score in figures.items()
    ]
    n, precision = len(evaluation["ids"]), evaluation["precision"]
    return ["| attack | eps | accuracy | 95 % interval |", "|---|---|---|---|", *rows, "", f"n = {n}, {precision}."]


def _warnings(evaluation: Mapping[str, Any] | None) -> list[str]:
    if evaluation is None or not evaluation.get("checks"):
        return ["Gradient masking was not checked."]
    return [f"- {line}" for line in evaluation["warnings"]] or ["None."]


def _data(data: TrainingData | None) -> list[str]:
    if data is None:
        return ["Not recorded."]
    shown = ", ".join(map(str, data.classes[:10])) + (", ..." if len(data.classes) > 10 else "")
    return [
        f"- data set: {data.name or 'not named'}, index `{data.index}`",
        f"- {len(data.classes)} classes: {shown}",
        f"- augmentation: {data.augment}",
        *([f"- evaluation crop: {data.crop_pct:g}"] if data.crop_pct else []),
        *([f"- interpolation: {data.interpolation}"] if data.interpolation else []),
    ]


def _recipe(description: AdapterDescription) -> list[str]:
    settings, training = vars(description.spec), description.training
    lines = [f"- {key}: {settings[key]}" for key in _SHOWN_SETTINGS if settings[key] not in (None, False)]
    lines.append(f"- trainable: {description.trainable:,} parameters, {description.trainable_share:.2%}")
    if "made" not in training and training.get("method"):  # not trained by our Trainer: as planned
        lines.append(f"- method: {_listed(training['method'])}")
        lines += [f"- in {len(training['phases'])} phases"] if training.get("phases") else []
    for phase in training.get("made", ()):
        size = "clean" if phase["eps"] is None else size_in(training["threat"]["norm"], phase["eps"])
        side = "" if phase["image_size"] is None else f", {phase['image_size']} pixels"
        lines.append(f"- batches {phase['first']} to {phase['end']}: {_listed(phase['method'])}; {size}{side}")
    factor = 1.0
    for rollback in training.get("rollbacks", ()):
        factor *= rollback["rollback_lr_factor"]
        at, to = rollback["at"], rollback["to"]
        lines.append(f"- collapsed at batch {at}, rolled back to {to}, continued with {factor:g} of the learning rate")
    if training.get("optim"):
        lines.append(f"- optim: {_listed(training['optim'])}")
    if "updates" in training:
        lines.append(f"- {training['updates']} updates, seed {training.get('seed')}")
    return lines


def _listed(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in settings.items())


def _limits(threat: tuple[str, float] | None, evaluation: Mapping[str, Any] | None) -> list[str]:
    lines = []
    if threat is not None:
        lines.append(
            f"- Nothing is claimed beyond this {threat[0]} ball: not other norms, patches, blur or corruptions."
        )
    attacks = () if evaluation is None else evaluation["attacks"]
    if not any("autoattack" in attack for attack in attacks):
        lines.append("- Not evaluated under AutoAttack: stronger attacks may find less accuracy than is said above.")
    lines.append("- The interval is that of the images drawn, for this one adapter; other seeds differ.")
    lines.append("- An image of any other class is classified as one of these, too.")
    return lines


def _loading(backbone: BackboneInfo, address: str) -> list[str]:
    if backbone.module is not None:
        weights = f"The backbone is a {backbone.module} with the fingerprint `{backbone.sha256}`, given as `backbone=`."
        loading = f'model = fd.load("{address}", backbone=module)  # fp32 pixels [B, 3, H, W] in [0, 1] -> logits'
        return [weights, "", "```python", "import fulllora_dist as fd", "", loading, "```"]
    source = redacted(backbone.checkpoint or "") or ("timm's hub" if backbone.pretrained else "its seed")
    return [
        f"The backbone's weights are taken from {source} and must have the fingerprint `{backbone.sha256}`; where "
        "they lie elsewhere, give `checkpoint_path=`.",
        "",
        "```python",
        "import fulllora_dist as fd",
        "",
        f'model = fd.load("{address}")  # fp32 pixels [B, 3, H, W] in [0, 1] -> logits',
        "```",
    ]
