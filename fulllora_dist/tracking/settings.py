"""Settings of MLflow."""

from pydantic import Field

from fulllora_dist.core.settings import Location, Settings


class TrackingSettings(Settings):
    enabled: bool = True
    """false logs to the output folder only; `tracking: none` is short for it."""
    uri: Location | None = None
    """MLflow tracking URI; null takes MLFLOW_TRACKING_URI, else sqlite in mlflow.db beside the output folder."""
    experiment_name: str = "fulllora"
    """MLflow experiment name."""
    run_name: str | None = None
    """MLflow run name; null takes the output folder's."""
    flush_timeout_s: float = Field(60.0, ge=0)
    """Seconds to wait at the end for a server that does not answer; the rest is sent later (docs/tracking.md)."""
    system_metrics_interval_s: float | None = Field(15.0, gt=0)
    """Seconds between system metrics (CPU, memory, disk, network, GPUs of each node); null disables them."""
    publish: bool = False
    """Register the adapter in the MLflow model registry at the end (docs/registry.md)."""
    registered_model_name: str | None = None
    """Registered model name; null takes BACKBONE-DATA-NORM-EPS."""
