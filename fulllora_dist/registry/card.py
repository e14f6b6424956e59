"""The model card of an adapter: what it is, what it withstands, how far to believe it, and how to load it."""

from collections.abc import Mapping, Sequence
from typing import Any

from fulllora_dist.attacks.threat import size_in
from fulllora_dist.storage.urls import redacted

_HEAD_SETTINGS = ("finetune", "rank", "alpha", "placement", "qkv", "head")


def model_card(
    description: Mapping[str, Any], evaluation: Mapping[str, Any] | None = None, name: str | None = None
) -> str:
    """Markdown.

    Args:
        description: of the adapter, as `read_adapter` gives it.
        evaluation: in the form of evaluation.json.
        name: of the registered model.
    """
    backbone, training = description["backbone"], description["training"]
    where = f"models:/{name}@champion" if name else "the folder of this file"
    sections = [
        f"# {name or backbone['name']}",
        f"An adapter for the frozen backbone `{backbone['name']}`, which is not in here. Inputs: RGB images of "
        f"{backbone['image_size']} pixels a side; outputs: {backbone['num_classes']} class scores (logits).",
        *_section("Threat model", _threat(training)),
        *_section("Accuracy", _accuracy(evaluation)),
        *_section("Warnings of the checks", _warnings(evaluation)),
        *_section("Data", _data(training)),
        *_section("Recipe", _recipe(description)),
        *_section("Known limits", _limits(training, evaluation)),
        *_section("How to load", _loading(backbone, where)),
    ]
    return "\n\n".join(sections) + "\n"


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return [f"## {title}", "\n".join(lines)]


def _threat(training: Mapping[str, Any]) -> list[str]:
    threat = training.get("threat")
    if threat is None:
        return ["Not recorded."]
    return [f"Made for {size_in(threat['norm'], threat['eps'])}, in pixels of [0, 1]; white box, untargeted."]


def _accuracy(evaluation: Mapping[str, Any] | None) -> list[str]:
    if evaluation is None:
        return ["Not evaluated."]
    points = [{"eps": evaluation["eps"], "attacks": evaluation["attacks"]}, *evaluation.get("more_eps", ())]
    rows = [
        f"| {attack} | {'' if attack == 'clean' else size_in(evaluation['norm'], point['eps'])} | "
        f"{100 * score['accuracy']:.2f} % | {100 * score['low']:.1f} to {100 * score['high']:.1f} % |"
        for point in points
        for attack, score in point["attacks"].items()
    ]
    n, precision = len(evaluation["ids"]), evaluation["precision"]
    return ["| attack | eps | accuracy | 95 % interval |", "|---|---|---|---|", *rows, "", f"n = {n}, {precision}."]


def _warnings(evaluation: Mapping[str, Any] | None) -> list[str]:
    if evaluation is None or not evaluation.get("checks"):
        return ["No check for masked gradients was made."]
    return [f"- {line}" for line in evaluation["warnings"]] or ["None."]


def _data(training: Mapping[str, Any]) -> list[str]:
    data = training.get("data")
    if data is None:
        return ["Not recorded."]
    classes = data.get("classes", ())
    shown = ", ".join(map(str, classes[:10])) + (", ..." if len(classes) > 10 else "")
    return [
        f"- data set: {data.get('name', 'not named')}, index `{data.get('index')}`",
        f"- {len(classes)} classes: {shown}",
        f"- augmentation: {data.get('augment')}",
    ]


def _recipe(description: Mapping[str, Any]) -> list[str]:
    spec, training = description["adapter"], description["training"]
    lines = [f"- {key}: {spec[key]}" for key in _HEAD_SETTINGS if spec[key] is not None]
    lines.append(f"- trainable: {description['trainable']:,} parameters, {description['trainable_share']:.2%}")
    if "made" not in training and training.get("method"):  # of an earlier version: as it was planned
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
        lines.append(f"- collapsed at batch {at}, went back to {to} and on with {factor:g} of the learning rate")
    if training.get("optim"):
        lines.append(f"- optim: {_listed(training['optim'])}")
    if "updates" in training:
        lines.append(f"- {training['updates']} updates, seed {training.get('seed')}")
    return lines


def _listed(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in settings.items())


def _limits(training: Mapping[str, Any], evaluation: Mapping[str, Any] | None) -> list[str]:
    lines = []
    norm = training.get("threat", {}).get("norm")
    if norm is not None:
        lines.append(f"- Nothing is claimed beyond this {norm} ball: not other norms, patches, blur or corruptions.")
    attacks = () if evaluation is None else evaluation["attacks"]
    if not any("autoattack" in attack for attack in attacks):
        lines.append("- Not evaluated under AutoAttack: stronger attacks may find less accuracy than is said above.")
    lines.append("- The interval is that of the images drawn, for this one adapter; other seeds differ.")
    lines.append("- Images of other classes are given to one of these, too.")
    return lines


def _loading(backbone: Mapping[str, Any], where: str) -> list[str]:
    source = redacted(backbone["checkpoint"] or "") or ("timm's hub" if backbone["pretrained"] else "its seed")
    return [
        f"The backbone's weights are taken from {source} and must have the fingerprint `{backbone['sha256']}`; where "
        "they lie elsewhere, give `checkpoint_path=`.",
        "",
        "```python",
        "import fulllora_dist as fd",
        "",
        f'model = fd.load("{where}")  # fp32 pixels [B, 3, H, W] in [0, 1] -> logits',
        "```",
    ]
