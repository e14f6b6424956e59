"""What a start checks of its settings and files before anything is written, and before torch is imported."""

import os

from fulllora_dist.config.schema import Config
from fulllora_dist.core.errors import UserError
from fulllora_dist.core.units import check_pixel_range
from fulllora_dist.data.class_names import match_classes
from fulllora_dist.data.index import Index
from fulllora_dist.data.position import StreamPosition
from fulllora_dist.data.subset import Subset
from fulllora_dist.distributed.schedule import check_batch
from fulllora_dist.evaluation.attack_names import AttackName, further_norms
from fulllora_dist.models.adapter_address import DESCRIPTION, instead_of
from fulllora_dist.models.checkpoint_header import read_header
from fulllora_dist.storage import urls
from fulllora_dist.tracking.settings import check_uri

_ACCIDENTS = 0.01  # tolerated fraction of held-out duplicates: ImageNet itself contains a few images twice


def check_inputs(config: Config, world: int) -> None:
    """Check settings and input files before anything expensive starts.

    Raises:
        UserError: an invalid setting or a missing file; the message names the setting.
    """
    check_settings(config, world)
    check_files(config)


def check_settings(config: Config, world: int) -> None:
    """Check the settings that can be checked without reading any file."""
    micro = check_batch(config.optim, config.distributed.gradient_accumulation_steps, world)
    if config.targets.mixes and micro % 2:
        raise UserError(
            f"targets: mixing needs an even number of images per rank and micro-batch, got {micro}; "
            "change optim.batch_size or distributed.gradient_accumulation_steps"
        )
    check_evaluation(config)


def check_evaluation(config: Config) -> Subset:
    """Check the evaluation settings and return the subset to evaluate.

    Raises:
        UserError: unknown attacks, an invalid eps, more than one kind of subset.
    """
    settings = config.evaluation
    for attack in AttackName.parse_all(settings.attacks):
        local = attack.kind == "transfer" and not attack.source.startswith(("models:", "runs:"))
        if local and "://" not in attack.source and not os.path.exists(os.path.join(attack.source, DESCRIPTION)):
            raise UserError(
                f"evaluation.attacks: {attack.name}: {attack.source} has no {DESCRIPTION}; {instead_of(attack.source)}"
            )
    further_norms(settings.norms, config.threat.norm)
    if config.threat.norm == "linf":
        for eps in settings.eps:
            try:
                check_pixel_range(eps)
            except ValueError as error:
                raise UserError(f"evaluation.eps: {error}") from None
    return Subset(settings.num_samples, settings.first, settings.ids)


def check_evaluated(config: Config, validation: Index) -> int:
    """Check the evaluation settings against the validation set. Returns how many images are evaluated.

    Raises:
        UserError: the subset is not part of the validation set, or there are too few classes for an attack.
    """
    images = len(check_evaluation(config).of(validation, "data.validation"))
    for attack in AttackName.parse_all(config.evaluation.attacks):
        attack.check_classes(len(validation.classes))
    return images


def check_files(config: Config) -> None:
    """Check that input files exist, that the data sets have the same classes, as many as the model where its settings
    say so, and do not overlap, and that a batch fits into the training data."""
    local = {
        "model.checkpoint_path": config.model.checkpoint_path,
        "adapter.init_from": config.adapter.init_from,
        "run.resume_from": config.run.resume_from,
    }
    for name, path in local.items():
        if path is None or ("://" in path and not path.startswith("file://")):
            continue
        if not os.path.exists(urls.local_path(path)):
            raise UserError(f"{name}: {path} does not exist")
    if config.model.checkpoint_path is not None and "://" not in config.model.checkpoint_path:
        read_header(config.model.checkpoint_path)
    if config.tracking.enabled:
        check_uri(config.tracking_uri(), "MLFLOW_TRACKING_URI" if config.tracking.uri is None else "tracking.uri")
    data = config.data
    named = {"data.train": data.train, "data.validation": data.validation, "data.held_out": data.held_out}
    indexes = {name: load_index(location, name) for name, location in named.items() if location is not None}
    train = indexes.pop("data.train")
    for name, index in indexes.items():
        match_classes(train.classes, index.classes, model_is="data.train", data_is=name)
    outputs = config.model.num_classes if config.model.class_indices is None else len(config.model.class_indices)
    if outputs is not None:
        check_classes(train, outputs, "data.train")
    try:
        StreamPosition(train, config.run.seed, config.optim.batch_size)
    except UserError as error:
        raise UserError(f"optim.batch_size: {error}") from None
    validation, held_out = indexes.get("data.validation"), indexes.get("data.held_out")
    if validation is not None:
        check_evaluated(config, validation)
    for name, other in (("data.train", train), ("data.validation", validation)):
        if held_out is None or other is None:
            continue
        if (shared := held_out.images_in(other)) > _ACCIDENTS * len(held_out):
            raise UserError(
                f"data.held_out: {shared} of its {len(held_out)} images are in {name}; hold images out with "
                "fulllora shards --holdout"
            )


def check_classes(index: Index, outputs: int, setting: str) -> None:
    """Check that the data has as many classes as the model has outputs.

    Raises:
        UserError: the numbers differ.
    """
    if len(index.classes) != outputs:
        raise UserError(
            f"{setting} has {len(index.classes)} classes, but the model has {outputs} outputs; "
            f"set model.num_classes={len(index.classes)} for a new head, or model.class_indices to keep rows of the "
            f"checkpoint's head"
        )


def load_index(location: str, setting: str) -> Index:
    """Load the index of the shards in a folder or at a URL.

    Raises:
        UserError: the index is missing or unreadable; the message names the setting.
    """
    try:
        return Index.load(location)
    except UserError as error:
        raise UserError(f"{setting}: {error}") from error
