"""An MLflow store whose failures are one clear line."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

from fulllora_dist.core.errors import UserError
from fulllora_dist.core.messages import one_line, redacted
from fulllora_dist.tracking.mlflow_store import experiment_id, first_use_alone, set_defaults
from fulllora_dist.tracking.settings import check_uri

_CLIENTS = {"mlflow", "sqlalchemy", "alembic", "botocore", "boto3", "google", "azure"}
"""Packages whose exceptions are the store's; those of requests are OSErrors."""


class StoreError(UserError):
    """A call to an MLflow store failed.

    Attributes:
        error_code: MLflow's name of the error, e.g. RESOURCE_DOES_NOT_EXIST; "IO" where it is not MLflow's own.
    """

    def __init__(self, message: str, error_code: str):
        super().__init__(message)
        self.error_code = error_code

    def __reduce__(self) -> tuple[type[Self], tuple[str, str]]:
        return type(self), (str(self), self.error_code)


class Store:
    """`mlflow.MlflowClient` of one store, whose exceptions are `StoreError`.

    MLflow resolves `models:/` addresses at its process-wide tracking URI, whatever the client's own is, so the store
    becomes that one, too.

    Args:
        uri: tracking URI; None takes MLflow's own (MLFLOW_TRACKING_URI, or what was set).
        create: create a sqlite file that does not exist.

    Raises:
        UserError: MLflow cannot open such an address; the sqlite file does not exist, and `create` is false.
    """

    def __init__(self, uri: str | None = None, create: bool = False):
        set_defaults(retries=2)
        import mlflow

        self.uri = uri or mlflow.get_tracking_uri()
        check_uri(self.uri, f"MLflow at {redacted(self.uri)}")
        file = self.uri.removeprefix("sqlite:///")
        if file != self.uri and not create and not os.path.exists(file):
            raise UserError(f"there is no MLflow store {file}; set MLFLOW_TRACKING_URI (or --uri) to an existing store")
        mlflow.set_tracking_uri(self.uri)  # create_model_version looks for models:/m-ID there, whatever client asks
        with self._explaining(), first_use_alone(self.uri):
            self._client = mlflow.MlflowClient(self.uri, self.uri)
            self.experiment_id("Default")

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._client, name)

        def checked(*args: Any, **settings: Any) -> Any:
            with self._explaining():
                return call(*args, **settings)

        return checked

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            packages = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
            if not isinstance(error, OSError) and _CLIENTS.isdisjoint(packages):
                raise
            code = getattr(error, "error_code", "IO")
            raise StoreError(f"MLflow at {redacted(self.uri)}: {one_line(error)}", code) from error

    def experiment_id(self, name: str) -> str:
        """Of the experiment of that name, which is created if it does not exist."""
        return experiment_id(self, name, self.uri)

    def download(self, location: str, folder: str) -> str:
        """Artifacts at `location` (an artifact URI, or runs:/ID/PATH) into `folder`; returns where they are."""
        from mlflow.artifacts import download_artifacts

        with self._explaining():
            try:
                return download_artifacts(artifact_uri=location, dst_path=folder, tracking_uri=self.uri)
            except OSError as error:
                reason = one_line(error.strerror or error)
                raise StoreError(f"{redacted(location)} cannot be read ({reason})", "IO") from error
