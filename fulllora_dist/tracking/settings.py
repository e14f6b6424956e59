"""Settings of MLflow."""

import re
from importlib.metadata import entry_points
from typing import Annotated

from pydantic import AfterValidator, Field

from fulllora_dist.core.errors import UserError
from fulllora_dist.core.settings import Location, Settings

_SCHEMES = ("file", "http", "https", "sqlite", "mysql", "mssql", "postgresql", "databricks", "databricks-uc", "uc")
_MODEL_NAME = re.compile(r"(?! )[^/:@'\"`\x00-\x1f\x7f]{1,200}(?<! )")  # quotes: MLflow's filters cannot hold them


def check_model_name(name: str) -> str:
    """The name itself. Raises UserError: models:/NAME@ALIAS and models:/NAME/NUMBER could not address it."""
    if not _MODEL_NAME.fullmatch(name):
        raise UserError(
            f"{name[:50]!r} is no name for a registered model; it must have 1 to 200 characters, none of them / : @, a "
            "quote or a control character, and no blank at an end"
        )
    return name


def check_uri(uri: str) -> None:
    """Raise UserError for a scheme that MLflow and its plugins do not know: no waiting would mend it."""
    scheme = uri.partition("://")[0].partition("+")[0] if "://" in uri else ""
    plugins = (entry.name for entry in entry_points(group="mlflow.tracking_store"))
    if scheme and scheme not in _SCHEMES and scheme not in plugins:
        raise UserError(
            f"tracking.uri: MLflow knows no {scheme}://; set it, or MLFLOW_TRACKING_URI, to http(s)://HOST, "
            "sqlite:///FILE or a folder"
        )


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
    registered_model_name: Annotated[str, AfterValidator(check_model_name)] | None = None
    """Registered model name; null takes BACKBONE-DATA-NORM-EPS."""
