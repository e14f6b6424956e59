"""From the config to the parts of a run."""

import os

from fulllora_dist.attacks.threat import Threat, threat_model
from fulllora_dist.config.schema import Config
from fulllora_dist.core.errors import UserError
from fulllora_dist.data.index import Index
from fulllora_dist.data.loader import EvalStream, TrainStream
from fulllora_dist.data.randaugment import RandAugment
from fulllora_dist.data.settings import DataSettings
from fulllora_dist.data.subset import Subset
from fulllora_dist.data.transforms import TrainTransform
from fulllora_dist.distributed.comm import Comm
from fulllora_dist.distributed.schedule import check_batch
from fulllora_dist.evaluation import Evaluator, eval_transform, parse_attacks
from fulllora_dist.models.adapt import build_adapted
from fulllora_dist.models.adapted_model import AdaptedModel
from fulllora_dist.models.backbone import BackboneInfo
from fulllora_dist.storage import urls
from fulllora_dist.storage.ranges import ReadPolicy
from fulllora_dist.tracking.run import Tracker
from fulllora_dist.tracking.summary import DatasetInfo

_ACCIDENTS = 0.01  # of held-out images: ImageNet itself has a few twice


def check_inputs(config: Config, world: int) -> None:
    """What can be refused before anything heavy starts: files that are missing, a batch that does not divide.

    Raises:
        UserError: naming the setting.
    """
    check_settings(config, world)
    check_files(config)


def check_settings(config: Config, world: int) -> None:
    """The part of `check_inputs` that looks at no file."""
    micro = check_batch(config.optim, config.distributed.gradient_accumulation_steps, world)
    if config.targets.mixes and micro % 2:
        raise UserError(
            f"targets: images are mixed in pairs, but {micro} a rank and micro-batch are an odd number; "
            "take another optim.batch_size or distributed.gradient_accumulation_steps"
        )
    check_evaluation(config)


def check_evaluation(config: Config) -> Subset:
    """What is evaluated, from settings that say no nonsense.

    Raises:
        UserError: unknown attacks, an eps that is none, several subsets.
    """
    settings = config.evaluation
    parse_attacks(settings.attacks)
    threats(config)
    return Subset(settings.num_samples, settings.first, settings.ids)


def check_evaluated(config: Config, validation: Index) -> None:
    """What `check_evaluation` cannot know without the images.

    Raises:
        UserError: a subset that is none of them, too few classes for an attack.
    """
    check_evaluation(config).of(validation, "data.validation")
    for attack in parse_attacks(config.evaluation.attacks):
        attack.check_classes(len(validation.classes))


def threats(config: Config) -> list[Threat]:
    """The ball of the run, and those of evaluation.eps.

    Raises:
        UserError: an eps that is none.
    """
    try:
        return [threat_model(config.threat.norm, eps) for eps in (config.threat.eps, *config.evaluation.eps)]
    except UserError as error:
        raise UserError(f"evaluation.{error}") from None


def check_files(config: Config) -> None:
    """The part of `check_inputs` that looks at files."""
    local = {
        "model.checkpoint_path": config.model.checkpoint_path,
        "adapter.init_from": config.adapter.init_from,
        "run.resume_from": config.run.resume_from,
    }
    for name, path in local.items():
        if path is not None and "://" not in path and not os.path.exists(path):
            raise UserError(f"{name}: {path} does not exist")
    data = config.data
    named = {"data.train": data.train, "data.validation": data.validation, "data.held_out": data.held_out}
    indexes = {name: load_index(where, name) for name, where in named.items() if where is not None}
    train = indexes.pop("data.train")
    for name, index in indexes.items():
        if list(index.classes) != list(train.classes):
            raise UserError(
                f"{name}: its {len(index.classes)} classes are not data.train's {len(train.classes)}; "
                "make both with the same class folders"
            )
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


def load_index(where: str, setting: str) -> Index:
    """The index of shards in a folder or at a URL.

    Raises:
        UserError: naming the setting, where there is none or it cannot be read.
    """
    try:
        return Index.load(where)
    except UserError as error:
        raise UserError(f"{setting}: {error}") from error


def track_data(config: Config, tracker: Tracker) -> None:
    """What the run sees, by the fingerprint of its index."""
    if tracker.uri is None:
        return
    for split in ("train", "validation", "held_out"):
        source = getattr(config.data, split)
        if source is not None:
            index = load_index(source, f"data.{split}")
            tracker.data(DatasetInfo(split, source, index.hash, len(index), len(index.classes)))


def build_model(config: Config) -> AdaptedModel:
    """The frozen backbone with its adapter, on the CPU."""
    sizes = sorted({phase.image_size for phase in config.phases if phase.image_size})
    return build_adapted(config.model, config.adapter, config.finetune, seed=config.run.seed, input_sizes=sizes)


def check_classes(index: Index, model: BackboneInfo, setting: str) -> None:
    """The data's classes must be the model's outputs.

    Raises:
        UserError: their numbers differ.
    """
    if len(index.classes) != model.num_classes:
        raise UserError(
            f"{setting} has {len(index.classes)} classes, the model {model.num_classes} outputs; "
            f"set model.num_classes={len(index.classes)} for a new head, or model.class_indices to rows of the "
            f"checkpoint's"
        )


def _check_same(index: Index, comm: Comm, setting: str) -> None:
    """Plans follow from the index: ranks with different ones would repeat samples, or wait for each other forever.

    Raises:
        UserError: this rank's index is not rank 0's.
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
    """Training batches of this rank."""
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
    model: BackboneInfo,
    comm: Comm,
    *,
    subset: Subset,
    setting: str = "data.validation",
) -> EvalStream:
    """Evaluation batches of this rank.

    Args:
        subset: of these images.
        setting: what names the folder, for messages.
    """
    data = config.data
    stream = EvalStream(
        folder,
        batch_size=config.evaluation.batch_size,
        transform=eval_transform(model, data.crop_pct, data.interpolation),
        subset=subset,
        world=comm.world,
        rank=comm.rank,
        workers=data.num_workers,
        pin_memory=comm.device.type == "cuda",
        policy=_policy(data),
    )
    _check_same(stream.index, comm, setting)
    check_classes(stream.index, model, setting)
    return stream


def build_evaluator(
    config: Config, model: BackboneInfo, comm: Comm, adapter: str | None, sha256: str | None = None
) -> Evaluator:
    """The evaluation of a config, in fp32.

    Args:
        adapter, sha256: its address and `adapter_sha256`, for the report.
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
