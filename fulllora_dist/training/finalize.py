"""Finish a trained run: save the adapter, evaluate it, and log both to the tracker."""

import os
import sys

from fulllora_dist.core.errors import UserError
from fulllora_dist.evaluation.report import EvaluationReport, write_evaluation
from fulllora_dist.evaluation.summary import table, write_figures
from fulllora_dist.models.adapter_file import adapter_sha256, load, save_adapter
from fulllora_dist.training.build import build_eval_stream, build_evaluator
from fulllora_dist.training.context import APART, RunContext
from fulllora_dist.training.inputs import check_evaluation
from fulllora_dist.training.provenance import provenance
from fulllora_dist.training.run_plots import show_end
from fulllora_dist.training.trainer import Trainer


def finalize(run: RunContext, trainer: Trainer) -> None:
    """Save the final and the best adapter, evaluate the final one from its saved file, and log everything.

    Safe to repeat. A collective."""
    run.progress = None
    model, tensors = trainer.engine.model, trainer.engine.adapter()
    output = run.config.run.output_dir
    adapter = os.path.join(output, "adapter")
    run.comm.limit_waiting(max(run.comm.patience, APART))
    run.watchdog.enter("saving the adapter")

    def save() -> None:
        try:
            save_adapter(model, adapter, state=tensors, training=provenance(run.config, trainer))
        except UserError as error:
            kept = f"the newest checkpoint is {run.checkpoints.describe()}"
            raise UserError(f"run.output_dir: no adapter in {output}, {kept} ({error})") from error
        run.tracker.artifact(adapter, "adapter")

    run.comm.run_on_rank0(save, f"run.output_dir: {output}")
    run.say(f"adapter: {adapter}, {model.report.share:.2%} of the model")
    save_best(run, trainer)
    if run.config.data.validation is not None:
        run.watchdog.enter("evaluation")
        _evaluate(run, adapter, run.config.data.validation, trainer.step)
    run.watchdog.enter("publishing")
    if run.config.tracking.enabled and run.config.tracking.publish:
        run.comm.run_on_rank0(lambda: run.say(_publish(run)))


def save_best(run: RunContext, trainer: Trainer) -> None:
    """Save the adapter with the highest robust accuracy on held-out images to adapter_best/.

    Does nothing without held-out images. A collective."""
    guard = trainer.guard
    if guard is None or guard.best is None:
        return
    best, step = guard.best, guard.best["step"]
    folder = os.path.join(run.config.run.output_dir, "adapter_best")

    def save() -> None:
        try:
            saved, metadata = run.checkpoints.read(step)
        except UserError as error:
            run.say(f"warning: no {folder}: {error}")
            run.say(f"adapter: {guard.describe()}")
            return
        kind = "ema/" if any(name.startswith("ema/") for name in saved) else "master/"
        tensors = {name.removeprefix(kind): tensor for name, tensor in saved.items() if name.startswith(kind)}
        then = {"batches": step, "made": trainer.phases.made(step), "held_out": best}
        then |= {key: metadata[key] for key in ("updates", "rollbacks")}  # without rollbacks after that checkpoint
        save_adapter(trainer.engine.model, folder, state=tensors, training=provenance(run.config, trainer) | then)
        run.tracker.artifact(folder, "adapter_best")
        run.say(f"adapter_best: {folder}, of batch {step}")
        why = "catastrophic overfitting" if guard.has_collapsed else "robust overfitting"
        better = f"; adapter_best/ is the more robust one ({why})" if guard.overfitted else ""
        run.say(f"adapter: {guard.describe()}{better}")

    run.comm.run_on_rank0(save, f"run.output_dir: no adapter_best in {run.config.run.output_dir}")


def _publish(run: RunContext) -> str:
    from fulllora_dist.registry.publish_run import publish_run  # mlflow takes a second to import

    run.tracker.settle()  # the MLflow run that the version refers to must exist
    return publish_run(run.config.tracked_run(), run.settings, run.tracker.run_id)


def _evaluate(run: RunContext, adapter: str, validation: str, step: int) -> None:
    """Evaluate the saved file on all ranks, each with a full fp32 replica, so that the report is of what is shipped."""
    config = run.config
    checkpoint = config.model.checkpoint_path
    model = run.comm.run_on_all(lambda: load(adapter, checkpoint_path=checkpoint)).to(run.comm.device)
    path = os.path.join(config.run.output_dir, "evaluation.json")
    sha256 = adapter_sha256(model)
    evaluator = run.comm.run_on_all(lambda: build_evaluator(config, model.info, run.comm, adapter, sha256))
    stream = build_eval_stream(config, validation, model, run.comm, subset=check_evaluation(config))

    def write(report: EvaluationReport) -> None:
        print(table(report), file=sys.stdout, flush=True)
        write_evaluation(report, path)
        shown = report["attacks"] | ({"worst_case": report["worst_case"]} if "worst_case" in report else {})
        run.tracker.log({f"eval/{name}": score["accuracy"] for name, score in shown.items()}, step)
        run.tracker.commit(step)
        for file in (path, *write_figures(report, path)):
            run.tracker.artifact(str(file))
        show_end(run.tracker, config, model, stream)

    evaluator.run(model, stream, resume_dir=f"{path}.partial", write=write)
    run.gather_samples()
