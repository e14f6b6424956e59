"""An evaluation from its config to its report: all is checked, then it is made, printed and written."""

import glob
import os
from contextlib import ExitStack
from pathlib import Path

from fulllora_dist.commands.entry import on_interrupt
from fulllora_dist.config.schema import Config
from fulllora_dist.distributed.comm import start_comm, stop_comm
from fulllora_dist.distributed.launcher import say
from fulllora_dist.distributed.watchdog import Watchdog
from fulllora_dist.evaluation.attack_names import AttackName
from fulllora_dist.evaluation.output import check_replaced, read_replaced
from fulllora_dist.evaluation.report import EvaluationReport, Key, write_evaluation
from fulllora_dist.evaluation.resume_log import items_done
from fulllora_dist.evaluation.summary import table, write_figures
from fulllora_dist.models.adapted_model import AdaptedModel
from fulllora_dist.models.adapter_file import adapter_sha256, load, read_description
from fulllora_dist.models.rebuild import check_model
from fulllora_dist.models.settings import AdapterSettings
from fulllora_dist.registry.address import local_folder, resolved
from fulllora_dist.storage.folder_lock import FolderLock
from fulllora_dist.training.build import build_eval_stream, build_evaluator, build_model, threats
from fulllora_dist.training.inputs import check_evaluation


def build_evaluated(config: Config, adapter: str | None) -> AdaptedModel:
    """Build the adapted model in fp32, or the bare backbone without an adapter.

    Raises:
        UserError: the adapter cannot be read, or has a different backbone than the config.
    """
    if adapter is not None:
        with local_folder(adapter, config.tracking_uri()) as folder:
            check_model(config.model, read_description(folder).backbone, adapter)
            return load(folder, checkpoint_path=config.model.checkpoint_path)
    in_fp32 = config.model.model_copy(update={"precision": "fp32"})
    # finetune: head adds no branches to the backbone
    bare = config.model_copy(update={"finetune": "head", "adapter": AdapterSettings(), "model": in_fp32})
    return build_model(bare)


def evaluate(config: Config, folder: str, adapter: str | None, output: str | None) -> None:
    """Evaluate on all ranks together.

    Args:
        folder: of the shards.
        adapter, output: arguments of the command line.

    Raises:
        UserError: a refused start, which has written nothing.
    """
    if output:
        read_replaced(output)
    with ExitStack() as stack:
        stack.enter_context(on_interrupt(lambda: kept(output)))
        _evaluate(config, folder, adapter, output, stack)


def kept(output: str | None) -> str:
    """What an interrupted evaluation leaves, and how to go on."""
    if output is None:
        return "nothing is kept; with --output FILE the same command would resume"
    done = items_done(os.path.dirname(output) or ".", glob.escape(os.path.basename(output)))
    return f"{done} finished batches are kept in {output}.partial; re-run the same command to resume"


def _evaluate(config: Config, folder: str, where: str | None, output: str | None, stack: ExitStack) -> None:
    comm = start_comm(config.distributed.timeout_minutes)
    stack.enter_context(Watchdog(comm)).enter("evaluation")
    adapter = comm.broadcast(comm.run_on_rank0(lambda: where and resolved(where, config.tracking_uri())))
    model = comm.run_on_all(lambda: build_evaluated(config, adapter)).to(comm.device)
    stream = build_eval_stream(config, folder, model, comm, subset=check_evaluation(config))
    sha256 = None if adapter is None else adapter_sha256(model)
    evaluator = comm.run_on_all(lambda: build_evaluator(config, model.info, comm, adapter, sha256))
    if output:
        names, balls = [a.name for a in AttackName.parse_all(config.evaluation.attacks)], threats(config)
        new = [Key(ball.norm, 0.0 if name == "clean" else ball.eps, name) for name in names for ball in balls]
        lock = FolderLock(Path(f"{output}.lock"), "--output", say)
        stack.callback(lock.release)

        def open_output() -> None:
            check_replaced(output, new, config.threat.norm, len(stream.ids), sha256)
            Path(output).parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()

        comm.run_on_rank0(open_output, f"--output: cannot write {output}")

    def write(report: EvaluationReport) -> None:
        print(table(report), flush=True)
        if output:
            write_evaluation(report, output)
            write_figures(report, output)

    evaluator.run(model, stream, resume_dir=output and f"{output}.partial", write=write)
    stop_comm()
