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
from fulllora_dist.models.adapter_file import DESCRIPTION, TENSORS, read_adapter
from fulllora_dist.studies.plan import Run, Study
from fulllora_dist.studies.results import FORMAT, Result, verdicts, write_result
from fulllora_dist.studies.work import training_work
from fulllora_dist.tracking.provenance import git_commit


def check_folder(run: Run, inputs: Mapping[str, str]) -> None:
    """Check that what is in the folder of a run was made from what is there now.

    Args:
        inputs: hashes of what it reads.

    Raises:
        UserError: an adapter or an evaluation of other images, or an evaluation of another adapter.
    """
    folder, sha256 = Path(run.output_dir), None
    if (path := folder / "adapter" / DESCRIPTION).exists():
        description = json.loads(path.read_text())
        sha256, data = description["sha256"], description["training"].get("data", {})
        if data.get("index") != inputs["data.train"]:
            raise UserError(
                f"{folder} has an adapter of other images than {run.config.data.train} has now; delete the folder"
            )
    for evaluation in run.evaluations:
        if not (path := folder / evaluation.file).exists():
            continue
        report = read_evaluation(path)
        if report.get("data") != Index.load(evaluation.data).hash:
            raise UserError(f"{path} is of other images than {evaluation.data} has now; delete it")
        if sha256 is not None and report.get("adapter_sha256") != sha256:
            raise UserError(f"{path} is of another adapter than {folder / 'adapter'}; delete it")


def save_result(study: Study, run: Run, inputs: Mapping[str, str], place: Mapping[str, Any]) -> Result:
    """Write the result of a run whose folder is complete; the adapter first, so that a result that is there is whole.

    Args:
        inputs: hashes of what it read.
        place: where it ran: ranks and threads.
    """
    settings, adapter, folder = study.settings, Path(run.output_dir, "adapter"), Path(study.settings.results_dir)
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
        "commit": git_commit(),
        "config": run.config.model_dump(mode="json"),
        "inputs": dict(inputs),
        "environment": settings.environment,
        "shards": list(settings.shards),
        "comparisons": [comparison.model_dump(mode="json") for comparison in settings.comparisons],
        "adapter_sha256": description.sha256,
        "adapter_kept": kept,
        "trainable": description.trainable,
        "trainable_share": description.trainable_share,
        "rank": description.spec.rank,
        "cost": {**work, "step_seconds": seconds, **place},
        "evaluations": [verdicts(e, read_evaluation(Path(run.output_dir, e.file))) for e in run.evaluations],
    }
    write_result(result, folder)
    return result


def step_seconds(metrics: Path) -> float:
    """Median of the wall clock of a batch, which a pause, or a busy minute of the machine, does not move."""
    lines = map(json.loads, metrics.read_text().splitlines())
    return statistics.median(line["speed/step_seconds"] for line in lines if "speed/step_seconds" in line)
