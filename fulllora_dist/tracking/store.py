"""An MLflow store whose failures are one clear line."""

import os
from typing import Any

from fulllora_dist.data.urls import redacted
from fulllora_dist.errors import UserError
from fulllora_dist.tracking.mlflow_run import artifact_location, first_use_alone, set_defaults


class StoreError(UserError):
    """What an MLflow store answers instead of what was asked for.

    Attributes:
        code: MLflow's name of the error, e.g. RESOURCE_DOES_NOT_EXIST.
    """

    def __init__(self, message: str, code: str):
        super().__init__(message)
        self.code = code


class Store:
    """`mlflow.MlflowClient` of one store, whose exceptions are `StoreError`.

    MLflow resolves `models:/` addresses at its process-wide tracking URI, whatever the client's own is, so the store
    becomes that one, too.

    Args:
        uri: tracking URI; None takes MLflow's own (MLFLOW_TRACKING_URI, or what was set).
        create: whether a sqlite file that is not there is made.

    Raises:
        UserError: there is no such sqlite file, and none is to be made.
    """

    def __init__(self, uri: str | None = None, create: bool = False):
        set_defaults(retries=2)
        import mlflow
        from mlflow.exceptions import MlflowException

        self.uri = uri or mlflow.get_tracking_uri()
        self._failure = MlflowException
        file = self.uri.removeprefix("sqlite:///")
        if file != self.uri and not create and not os.path.exists(file):
            raise UserError(f"there is no MLflow store {file}; set MLFLOW_TRACKING_URI (or --uri) to where it is")
        mlflow.set_tracking_uri(self.uri)
        with first_use_alone(self.uri):
            self._client = mlflow.MlflowClient(self.uri, self.uri)
            self.experiment_id("Default")

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._client, name)

        def checked(*args: Any, **settings: Any) -> Any:
            try:
                return call(*args, **settings)
            except self._failure as error:
                raise self._explained(error) from error

        return checked

    def _explained(self, error: Any) -> StoreError:
        reason = " ".join(redacted(error).split())[:200]
        return StoreError(f"MLflow at {redacted(self.uri)}: {reason}", error.error_code)

    def experiment_id(self, name: str) -> str:
        """Of the experiment of that name, which is made where there is none."""
        found = self.get_experiment_by_name(name)
        return found.experiment_id if found else self.create_experiment(name, artifact_location(self.uri))

    def download(self, location: str, folder: str) -> str:
        """Artifacts at `location` (an artifact URI, or runs:/ID/PATH) into `folder`; returns where they are."""
        from mlflow.artifacts import download_artifacts

        try:
            return download_artifacts(artifact_uri=location, dst_path=folder, tracking_uri=self.uri)
        except (self._failure, OSError) as error:
            if isinstance(error, OSError):
                raise StoreError(f"{redacted(location)} cannot be read ({error.strerror or error})", "IO") from error
            raise self._explained(error) from error
