"""Settings of MLflow, and which addresses it can open."""

import os
import re
from importlib.metadata import entry_points
from typing import Annotated

from pydantic import AfterValidator, Field

from fulllora_dist.core.errors import UserError
from fulllora_dist.core.messages import redacted
from fulllora_dist.core.settings import Location, Settings

_DIALECT = r"(\+\w+)?"
_OPENED = re.compile(
    rf"databricks(:.*)?|(?i:https?)://[^/].*|sqlite{_DIALECT}://(/.+)?|(mysql|mssql|postgresql){_DIALECT}://.+"
)
_MODEL_NAME = re.compile(r"(?! )[^/:@'\"`\x00-\x1f\x7f]{1,200}(?<! )")  # quotes: MLflow's filters cannot hold them


def check_model_name(name: str) -> str:
    """The name itself. Raises UserError: models:/NAME@ALIAS and models:/NAME/NUMBER could not address it."""
    if not _MODEL_NAME.fullmatch(name):
        raise UserError(
            f"{name[:50]!r} is no name for a registered model; it must have 1 to 200 characters, none of them / : @, a "
            "quote or a control character, and no blank at an end"
        )
    return name


def check_uri(uri: str, name: str = "tracking.uri") -> None:
    """Check that it is an address that MLflow or one of its plugins may open: no waiting would mend another one.

    Args:
        name: what it was given by, for the message.

    Raises:
        UserError: it is not.
    """
    scheme, colon, rest = uri.partition(":")
    plugins = (entry.name for entry in entry_points(group="mlflow.tracking_store"))
    if _OPENED.fullmatch(uri) or (colon and scheme.partition("+")[0] in plugins):
        return
    folder = not colon or scheme == "file"
    if folder and os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() in ("true", "1"):
        return
    if server := re.fullmatch(r"(?P<scheme>https?)(?::|:?/+)(?P<host>[^/:].*)|[\w.-]+:\d+(?:/.*)?", uri):
        right = f"{server['scheme'] or 'http'}://{server['host'] or uri}"
    elif scheme == "sqlite":
        right = f"sqlite:///{rest.removeprefix('//') or 'FILE'}, with a fourth slash where the path is absolute"
    elif folder:
        path = (rest if colon else uri).removeprefix("//").rstrip("/")
        right = (
            f"sqlite:///{path}{'' if path.endswith(('.db', '.sqlite')) else '/mlflow.db'}, or http://HOST of a server"
        )
    else:
        right = "http(s)://HOST[:PORT], sqlite:///FILE or databricks"
    shown = re.sub(r"^(\w+://)?.*@", r"\1***@", uri)  # user:password@host, too
    raise UserError(f"{name}: MLflow cannot open {redacted(shown)}; write {redacted(right)}")


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
