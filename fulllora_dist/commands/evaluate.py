"""Robust accuracy: `deepspeed --num_gpus N fulllora_dist/evaluate.py --config FILE --adapter WHERE [key=value ...]`.

One process: `python fulllora_dist/evaluate.py --config FILE --adapter WHERE`. WHERE is a folder, or a version
in MLflow, e.g. models:/NAME@champion. Without --adapter the bare backbone of the config is evaluated. An adapter has
its own backbone, which must match the config. The images are those of data.validation. Prints a table, and writes the
counts with --output.
"""

import argparse
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from fulllora_dist.commands.arguments import add_num_samples, parser
from fulllora_dist.commands.entry import on_interrupt
from fulllora_dist.config.load import load_config
from fulllora_dist.config.schema import Config
from fulllora_dist.core.errors import SharedUserError, UserError
from fulllora_dist.distributed.comm import start_comm, stop_comm
from fulllora_dist.distributed.launcher import join_launcher, say
from fulllora_dist.evaluation import EvaluationReport, check_output, table, write_evaluation, write_figures
from fulllora_dist.evaluation.report import check_replaced, read_replaced
from fulllora_dist.evaluation.resume_log import items_done
from fulllora_dist.models.adapted_model import AdaptedModel
from fulllora_dist.models.adapter_file import DESCRIPTION, adapter_sha256
from fulllora_dist.models.backbone import BackboneInfo
from fulllora_dist.models.settings import AdapterSettings, ModelSettings
from fulllora_dist.registry.address import in_mlflow, load, resolved
from fulllora_dist.storage.folder_lock import FolderLock
from fulllora_dist.storage.urls import redacted
from fulllora_dist.training.build import build_eval_stream, build_evaluator, build_model
from fulllora_dist.training.inputs import check_evaluated, check_evaluation, load_index


def check_inputs(config: Config, adapter: str | None, output: str | None = None) -> str:
    """Check the inputs before the process group is set up. Returns the folder of shards.

    Args:
        adapter, output: arguments of the command line.

    Raises:
        UserError: an invalid setting or argument, which the message names.
    """
    check_evaluation(config)
    folder = config.data.validation
    if folder is None:
        raise UserError("data.validation is not set; set it to the folder of shards to evaluate on")
    check_evaluated(config, load_index(folder, "data.validation"))
    if output is not None:
        check_output(output)
    local = adapter is not None and not in_mlflow(adapter) and "://" not in adapter
    if local and not os.path.exists(os.path.join(str(adapter), DESCRIPTION)):
        raise UserError(f"--adapter: {adapter} has no {DESCRIPTION}; give the folder adapter/ of a run")
    return folder


def build_evaluated(config: Config, adapter: str | None) -> AdaptedModel:
    """Build the adapted model in fp32, or the bare backbone without an adapter.

    Raises:
        UserError: the adapter cannot be read, or has a different backbone than the config.
    """
    if adapter is not None:
        model = load(adapter, checkpoint_path=config.model.checkpoint_path, uri=config.tracking_uri())
        _check_backbone(config.model, model.info, adapter)
        return model
    in_fp32 = config.model.model_copy(update={"precision": "fp32"})
    # finetune: head adds no branches to the backbone
    bare = config.model_copy(update={"finetune": "head", "adapter": AdapterSettings(), "model": in_fp32})
    return build_model(bare)


def _check_backbone(settings: ModelSettings, info: BackboneInfo, adapter: str) -> None:
    """Check that the config agrees with the adapter's backbone, as its settings would have no effect otherwise."""
    arch, _, tag = settings.backbone.partition(".")
    its_arch, _, its_tag = info.name.partition(".")
    same = arch == its_arch and (not tag or not its_tag or tag == its_tag)
    others = {name: name for name in ("num_classes", "image_size", "mean", "std")}
    others |= {"class_indices": "classes", "model_kwargs": "architecture"}
    pairs = {"backbone": (settings.backbone, settings.backbone if same else info.name)}
    pairs |= {
        key: (getattr(settings, key), getattr(info, its)) for key, its in others.items() if getattr(settings, key)
    }
    for key, (ours, its) in pairs.items():
        if (list(ours) if isinstance(ours, tuple) else ours) != (list(its) if isinstance(its, tuple) else its):
            raise SharedUserError(
                f"model.{key}: must be {its} for the adapter {redacted(adapter)}, got {ours}; use the config that it "
                "was trained with"
            )


def _other_norm(args: argparse.Namespace) -> bool:
    """Whether the command line changes the norm of the config, which makes the config's eps meaningless."""
    given = [override for override in args.overrides if override.startswith("threat.norm=")]
    given += [f"threat.norm={args.norm}"] if args.norm else []
    others = [override for override in args.overrides if not override.startswith("threat.")]
    return bool(given) and load_config(args.config, others).threat.norm != given[-1].partition("=")[2]


def read_arguments(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, Config]:
    """Parse the command line, and load the config with its overrides.

    Raises:
        UserError: an invalid setting or argument, which the message names.
    """
    arguments = parser(__doc__ or "")
    arguments.add_argument(
        "--adapter",
        metavar="WHERE",
        help="a folder, models:/NAME@ALIAS or models:/NAME/VERSION; default: the bare backbone",
    )
    arguments.add_argument(
        "--attacks",
        metavar="A,B",
        help="evaluation.attacks: clean, fgsm, pgdK, cwK, dlrK, pgdKxR with R restarts, autoattack, apgd-ce+square",
    )
    add_num_samples(arguments)
    arguments.add_argument("--first", metavar="N", help="evaluation.first: the first N images")
    arguments.add_argument("--ids", metavar="FILE", help="evaluation.ids: a file with one id or image name per line")
    arguments.add_argument("--eps", metavar="K/255,...", help="threat.eps; further ones are evaluation.eps")
    arguments.add_argument("--norm", metavar="NORM", help="threat.norm: linf or l2")
    arguments.add_argument(
        "--output",
        metavar="FILE",
        help="path of evaluation.json, with figures next to it; the same command resumes after a kill. Default: only "
        "the table",
    )
    args = arguments.parse_intermixed_args(argv)
    for name in ("attacks", "num_samples", "first", "ids", "eps", "norm", "output"):
        given = getattr(args, name)
        parts = given.split(",") if given and name in ("attacks", "eps") else [given]
        if given is not None and not all(part.strip() for part in parts):
            raise UserError(
                f"--{name.replace('_', '-')}: must not have empty values, got {given!r}; complete or remove it"
            )
    eps, *more = args.eps.split(",") if args.eps else (None,)
    other_norm = _other_norm(args)
    if other_norm and eps is None and not any(override.startswith("threat.eps=") for override in args.overrides):
        raise UserError("threat.norm: eps of linf and l2 are not comparable; give --eps too")
    short = {
        "evaluation.attacks": args.attacks and f"[{args.attacks}]",
        "evaluation.num_samples": args.num_samples,
        "evaluation.first": args.first,
        "evaluation.ids": args.ids,
        "threat.eps": eps,
        "evaluation.eps": f"[{','.join(more)}]" if more or other_norm else None,
        "threat.norm": args.norm,
    }
    overrides = [f"{key}={value}" for key, value in short.items() if value is not None]
    return args, load_config(args.config, [*args.overrides, *overrides])


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate according to the command line."""
    join_launcher()
    args, config = read_arguments(argv)
    folder = check_inputs(config, args.adapter, args.output)
    if args.output:
        read_replaced(args.output)
    with ExitStack() as stack:
        stack.enter_context(on_interrupt(lambda: _kept(args.output)))
        _evaluate(args, config, folder, stack)


def _kept(output: str | None) -> str:
    """What an interrupted evaluation leaves, and how to go on."""
    if output is None:
        return "nothing is kept; with --output FILE the same command would resume"
    done = items_done(os.path.dirname(output) or ".", os.path.basename(output))
    return f"{done} finished batches are kept in {output}.partial; re-run the same command to resume"


def _evaluate(args: argparse.Namespace, config: Config, folder: str, stack: ExitStack) -> None:
    comm = start_comm(config.distributed.timeout_minutes)
    adapter = comm.broadcast(comm.run_on_rank0(lambda: args.adapter and resolved(args.adapter, config.tracking_uri())))
    model = comm.run_on_all(lambda: build_evaluated(config, adapter)).to(comm.device)
    stream = build_eval_stream(config, folder, model, comm, subset=check_evaluation(config))
    sha256 = None if adapter is None else adapter_sha256(model)
    evaluator = build_evaluator(config, model.info, comm, adapter, sha256)
    if args.output:
        names, sizes = config.evaluation.attacks, (config.threat.eps, *config.evaluation.eps)
        new = [(0.0 if name == "clean" else eps, name) for name in names for eps in sizes]
        lock = FolderLock(Path(f"{args.output}.lock"), "--output", say)
        stack.callback(lock.release)

        def open_output() -> None:
            check_replaced(args.output, new, config.threat.norm, len(stream.ids), sha256)
            Path(args.output).parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()

        comm.run_on_rank0(open_output, f"--output: cannot write {args.output}")

    def write(report: EvaluationReport) -> None:
        print(table(report), flush=True)
        if args.output:
            write_evaluation(report, args.output)
            write_figures(report, args.output)

    evaluator.run(model, stream, resume_dir=args.output and f"{args.output}.partial", write=write)
    stop_comm()
