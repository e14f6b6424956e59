"""An MLflow store: how it is opened, and what it asks of its users. Everything here may block for long."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fulllora_dist.storage.machine_copy import one_at_a_time

_NOT_IN_A_NAME = re.compile(r"[^/\w.\- :]")
_RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
_retries: str | None = None  # what was set here


def allowed_name(name: str) -> str:
    """The name of a metric or tag with `_` for every character that MLflow does not accept."""
    return _NOT_IN_A_NAME.sub("_", name)


def patient_client(uri: str) -> Any:
    """An `MlflowClient` whose calls fail soon and are not retried: retrying is ours, and creates no run twice."""
    set_defaults(retries=0)
    from mlflow import MlflowClient

    return MlflowClient(uri)


def experiment_id(client: Any, name: str, uri: str) -> str:
    """Of the experiment of that name, which is created if it does not exist."""
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return client.create_experiment(name, _artifact_location(uri))
        except Exception as error:
            if getattr(error, "error_code", None) != "RESOURCE_ALREADY_EXISTS":  # another process has created it
                raise
            experiment = client.get_experiment_by_name(name)
    return experiment.experiment_id


def set_defaults(retries: int) -> None:
    """MLflow's settings for this process, unless the user has set them: by default a dead server blocks a caller for
    four minutes, and messages go to stdout. Call it before MLflow is imported.

    Args:
        retries: of a failed request. The setting is the process's, not a client's: the lowest of all calls counts.
    """
    global _retries
    if os.environ.get(_RETRIES) in (None, _retries):
        _retries = str(min(retries, int(_retries or retries)))
        os.environ[_RETRIES] = _retries
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")


@contextmanager
def first_use_alone(uri: str) -> Iterator[None]:
    """A new sqlite store is migrated at first use, which two processes at once would break."""
    file = sqlite_file(uri)
    if file is None:
        yield
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(file.with_name(f"{file.name}.lock")):
        yield


def _artifact_location(uri: str) -> str | None:
    """Beside a sqlite file, where MLflow would take the working directory; None for a server, which has its own."""
    file = sqlite_file(uri)
    return None if file is None else file.with_name("mlruns").as_uri()


def sqlite_file(uri: str) -> Path | None:
    """Where a store is in a file; None for a server."""
    file = uri.removeprefix("sqlite:///")
    return None if file == uri else Path(os.path.abspath(file))
