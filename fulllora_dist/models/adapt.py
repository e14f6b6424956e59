"""The public ways to an adapted model: `create_model` builds a timm backbone, `adapt` takes a module that is there."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, get_args

from pydantic import ValidationError
from torch import nn

from fulllora_dist.core.errors import UserError
from fulllora_dist.core.settings import Settings, explain
from fulllora_dist.core.suggest import suggestion
from fulllora_dist.models.adapted_model import WITH_BRANCHES, AdaptedModel
from fulllora_dist.models.as_built import attributes
from fulllora_dist.models.attaching import adapt_backbone
from fulllora_dist.models.backbone import BackboneInfo, build_backbone
from fulllora_dist.models.families import family_of, has_family
from fulllora_dist.models.families.target_modules import Pass, TargetModules, labels
from fulllora_dist.models.given_module import check_given, describe, image_size_of, name_of
from fulllora_dist.models.settings import AdapterSettings, Finetune, ModelSettings

_OF_BUILDING = (
    "checkpoint_path",
    "checkpoint_key",
    "pretrained",
    "num_classes",
    "class_indices",
    "model_kwargs",
    "compile",
)
"""Settings of `create_model` that a module has behind it."""


class _Arguments(Settings):
    """Arguments of `create_model` and `adapt`, under their names in a config."""

    model: ModelSettings
    adapter: AdapterSettings


def _checked(name: str, settings: Mapping[str, Any], without: Collection[str] = ()) -> _Arguments:
    sections: dict[str, type[Settings]] = {"model": ModelSettings, "adapter": AdapterSettings}
    keys = {section: set(of.model_fields) - {"backbone", "init_from", *without} for section, of in sections.items()}
    if unknown := sorted(settings.keys() - set().union(*keys.values())):
        raise UserError(f"unknown setting {unknown[0]}; {suggestion(unknown[0], sorted(set().union(*keys.values())))}")
    values = {section: {key: settings[key] for key in settings.keys() & keys[section]} for section in sections}
    values["model"]["backbone"] = name
    try:
        return _Arguments.model_validate(values)
    except ValidationError as error:
        raise UserError(explain(error)) from None


def _check_finetune(finetune: str) -> None:
    if finetune not in get_args(Finetune):
        raise UserError(f"finetune: {finetune!r} is unknown; known: {', '.join(get_args(Finetune))}")


def create_model(
    backbone: str,
    *,
    finetune: Finetune = "fulllora",
    seed: int = 0,
    input_sizes: Sequence[int] = (),
    **settings: Any,
) -> AdaptedModel:
    """Create a frozen timm ViT with its weights and a freshly initialised adapter, which does not change its output.

    Args:
        backbone: timm's full `arch.tag`, e.g. "vit_base_patch16_224.augreg2_in21k_ft_in1k".
        finetune: what to train: "fulllora" (LNLoRA branches), "lora" (the same without LN), "full", "head" or
            "layernorm".
        seed: seed of the branches' A, and of weights that are not pretrained.
        input_sizes: additional image sizes that the model must support; see `build_backbone`.
        settings: fields of `ModelSettings` (checkpoint_path, num_classes, image_size, precision, ...) and
            `AdapterSettings` (trainable_fraction, rank, components, ...).

    Raises:
        UserError: an unsupported model, weights that do not fit, a trainable_fraction that is too small.

    Example:
        model = fd.create_model("vit_base_patch16_224.augreg2_in21k_ft_in1k", num_classes=10, trainable_fraction=0.05)
        logits = model(x)  # x [B, 3, 224, 224] in [0, 1] -> [B, 10]
    """
    checked = _checked(backbone, settings)
    return build_adapted(checked.model, checked.adapter, finetune, seed=seed, input_sizes=input_sizes)


def build_adapted(
    model: ModelSettings,
    adapter: AdapterSettings,
    finetune: Finetune,
    *,
    seed: int = 0,
    input_sizes: Sequence[int] = (),
) -> AdaptedModel:
    """Create an adapted model from settings.

    Raises:
        UserError: see `create_model`.
    """
    _check_finetune(finetune)
    backbone, info = build_backbone(model, seed=seed, input_sizes=input_sizes)
    family = family_of(backbone, model.backbone)
    return adapt_backbone(backbone, info, family, adapter, finetune, seed=seed, precision=model.precision)


def adapt(
    module: nn.Module,
    *,
    target_modules: str | Sequence[str] | None = None,
    finetune: Finetune = "fulllora",
    seed: int = 0,
    name: str | None = None,
    **settings: Any,
) -> AdaptedModel:
    """Adapt an existing module in place: its weights are frozen, and the branches do not change its output at first.

    Args:
        module: a model from normalised images [B, 3, H, W] to logits [B, classes], or to an output with `logits`.
        target_modules: which layers get a branch, as in peft: a list of their names or ends of names, a regular
            expression for whole names, or "all-linear". None for a timm model of a known family takes `components`.
        finetune, seed: see `create_model`.
        name: what the backbone is called in adapter files; None asks the module: timm's arch.tag, transformers'
            name_or_path, else its class.
        settings: `mean` and `std` of the normalisation in units of [0, 1] pixels, and `image_size`, where the module
            does not say them; `precision` for a known family; fields of `AdapterSettings` (trainable_fraction, rank,
            alpha, head, ...). The head is frozen unless head="trained"; that of a timm model whose number of classes
            is not the pretrained weights' is taken for a new one and trained.

    Returns:
        The adapted model: pixels in [0, 1] -> logits. `unload` gives the module back as it was.

    Raises:
        UserError: a layer whose branch would have no effect, a normalisation that is not known, ...; the module is then
            as it was.

    Example:
        vit = torchvision.models.vit_b_16(weights="IMAGENET1K_V1")
        model = fd.adapt(vit, target_modules=["mlp.0", "mlp.3"], mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    """
    check_given(module)
    name = name or name_of(module)
    if built := sorted(settings.keys() & set(_OF_BUILDING)):
        raise UserError(f"{built[0]}: adapt takes the module as it is; set it where the module is made")
    by_family = target_modules is None and has_family(module)
    if not by_family and (wrong := sorted(settings.keys() & {"blocks", "components", "qkv"})):
        raise UserError(
            f"{wrong[0]}: is for timm's models of a known family without target_modules, a list or regular expression "
            "that says by itself which layers get a branch; leave it out"
        )
    checked = _checked(name, settings, _OF_BUILDING)
    return adapt_given(module, checked.model, checked.adapter, finetune, target_modules, seed=seed)


def adapt_given(
    module: nn.Module,
    model: ModelSettings,
    adapter: AdapterSettings,
    finetune: Finetune,
    target_modules: str | Sequence[str] | None,
    *,
    seed: int = 0,
    check: Callable[[BackboneInfo], None] = lambda info: None,
) -> AdaptedModel:
    """Adapt an existing module from settings.

    Args:
        model: its name, and what is given of image_size, mean, std and precision.
        check: called with the module's description before it is changed; may raise.

    Raises:
        UserError: see `adapt`.
    """
    _check_finetune(finetune)
    name, branches = model.backbone, finetune in WITH_BRANCHES
    if target_modules is not None and not branches:
        raise UserError(f"target_modules: finetune: {finetune} has no branches; remove one of them")
    if target_modules is None and has_family(module):
        family = family_of(module, name)
        heads = [site.path for site in family.sites(module, name) if site.component == "head"]
        info = describe(module, name, model, module.num_classes, heads)  # type: ignore[arg-type]
        check(info)
        return adapt_backbone(module, info, family, adapter, finetune, seed=seed, precision=model.precision)
    if model.precision != "fp32":
        raise UserError(f"precision: {model.precision} is for timm's models of a known family; use autocast around it")
    if target_modules is None and branches:
        raise UserError(
            f"target_modules: must name the layers of {name} that get a branch, as it is no timm model of a known "
            f"family; its layers: {', '.join(labels(module))}"
        )
    before_pass = attributes(module)
    shown = Pass.through(module, name, image_size_of(module, name, model.image_size))
    info = describe(module, name, model, shown.num_classes, () if shown.head is None else (shown.head,))
    check(info)
    by_target = TargetModules.of(module, target_modules, name, shown)
    unplaced = adapter.model_copy(update={"components": (), "qkv": "separate"})
    targeted_head = shown.head is not None and shown.head in by_target.paths
    if targeted_head and adapter.head == "trained":
        raise UserError(
            f"head: trained contradicts target_modules, which puts a branch beside {shown.head}; remove one of them"
        )
    if targeted_head:
        unplaced = unplaced.model_copy(update={"head": "adapted"})
    return adapt_backbone(module, info, by_target, unplaced, finetune, seed=seed, before_pass=before_pass)
