"""The adapter of a run that has ended, published. What goes wrong here ends no run: the adapter is on disk."""

import os

from fulllora_dist.compare import read_evaluation
from fulllora_dist.config import Config
from fulllora_dist.tracking.publish import Lineage, publish
from fulllora_dist.tracking.registry import Registry
from fulllora_dist.tracking.run import git_commit


def publish_run(config: Config, settings: str, uri: str | None, run_id: str | None) -> str:
    """Publish the adapter of a run that has ended, with its evaluation where there is one; returns a line for people.

    Args:
        settings: the config as YAML, without what signs a URL.
        uri: tracking store; None takes the config's.
        run_id: of the MLflow run, None where it could not be made.
    """
    output = config.run.output
    adapter, evaluation = os.path.join(output, "adapter"), os.path.join(output, "evaluation.json")
    lineage = Lineage(run_id, settings, git_commit(), config.tracking.experiment)
    try:
        version = publish(
            Registry(uri or config.tracking_uri(), create=True),
            adapter,
            evaluation=read_evaluation(evaluation) if os.path.exists(evaluation) else None,
            name=config.tracking.registered_model,
            lineage=lineage,
        )
    except Exception as error:  # whatever a tracking store does
        reason = " ".join(str(error).split())[:300]
        return f"warning: not registered ({reason}); python tools/adapters.py publish {adapter} does it later"
    return f"registered: {version.address}; python tools/adapters.py promote {version.name}/{version.number}"
