"""Build the parts of a run from its config, and check the model against the data."""

from fulllora_dist.attacks.threat import Threat, threat_model
from fulllora_dist.config.schema import Config
from fulllora_dist.core.errors import UserError
from fulllora_dist.core.messages import redacted
from fulllora_dist.data.class_names import match_classes
from fulllora_dist.data.index import Index
from fulllora_dist.data.loader import EvalStream, TrainStream
from fulllora_dist.data.settings import DataSettings
from fulllora_dist.data.subset import Subset
from fulllora_dist.data.transforms import TrainTransform
from fulllora_dist.distributed.comm import Comm
from fulllora_dist.evaluation.attack_names import further_norms
from fulllora_dist.evaluation.evaluator import Evaluator
from fulllora_dist.evaluation.trained import classes_of, eval_transform
from fulllora_dist.evaluation.transfer import load_sources
from fulllora_dist.models.adapt import build_adapted
from fulllora_dist.models.adapted_model import AdaptedModel
from fulllora_dist.models.backbone import BackboneInfo
from fulllora_dist.models.compiled import compile_blocks, why_not_compiled
from fulllora_dist.registry.address import load
from fulllora_dist.storage.ranges import ReadPolicy
from fulllora_dist.tracking.run import Tracker
from fulllora_dist.tracking.summary import DatasetInfo
from fulllora_dist.training.context import RunContext
from fulllora_dist.training.inputs import check_classes, load_index


def threats(config: Config) -> list[Threat]:
    """The threat model of the run, followed by those of evaluation.eps and evaluation.norms."""
    own = [threat_model(config.threat.norm, eps) for eps in (config.threat.eps, *config.evaluation.eps)]
    return own + [threat_model(norm, eps) for norm, eps in further_norms(config.evaluation.norms, config.threat.norm)]


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


def compile_model(config: Config, model: AdaptedModel, run: RunContext) -> None:
    """Compile the blocks where model.compile asks for it, or say in one line why not."""
    if not config.model.compile:
        return
    reason = why_not_compiled(run.comm.device)
    if config.distributed.zero_stage == 3:
        reason = "DeepSpeed's hooks of distributed.zero_stage=3 cannot be compiled"
    if reason is None:
        compile_blocks(model)
    else:
        run.say(f"model.compile: off, as {reason}")


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
        read_ahead=int(1e6 * data.read_ahead_mb),
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
            randaugment=data.randaugment,
            color_jitter=data.color_jitter,
            random_erasing=data.random_erasing,
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
    check_classes(stream.index, model.num_classes, "data.train")
    return stream


def build_eval_stream(
    config: Config,
    folder: str,
    model: AdaptedModel,
    comm: Comm,
    *,
    subset: Subset,
    batch_size: int | None = None,
    setting: str = "data.validation",
) -> EvalStream:
    """Build the stream of evaluation batches of this rank.

    Args:
        subset: the images to evaluate.
        batch_size: of each batch on each rank; evaluation.batch_size if None.
        setting: the setting that names the folder, for error messages.
    """
    data = config.data
    stream = EvalStream(
        folder,
        batch_size=batch_size or config.evaluation.batch_size,
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
    check_classes(stream.index, model.info.num_classes, setting)
    return stream


def build_evaluator(
    config: Config, model: BackboneInfo, comm: Comm, adapter: str | None, sha256: str | None = None
) -> Evaluator:
    """Build the evaluator of a config, which runs in fp32.

    Args:
        adapter, sha256: the adapter's address and `adapter_sha256`, for the report.
    """
    first, *more = threats(config)
    sources = load_sources(config.evaluation.attacks, lambda address: load(address, uri=config.tracking_uri()))
    return Evaluator(
        config.evaluation.attacks,
        first,
        comm,
        more_threats=more,
        seed=config.run.seed,
        gradient_masking_samples=config.evaluation.gradient_masking_samples,
        sources=sources,
        backbone=model.name,
        adapter=adapter and redacted(adapter),
        adapter_sha256=sha256,
    )
