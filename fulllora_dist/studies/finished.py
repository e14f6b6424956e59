"""A finished run as a result: its adapter, its verdicts and what it cost."""

import json
import shutil
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fulllora_dist.core.errors import UserError
from fulllora_dist.data.index import Index
from fulllora_dist.evaluation.report import read_evaluation
from fulllora_dist.models.adapter_address import DESCRIPTION
from fulllora_dist.models.adapter_file import TENSORS, read_adapter
from fulllora_dist.studies.declaration import declared
from fulllora_dist.studies.plan import Evaluation, Run, Study
from fulllora_dist.studies.results import FORMAT, Result, Verdicts, check_kept, has, verdicts, write_result
from fulllora_dist.studies.work import training_work
from fulllora_dist.tracking.provenance import git_commit


def adapter_of(run: Run, known: Result | None, results: Path) -> Path | None:
    """The folder of a run's adapter: its own, else the one that is kept with its result; None where it is to be
    trained.

    Args:
        known: the result that there is.
        results: the folder of the results.

    Raises:
        UserError: the one that is kept is not there, or is another one.
    """
    own = Path(run.output_dir, "adapter")
    if (own / DESCRIPTION).exists():
        return own
    if known is None or not known["adapter_kept"]:
        return None
    check_kept(known, results)
    return results / known["name"]


def missing(run: Run, known: Result | None, adapter: Path | None) -> list[Evaluation]:
    """The evaluations that are in neither the result of this adapter nor the folder of the run."""
    left = [e for e in run.evaluations if not _file(run, e).exists()]
    if known is None or adapter is None or not _is_of(known, adapter):
        return left
    return [e for e in left if not has(known, e)]


def check_folder(run: Run, inputs: Mapping[str, str], adapter: Path | None) -> None:
    """Check that what is in the folder of a run was made from what is there now.

    Args:
        inputs: hashes of what it reads.
        adapter: its folder, see `adapter_of`.

    Raises:
        UserError: an adapter or an evaluation of other images, or an evaluation of another adapter.
    """
    sha256 = None
    if adapter is not None:
        description = json.loads((adapter / DESCRIPTION).read_text())
        sha256, data = description["sha256"], description["training"].get("data", {})
        if data.get("index") != inputs["data.train"]:
            raise UserError(
                f"{adapter} has an adapter of other images than {run.config.data.train} has now; delete the folder"
            )
    for evaluation in run.evaluations:
        if not (path := _file(run, evaluation)).exists():
            continue
        report = read_evaluation(path)
        if report.get("data") != Index.load(evaluation.data).hash:
            raise UserError(f"{path} is of other images than {evaluation.data} has now; delete it")
        if sha256 is not None and report.get("adapter_sha256") != sha256:
            raise UserError(f"{path} is of another adapter than {adapter}; delete it")


def save_result(
    study: Study, run: Run, inputs: Mapping[str, str], place: Mapping[str, Any], known: Result | None, adapter: Path
) -> None:
    """Write the result of a run that has an adapter and all evaluations; the adapter first, so that a result that is
    there is whole.

    Args:
        inputs: hashes of what it read.
        place: where it ran: ranks and threads.
        known: the result that there is; one of the same adapter is given what it has not.
    """
    settings, commit, declaration = study.settings, git_commit(), declared(study)
    folder = Path(settings.results_dir)

    def found(evaluation: Evaluation) -> Verdicts:
        return verdicts(evaluation, read_evaluation(_file(run, evaluation)), settings.name, declaration, commit)

    if known is not None and _is_of(known, adapter):
        known["evaluations"] += [found(e) for e in run.evaluations if not has(known, e)]
        known["shards"] += [line for line in settings.shards if line not in known["shards"]]
        write_result(known, folder)
        return
    description, _ = read_adapter(str(adapter))
    folder.mkdir(parents=True, exist_ok=True)
    kept = not run.is_try and (adapter / TENSORS).stat().st_size <= settings.max_adapter_mb * 1e6
    if kept:
        (folder / run.name).mkdir(exist_ok=True)
        for name in (TENSORS, DESCRIPTION):
            shutil.copyfile(adapter / name, folder / run.name / name)
    work = training_work(run.config, len(Index.load(run.config.data.train)))
    seconds = step_seconds(Path(run.output_dir, "metrics.jsonl"))
    result: Result = {
        "format": FORMAT,
        "name": run.name,
        "study": settings.name,
        "arm": run.arm,
        "values": dict(run.values),
        "seed": run.seed,
        "is_try": run.is_try,
        "commit": commit,
        "config": run.config.model_dump(mode="json"),
        "inputs": dict(inputs),
        "environment": settings.environment,
        "shards": list(settings.shards),
        "adapter_sha256": description.sha256,
        "adapter_kept": kept,
        "trainable": description.trainable,
        "trainable_share": description.trainable_share,
        "rank": description.spec.rank,
        "cost": {**work, "step_seconds": seconds, **place},
        "evaluations": [found(e) for e in run.evaluations],
    }
    write_result(result, folder)


def _is_of(known: Result, adapter: Path) -> bool:
    """Whether a result is that of an adapter."""
    sha256: str = json.loads((adapter / DESCRIPTION).read_text())["sha256"]
    return known["adapter_sha256"] == sha256


def _file(run: Run, evaluation: Evaluation) -> Path:
    return Path(run.output_dir, evaluation.file)


def step_seconds(metrics: Path) -> float:
    """Median of the wall clock of a batch, which a pause, or a busy minute of the machine, does not move."""
    lines = map(json.loads, metrics.read_text().splitlines())
    return statistics.median(line["speed/step_seconds"] for line in lines if "speed/step_seconds" in line)
