"""The adapter of a finished run is published. A failure here is a warning and fails no run: the adapter is on disk."""

import os
import shlex

from fulllora_dist.core.messages import one_line, redacted
from fulllora_dist.evaluation.report import read_evaluation
from fulllora_dist.registry.publish import publish
from fulllora_dist.registry.registry import Registry
from fulllora_dist.registry.version_tags import Lineage
from fulllora_dist.tracking.summary import RunSummary


def publish_run(run: RunSummary, config: str, run_id: str | None) -> str:
    """Publish the adapter of a finished run, with its evaluation if there is one; returns a line for people. An
    evaluation that the adapter's version has already stays: a better one may have been published since.

    Args:
        config: the run's config as YAML, without what signs a URL.
        run_id: of the MLflow run, None where it could not be created.
    """
    adapter, evaluation = (os.path.join(run.output_dir, name) for name in ("adapter", "evaluation.json"))
    evaluated, name = os.path.exists(evaluation), run.settings.registered_model_name
    try:
        registry = Registry(run.uri, create=True)
        version = publish(
            registry,
            adapter,
            evaluation=read_evaluation(evaluation) if evaluated else None,
            name=name,
            lineage=Lineage.of_run(registry.store, run_id, config, run.settings.experiment_name),
            keep=True,
        )
    except Exception as error:  # whatever a tracking store does
        options = {
            "--evaluation": evaluation if evaluated else None,
            "--name": name,
            "--run": run_id,
            "--uri": redacted(run.uri),
        }
        given = [part for option, value in options.items() if value is not None for part in (option, value)]
        command = shlex.join(["fulllora", "adapters", "publish", adapter, *given])
        return f"warning: the adapter was not registered ({one_line(error)}); to register it later: {command}"
    return f"registered: {version.address}; fulllora adapters promote {version.name}/{version.number}"
