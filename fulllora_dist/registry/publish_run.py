"""The adapter of a run that has ended, published. What goes wrong here ends no run: the adapter is on disk."""

import os
import shlex

from fulllora_dist.config.schema import Config
from fulllora_dist.evaluation.report import read_evaluation
from fulllora_dist.registry.publish import publish
from fulllora_dist.registry.registry import Registry
from fulllora_dist.registry.version_tags import Lineage
from fulllora_dist.storage.urls import one_line, redacted


def publish_run(config: Config, settings: str, uri: str | None, run_id: str | None) -> str:
    """Publish the adapter of a run that has ended, with its evaluation where there is one; returns a line for people.
    An evaluation that the adapter's version has already stays: a better one may have been published since.

    Args:
        settings: the config as YAML, without what signs a URL.
        uri: tracking store; None takes the config's.
        run_id: of the MLflow run, None where it could not be made.
    """
    output, uri = config.run.output_dir, uri or config.tracking_uri()
    adapter, evaluation = os.path.join(output, "adapter"), os.path.join(output, "evaluation.json")
    found = evaluation if os.path.exists(evaluation) else None
    name, experiment = config.tracking.registered_model_name, config.tracking.experiment_name
    try:
        registry = Registry(uri, create=True)
        lineage = Lineage(None, settings, None, experiment)
        if run_id is not None:
            lineage = Lineage.of_run(registry.store, run_id, settings, experiment)
        version = publish(
            registry,
            adapter,
            evaluation=None if found is None else read_evaluation(found),
            name=name,
            lineage=lineage,
            keep=True,
        )
    except Exception as error:  # whatever a tracking store does
        given = {"--evaluation": found, "--name": name, "--run": run_id, "--uri": redacted(uri)}
        options = [part for option, value in given.items() if value is not None for part in (option, value)]
        command = shlex.join(["python", "tools/adapters.py", "publish", adapter, *options])
        return f"warning: not registered ({one_line(error)}); {command} does it later"
    return f"registered: {version.address}; python tools/adapters.py promote {version.name}/{version.number}"
