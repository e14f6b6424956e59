"""Build the parts of a run from its config, and check the config against the data."""

import os

from fulllora_dist.attacks.threat import Threat, threat_model
from fulllora_dist.config.schema import Config
from fulllora_dist.core.errors import UserError
from fulllora_dist.data.class_names import match_classes
from fulllora_dist.data.index import Index
from fulllora_dist.data.loader import EvalStream, TrainStream
from fulllora_dist.data.randaugment import RandAugment
from fulllora_dist.data.settings import DataSettings
from fulllora_dist.data.subset import Subset
from fulllora_dist.data.transforms import TrainTransform
from fulllora_dist.distributed.comm import Comm
from fulllora_dist.distributed.schedule import check_batch
from fulllora_dist.evaluation import Evaluator, eval_transform, parse_attacks
from fulllora_dist.evaluation.trained import classes_of
from fulllora_dist.models.adapt import build_adapted
from fulllora_dist.models.adapted_model import AdaptedModel
from fulllora_dist.models.backbone import BackboneInfo
from fulllora_dist.models.checkpoint_header import read_header
from fulllora_dist.storage import urls
from fulllora_dist.storage.ranges import ReadPolicy
from fulllora_dist.tracking.run import Tracker
from fulllora_dist.tracking.summary import DatasetInfo

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
    parse_attacks(settings.attacks)
    threats(config)
    return Subset(settings.num_samples, settings.first, settings.ids)


def check_evaluated(config: Config, validation: Index) -> None:
    """Check the evaluation settings against the validation set.

    Raises:
        UserError: the subset is not part of the validation set, or there are too few classes for an attack.
    """
    check_evaluation(config).of(validation, "data.validation")
    for attack in parse_attacks(config.evaluation.attacks):
        attack.check_classes(len(validation.classes))


def threats(config: Config) -> list[Threat]:
    """The threat model of the run, followed by those of evaluation.eps.

    Raises:
        UserError: an invalid eps.
    """
    try:
        return [threat_model(config.threat.norm, eps) for eps in (config.threat.eps, *config.evaluation.eps)]
    except UserError as error:
        raise UserError(f"evaluation.{error}") from None


def check_files(config: Config) -> None:
    """Check that input files exist, and that the data sets have the same classes and do not overlap."""
    local = {
        "model.checkpoint_path": config.model.checkpoint_path,
        "adapter.init_from": config.adapter.init_from,
        "run.resume_from": config.run.resume_from,
    }
    for name, path in local.items():
        if path is not None and "://" not in path and not os.path.exists(path):
            raise UserError(f"{name}: {path} does not exist")
    if config.model.checkpoint_path is not None and "://" not in config.model.checkpoint_path:
        read_header(config.model.checkpoint_path)
    data = config.data
    named = {"data.train": data.train, "data.validation": data.validation, "data.held_out": data.held_out}
    indexes = {name: load_index(location, name) for name, location in named.items() if location is not None}
    train = indexes.pop("data.train")
    for name, index in indexes.items():
        match_classes(train.classes, index.classes, model_is="data.train", data_is=name)
    validation, held_out = indexes.get("data.validation"), indexes.get("data.held_out")
    if validation is not None:
        check_evaluated(config, validation)
    for name, other in (("data.train", train), ("data.validation", validation)):
        if held_out is None or other is None:
            continue
        if (shared := held_out.images_in(other)) > _ACCIDENTS * len(held_out):
            raise UserError(
                f"data.held_out: {shared} of its {len(held_out)} images are in {name}; hold images out with "
                "make_shards.py --holdout"
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


def track_data(config: Config, tracker: Tracker) -> None:
    """Log the data sets of the run to the tracker, identified by the fingerprints of their indexes."""
    if tracker.uri is None:
        return
    for split in ("train", "validation", "held_out"):
        source = getattr(config.data, split)
        if source is not None:
            index = load_index(source, f"data.{split}")
            tracker.data(DatasetInfo(split, source, index.hash, len(index), len(index.classes)))


def build_model(config: Config) -> AdaptedModel:
    """Build the frozen backbone with its adapter, on the CPU."""
    sizes = sorted({phase.image_size for phase in config.phases if phase.image_size})
    return build_adapted(config.model, config.adapter, config.finetune, seed=config.run.seed, input_sizes=sizes)


def check_classes(index: Index, model: BackboneInfo, setting: str) -> None:
    """Check that the data has as many classes as the model has outputs.

    Raises:
        UserError: the numbers differ.
    """
    if len(index.classes) != model.num_classes:
        raise UserError(
            f"{setting} has {len(index.classes)} classes, but the model has {model.num_classes} outputs; "
            f"set model.num_classes={len(index.classes)} for a new head, or model.class_indices to keep rows of the "
            f"checkpoint's head"
        )


def _check_same(index: Index, comm: Comm, setting: str) -> None:
    """Check that all ranks have the same index: with different ones, ranks would repeat samples or deadlock.

    Raises:
        UserError: this rank's index differs from rank 0's.
    """
    if (first := comm.broadcast(index.hash)) != index.hash:
        raise UserError(
            f"{setting}: the index here ({index.hash[:12]}, {len(index)} samples) is not rank 0's ({first[:12]}); "
            "put the same shards and index on every machine"
        )


def _policy(data: DataSettings) -> ReadPolicy:
    return ReadPolicy(
        connections=data.connections,
        request_timeout_s=data.request_timeout_s,
        retry_timeout_s=data.retry_timeout_s,
        cache=data.cache_dir,
        cache_gb=data.cache_gb,
    )


def build_stream(config: Config, model: BackboneInfo, comm: Comm) -> TrainStream:
    """Build the stream of training batches of this rank."""
    data = config.data
    stream = TrainStream(
        data.train,
        batch_size=config.optim.batch_size,
        transform=TrainTransform(
            size=model.image_size,
            augment=data.augment,
            crop_scale=data.crop_scale,
            crop_pct=data.crop_pct or model.crop_pct,
            crop_mode=model.crop_mode,
            interpolation=data.interpolation or model.interpolation,
            randaugment=RandAugment(data.randaugment.num_ops, data.randaugment.magnitude),
            backend=data.decode,
        ),
        seed=config.run.seed,
        world=comm.world,
        rank=comm.rank,
        workers=data.num_workers,
        pin_memory=comm.device.type == "cuda",
        max_bad_samples=data.max_bad_samples,
        policy=_policy(data),
    )
    _check_same(stream.index, comm, "data.train")
    check_classes(stream.index, model, "data.train")
    return stream


def build_eval_stream(
    config: Config,
    folder: str,
    model: AdaptedModel,
    comm: Comm,
    *,
    subset: Subset,
    setting: str = "data.validation",
) -> EvalStream:
    """Build the stream of evaluation batches of this rank.

    Args:
        subset: the images to evaluate.
        setting: the setting that names the folder, for error messages.
    """
    data = config.data
    stream = EvalStream(
        folder,
        batch_size=config.evaluation.batch_size,
        transform=eval_transform(model, data.crop_pct, data.interpolation),  # what is not set is the adapter's
        subset=subset,
        world=comm.world,
        rank=comm.rank,
        workers=data.num_workers,
        pin_memory=comm.device.type == "cuda",
        policy=_policy(data),
    )
    _check_same(stream.index, comm, setting)
    match_classes(classes_of(model, stream.index.classes), stream.index.classes, data_is=setting)
    check_classes(stream.index, model.info, setting)
    return stream


def build_evaluator(
    config: Config, model: BackboneInfo, comm: Comm, adapter: str | None, sha256: str | None = None
) -> Evaluator:
    """Build the evaluator of a config, which runs in fp32.

    Args:
        adapter, sha256: the adapter's address and `adapter_sha256`, for the report.
    """
    first, *more = threats(config)
    return Evaluator(
        config.evaluation.attacks,
        first,
        comm,
        more_threats=more,
        seed=config.run.seed,
        gradient_masking_samples=config.evaluation.gradient_masking_samples,
        backbone=model.name,
        adapter=adapter and urls.redacted(adapter),
        adapter_sha256=sha256,
    )
