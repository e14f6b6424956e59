"""Settings of MLflow."""

from pydantic import Field

from fulllora_dist.core.settings import Settings


class TrackingSettings(Settings):
    enabled: bool = True
    """false logs to the output folder alone; `tracking: none` in place of the section says the same."""
    uri: str | None = None
    """MLflow's tracking store; null takes MLFLOW_TRACKING_URI, else sqlite in mlflow.db beside the output folder."""
    experiment_name: str = "fulllora"
    """MLflow experiment."""
    run_name: str | None = None
    """Name of the run; null takes the output folder's."""
    flush_timeout_s: float = Field(60.0, ge=0)
    """How long the end of a run waits for a store that does not answer; the rest is sent later (docs/tracking.md)."""
    system_metrics_interval_s: float | None = Field(15.0, gt=0)
    """Seconds between samples of each node's CPU, memory, disk, network and GPUs; null takes none."""
    publish: bool = False
    """true makes the adapter a version in MLflow's model registry at the end (docs/registry.md)."""
    registered_model_name: str | None = None
    """Name of the registered model; null takes BACKBONE-DATA-NORM-EPS."""
