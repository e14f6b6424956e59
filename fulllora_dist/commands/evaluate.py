"""Robust accuracy: `deepspeed --num_gpus N fulllora_dist/evaluate.py --config FILE --adapter WHERE [key=value ...]`.

One process: `python fulllora_dist/evaluate.py --config FILE --adapter WHERE`. That is a folder, or a version
in MLflow, models:/NAME@champion. Without --adapter: the bare backbone.
data.validation comes from the config, and so does the backbone where no adapter is given; an adapter says which it is
of, and a config of another one is refused. Prints a table, and writes the counts with --output.
"""

import argparse
import os
from collections.abc import Sequence

from fulllora_dist.commands.arguments import add_num_samples, parser
from fulllora_dist.config.load import load_config
from fulllora_dist.config.schema import Config
from fulllora_dist.core.errors import SharedUserError, UserError
from fulllora_dist.distributed.comm import start_comm, stop_comm
from fulllora_dist.evaluation import EvaluationReport, check_output, table, write_evaluation, write_figures
from fulllora_dist.evaluation.report import check_replaced, read_replaced
from fulllora_dist.models.adapted_model import AdaptedModel
from fulllora_dist.models.adapter_file import DESCRIPTION, adapter_sha256
from fulllora_dist.models.backbone import BackboneInfo
from fulllora_dist.models.settings import AdapterSettings, ModelSettings
from fulllora_dist.registry.address import in_mlflow, load, resolved
from fulllora_dist.storage.urls import redacted
from fulllora_dist.training.build import (
    build_eval_stream,
    build_evaluator,
    build_model,
    check_evaluated,
    check_evaluation,
    load_index,
)


def check_inputs(config: Config, adapter: str | None, output: str | None = None) -> str:
    """What can be refused before the ranks meet; returns the folder of shards.

    Args:
        adapter, output: of the command line.

    Raises:
        UserError: naming the setting.
    """
    check_evaluation(config)
    folder = config.data.validation
    if folder is None:
        raise UserError("data.validation is not set; give the folder of shards to evaluate on")
    check_evaluated(config, load_index(folder, "data.validation"))
    if output is not None:
        check_output(output)
    local = adapter is not None and not in_mlflow(adapter) and "://" not in adapter
    if local and not os.path.exists(os.path.join(str(adapter), DESCRIPTION)):
        raise UserError(f"--adapter: {adapter} holds no {DESCRIPTION}; give the folder adapter/ of a run")
    return folder


def build_evaluated(config: Config, adapter: str | None) -> AdaptedModel:
    """The adapted model in fp32, or the bare backbone where no adapter is given.

    Raises:
        UserError: the adapter cannot be read, or is of another backbone than the config's.
    """
    if adapter is not None:
        model = load(adapter, checkpoint_path=config.model.checkpoint_path, uri=config.tracking_uri())
        _check_backbone(config.model, model.info, adapter)
        return model
    in_fp32 = config.model.model_copy(update={"precision": "fp32"})
    # finetune: head adds nothing to the backbone
    bare = config.model_copy(update={"finetune": "head", "adapter": AdapterSettings(), "model": in_fp32})
    return build_model(bare)


def _check_backbone(settings: ModelSettings, info: BackboneInfo, adapter: str) -> None:
    """Refuse settings that would have no effect, as the adapter says what its backbone is."""
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
                f"model.{key}: {ours}, but the adapter {redacted(adapter)} is of {its}; give the config that it was "
                "trained with"
            )


def _other_norm(args: argparse.Namespace) -> bool:
    """Whether the command line changes the norm of the config, whose sizes mean nothing then."""
    given = [override for override in args.overrides if override.startswith("threat.norm=")]
    given += [f"threat.norm={args.norm}"] if args.norm else []
    others = [override for override in args.overrides if not override.startswith("threat.")]
    return bool(given) and load_config(args.config, others).threat.norm != given[-1].partition("=")[2]


def read_arguments(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, Config]:
    """The command line, and the config with what the command line says of it.

    Raises:
        UserError: naming the setting.
    """
    arguments = parser(__doc__ or "")
    arguments.add_argument(
        "--adapter",
        metavar="WHERE",
        help="a folder, models:/NAME@ALIAS or models:/NAME/VERSION; left out: the bare backbone",
    )
    arguments.add_argument(
        "--attacks",
        metavar="A,B",
        help="evaluation.attacks: clean, fgsm, pgdK, cwK, dlrK, pgdKxR with R restarts, autoattack, apgd-ce+square",
    )
    add_num_samples(arguments)
    arguments.add_argument("--first", metavar="N", help="evaluation.first: the first N images")
    arguments.add_argument("--ids", metavar="FILE", help="evaluation.ids: a file with an id or an image's name a line")
    arguments.add_argument("--eps", metavar="K/255,...", help="threat.eps, and evaluation.eps where there are several")
    arguments.add_argument("--norm", metavar="NORM", help="threat.norm: linf or l2")
    arguments.add_argument(
        "--output",
        metavar="FILE",
        help="where evaluation.json goes, with figures beside it; the same command goes on after a kill. Left out: the "
        "table alone",
    )
    args = arguments.parse_intermixed_args(argv)
    for name in ("attacks", "num_samples", "first", "ids", "eps", "norm", "output"):
        given = getattr(args, name)
        parts = given.split(",") if given and name in ("attacks", "eps") else [given]
        if given is not None and not all(part.strip() for part in parts):
            raise UserError(
                f"--{name.replace('_', '-')}: {given!r} is empty somewhere; leave the option out, or give what it takes"
            )
    eps, *more = args.eps.split(",") if args.eps else (None,)
    other_norm = _other_norm(args)
    if other_norm and eps is None and not any(override.startswith("threat.eps=") for override in args.overrides):
        raise UserError("threat.norm: the balls of linf and l2 have no common size; give --eps too")
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
    """Evaluate as the command line says."""
    args, config = read_arguments(argv)
    folder = check_inputs(config, args.adapter, args.output)
    if args.output:
        read_replaced(args.output)

    comm = start_comm(config.distributed.timeout_minutes)
    adapter = comm.broadcast(comm.run_on_rank0(lambda: args.adapter and resolved(args.adapter, config.tracking_uri())))
    model = build_evaluated(config, adapter).to(comm.device)
    stream = build_eval_stream(config, folder, model.info, comm, subset=check_evaluation(config))
    sha256 = None if adapter is None else adapter_sha256(model)
    evaluator = build_evaluator(config, model.info, comm, adapter, sha256)
    if args.output:
        names, sizes = config.evaluation.attacks, (config.threat.eps, *config.evaluation.eps)
        new = [(0.0 if name == "clean" else eps, name) for name in names for eps in sizes]
        comm.run_on_rank0(lambda: check_replaced(args.output, new, config.threat.norm, len(stream.ids), sha256))

    def write(report: EvaluationReport) -> None:
        print(table(report), flush=True)
        if args.output:
            write_evaluation(report, args.output)
            write_figures(report, args.output)

    evaluator.run(model, stream, resume_dir=args.output and f"{args.output}.partial", write=write)
    stop_comm()
