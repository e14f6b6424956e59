"""A training run from its config to its end: all is checked, then it is opened, trained and finalized."""

import signal

import torch

from fulllora_dist.config.schema import Config
from fulllora_dist.core.errors import SharedUserError
from fulllora_dist.models.adapted_model import AdaptedModel
from fulllora_dist.models.precision import has_fast_bf16
from fulllora_dist.models.training_record import TrainingRecord
from fulllora_dist.training.build import build_model, build_stream, compile_model, track_data
from fulllora_dist.training.context import RunContext, start_run
from fulllora_dist.training.deterministic import deterministic
from fulllora_dist.training.finalize import finalize, save_best
from fulllora_dist.training.guard import Guard, build_guard
from fulllora_dist.training.inputs import check_classes, load_index
from fulllora_dist.training.phases import Phases, build_phases
from fulllora_dist.training.provenance import data_record
from fulllora_dist.training.rollback import Collapsed
from fulllora_dist.training.trainer import Trainer

NOTABLE_COST = 0.1
"""Share of the training's passes from which on the guard's are worth a line."""


def on_meta(config: Config, images: int) -> tuple[AdaptedModel, Phases]:
    """The model on the meta device, where it takes no memory and little time, and the phases of a run on so many
    images; both checked.

    Raises:
        UserError: a model that timm cannot build, settings that do not fit it.
    """
    with torch.device("meta"):
        model = build_model(config)
    phases = build_phases(config, images // config.optim.batch_size)
    phases.prepare(model.backbone, model.info.image_size)
    return model, phases


def check_model(config: Config) -> None:
    """Check the model without its weights, before they are read or downloaded. With `model.checkpoint_path` the model
    depends on the head in that file, and is checked when it is read.

    Raises:
        UserError: see `on_meta`; another number of classes than the data has.
    """
    if config.model.checkpoint_path is not None:
        return
    train = load_index(config.data.train, "data.train")
    model, _ = on_meta(config, len(train))
    check_classes(train, model.info.num_classes, "data.train")


def cost_notes(config: Config, phases: Phases, guard: Guard | None, device: torch.device) -> list[str]:
    """What makes a run slower than it need be, a line each."""
    notes = []
    if config.model.precision == "bf16" and not has_fast_bf16(device):
        notes.append("warning: this CPU has no bf16 arithmetic (AVX512-BF16 or AMX); model.precision=fp32 is faster")
    if guard is not None and (cost := guard.share(phases, config.optim.batch_size)) > NOTABLE_COST:
        notes.append(
            f"the guard's checks cost about {cost:.0%} of the training; raise guard.every or lower guard.num_samples"
        )
    return notes


def train(config: Config, profile_steps: int = 0) -> int:
    """Train. The exit code is 128 + the signal number if a signal ended the run.

    Args:
        profile_steps: number of batches to record, see `profiling.py`; 0 for none.

    Raises:
        UserError: a refused start, which has written nothing; or what ends a training.
    """
    check_model(config)
    model = build_model(config)
    with deterministic(config.run.deterministic), start_run(config) as run:
        stream = build_stream(config, model.info, run.comm)
        phases = build_phases(config, stream.steps_per_epoch)
        phases.prepare(model.backbone, model.info.image_size)
        model.record = TrainingRecord({"data": data_record(config, stream.index)})
        guard = build_guard(config, model, run.comm)
        trainer = Trainer(run, model, stream, phases, guard)  # resumes from a checkpoint, if any
        run.open()
        compile_model(config, model, run)
        run.say(str(model.report))
        for note in cost_notes(config, phases, guard, run.comm.device):
            run.say(note)
        run.say(f"{stream.steps_per_epoch} batches per epoch, {stream.dropped} images dropped in each")
        if trainer.step:
            run.say(f"resuming at batch {trainer.step} of {trainer.total_steps}")
        track_data(config, run.tracker)
        return _train(run, trainer, profile_steps)


def _train(run: RunContext, trainer: Trainer, profile_steps: int) -> int:
    try:
        trainer.train(profile_steps)
    except Collapsed:
        try:
            save_best(run, trainer)
        except SharedUserError as error:  # must not hide why the run ends
            run.say(f"warning: {error}")
        raise
    if not trainer.stopped:
        finalize(run, trainer)
        return 0
    place = "here" if run.checkpoints.newest == trainer.step else f"its newest checkpoint, {run.checkpoints.describe()}"
    run.say(f"stopped at batch {trainer.step} of {trainer.total_steps}; re-run the same command to resume from {place}")
    return 128 + (run.stop.signal or signal.SIGTERM)  # the signal may have been sent to another rank
