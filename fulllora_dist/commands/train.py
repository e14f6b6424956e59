"""Adversarial finetuning: `deepspeed --num_gpus N fulllora_dist/train.py --config FILE [key=value ...]`.

One process: `python fulllora_dist/train.py --config FILE`. Re-running the same command resumes an interrupted run.
"""

import os
import signal
from collections.abc import Sequence

from fulllora_dist.commands.arguments import parser
from fulllora_dist.commands.plan import estimate
from fulllora_dist.config.load import load_config
from fulllora_dist.core.errors import SharedUserError
from fulllora_dist.distributed.comm import is_main_process
from fulllora_dist.models.training_record import TrainingRecord
from fulllora_dist.training.build import build_model, build_stream, check_inputs, track_data
from fulllora_dist.training.context import start_run
from fulllora_dist.training.finalize import finalize, save_best
from fulllora_dist.training.guard import build_guard
from fulllora_dist.training.phases import build_phases
from fulllora_dist.training.rollback import Collapsed
from fulllora_dist.training.summary import data_record, summarize
from fulllora_dist.training.trainer import Trainer


def main(argv: Sequence[str] | None = None) -> int:
    """Train according to the command line. The exit code is 128 + the signal number if a signal ended the run."""
    arguments = parser(__doc__ or "")
    arguments.add_argument(
        "--dry-run", action="store_true", help="check the settings and estimate the cost without training"
    )
    args = arguments.parse_intermixed_args(argv)
    config = load_config(args.config, args.overrides)
    if args.dry_run:
        if is_main_process():
            print(estimate(config))
        return 0
    check_inputs(config, world=int(os.environ.get("WORLD_SIZE", "1")))

    with start_run(config) as run:
        model = build_model(config)
        run.say(str(model.report))
        track_data(config, run.tracker)
        stream = build_stream(config, model.info, run.comm)
        run.say(f"{stream.steps_per_epoch} batches per epoch, {stream.dropped} images dropped in each")
        phases = build_phases(config, stream.steps_per_epoch)
        phases.prepare(model.backbone, model.info.image_size)
        model.record = TrainingRecord({"data": data_record(config, stream.index)})
        guard = build_guard(config, model, run.comm)
        trainer = Trainer(run, model, stream, phases, guard)  # resumes from a checkpoint, if any
        try:
            trainer.train()
        except Collapsed:
            try:
                save_best(run, summarize(config, trainer))
            except SharedUserError as error:  # must not hide why the run ends
                run.say(f"warning: {error}")
            raise
        if not trainer.stopped:
            finalize(run, summarize(config, trainer))
            return 0
        place = (
            "here" if run.checkpoints.newest == trainer.step else f"its newest checkpoint, {run.checkpoints.describe()}"
        )
        run.say(
            f"stopped at batch {trainer.step} of {trainer.total_steps}; re-run the same command to resume from {place}"
        )
        return 128 + (run.stop.signal or signal.SIGTERM)  # the signal may have been sent to another rank
