"""One run in an MLflow store: found or made, and what is written to it. Everything here may block for long."""

import contextlib
import fcntl
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from fulllora_dist.storage import urls
from fulllora_dist.tracking.spool import Line, points_of

KEY = "fulllora_run"
"""Tag with a name of our own, by which a run is found whose id was not heard of: the answer got lost, or the file."""
_MOST_POINTS, _MOST_PARAMS = 1000, 100  # that MLflow takes in one call
_LONGEST_PARAM, _LONGEST_TAG, _LONGEST_DIGEST = 6000, 8000, 36
_NOT_IN_A_NAME = re.compile(r"[^/\w.\- :]")
_ARTIFACTS = ("artifact", "text")
_RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
_retries: str | None = None  # what was set here


def allowed_name(name: str) -> str:
    """Of a metric or tag, as MLflow takes it."""
    return _NOT_IN_A_NAME.sub("_", name)


class Refused(Exception):
    """What was asked for can never be done, so that trying again is no use."""


class MlflowRun:
    """The run of one key.

    Attributes:
        id: of the run.
        is_new: whether it was made here.
    """

    def __init__(self, uri: str, experiment: str, name: str, key: str, run_id: str | None):
        """Args:
        name: for people, of a run that is made.
        key: its name of our own.
        run_id: where it is known.
        """
        with first_use_alone(uri):
            client = patient_client(uri)  # this, too, is a use
            found = client.get_experiment_by_name(experiment)
            number = found.experiment_id if found else client.create_experiment(experiment, artifact_location(uri))
        self._client = client
        self._refused: set[str] = set()  # names of points
        self.is_new = False
        self.id = self._known(run_id) or self._found(number, key)
        if self.id is None:
            self.id, self.is_new = client.create_run(number, run_name=name, tags={KEY: key}).info.run_id, True

    def _known(self, run_id: str | None) -> str | None:
        """None for one that this store has not."""
        from mlflow.exceptions import MlflowException

        if run_id is None:
            return None
        try:
            return self._client.get_run(run_id).info.run_id
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise

    def _found(self, experiment: str, key: str) -> str | None:
        found = self._client.search_runs([experiment], f"tags.{KEY} = '{key}'")
        return found[0].info.run_id if found else None

    def log(self, lines: Iterable[Line]) -> dict[str, str]:
        """The points of lines {"step", "time" in ms, name: value, ...}.

        Returns:
            {name: reason} of those that MLflow never takes, at their first appearance; all others are there.
        """
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        points: dict[str, list[Metric]] = {}
        for line in lines:
            for given, value in points_of(line).items():
                if (name := allowed_name(given)) not in self._refused:
                    points.setdefault(name, []).append(Metric(name, value, line["time"], line["step"]))
        refused: dict[str, str] = {}
        try:
            self._log([point for named in points.values() for point in named])
        except MlflowException as error:
            if not self._is_for_good(error):
                raise
            for name, named in points.items():
                try:
                    self._log(named)
                except MlflowException as of_name:
                    if not self._is_for_good(of_name):
                        raise
                    refused[name] = urls.one_line(of_name)
        self._refused |= refused.keys()
        return refused

    def _log(self, points: Sequence[Any]) -> None:
        for some in _parts(points, _MOST_POINTS):
            self._client.log_batch(self.id, metrics=some)

    def do(self, event: Line, folder: str) -> None:
        """An event as `Tracker` writes it. Doing it again changes nothing.

        Args:
            folder: that the paths of artifacts start from.

        Raises:
            Refused: it can never be done.
        """
        from mlflow.exceptions import MlflowException

        try:
            self._do(event, folder)
        except FileNotFoundError as error:
            if event["do"] != "artifact" or os.path.exists(os.path.join(folder, event["path"])):
                raise
            raise Refused(f"{event['path']} is not there any more") from error
        except MlflowException as error:
            if self._is_for_good(error):
                raise Refused(urls.one_line(error)) from error
            raise

    def _is_for_good(self, error: Any) -> bool:
        """Whether MLflow will never do what it was asked for. A run in its bin refuses all, until it is restored."""
        if error.error_code not in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "INVALID_STATE"):
            return False
        return self._client.get_run(self.id).info.lifecycle_stage != "deleted"

    def _do(self, event: Line, folder: str) -> None:
        client, kind = self._client, event["do"]
        if kind == "params":
            self._params(event["values"])
        elif kind == "tags":
            self._tags(event["values"])
        elif kind == "status" and event["status"] == "RUNNING":
            client.update_run(self.id, status="RUNNING")
        elif kind == "status":
            client.set_terminated(self.id, event["status"], event["time"])
        elif kind == "data":
            self._data(event)
        elif kind == "text":
            client.log_text(self.id, event["text"], event["name"])
        elif kind == "artifact":
            path = os.path.join(folder, event["path"])
            log = client.log_artifacts if os.path.isdir(path) else client.log_artifact
            log(self.id, path, event["folder"])
        else:
            raise Refused(f"{kind!r} is nothing that this version knows")

    def _params(self, values: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        params = [Param(name, str(value)[:_LONGEST_PARAM]) for name, value in values.items()]
        for some in _parts(params, _MOST_PARAMS):
            self._client.log_batch(self.id, params=some)

    def _tags(self, values: Mapping[str, Any]) -> None:
        from mlflow.entities import RunTag

        tags = [RunTag(allowed_name(name), str(value)[:_LONGEST_TAG]) for name, value in values.items()]
        for some in _parts(tags, _MOST_PARAMS):
            self._client.log_batch(self.id, tags=some)

    def _data(self, event: Line) -> None:
        """A split under a name of its own: a second one of the same name is dropped, whatever its context is."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        kind = urls.scheme_of(event["source"])
        source = {"url" if kind.startswith("http") else "uri": event["source"]}
        data = Dataset(
            name=event["name"],
            digest=event["digest"][:_LONGEST_DIGEST],
            source_type={"file": "local", "https": "http"}.get(kind, kind),
            source=json.dumps(source),
            profile=json.dumps({"pictures": event["pictures"], "classes": event["classes"], "index": event["digest"]}),
        )
        tags = [InputTag("mlflow.data.context", event["context"])]
        self._client.log_inputs(self.id, [DatasetInput(data, tags)])

    def end(self, run_id: str, status: str) -> None:
        """Of another run, where it is in this store."""
        if self._known(run_id) is not None:
            self._client.set_terminated(run_id, status)


def is_artifact(event: Line) -> bool:
    """Whether it goes to the store of artifacts, which may fail alone."""
    return event["do"] in _ARTIFACTS


def patient_client(uri: str) -> Any:
    """An `MlflowClient` whose calls fail soon, and once: trying again is ours, and a run is not to be made twice."""
    set_defaults(retries=0)
    from mlflow import MlflowClient

    return MlflowClient(uri)


def set_defaults(retries: int) -> None:
    """MLflow's settings for this process, where its user has made none: a dead server would hold a caller for four
    minutes, and stdout is ours. To be called before MLflow is imported.

    Args:
        retries: of a request that fails. They are the process's, not a client's: of several calls the fewest count,
            whichever comes first.
    """
    global _retries
    if os.environ.get(_RETRIES) in (None, _retries):
        _retries = str(min(retries, int(_retries or retries)))
        os.environ[_RETRIES] = _retries
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")


def artifact_location(uri: str) -> str | None:
    """Beside a sqlite file; MLflow's default is the working directory. A server has its own."""
    if not uri.startswith("sqlite:///"):
        return None
    return "file://" + os.path.join(os.path.dirname(os.path.abspath(uri.removeprefix("sqlite:///"))), "mlruns")


@contextlib.contextmanager
def first_use_alone(uri: str) -> Iterator[None]:
    """A fresh sqlite store is migrated at first use, and two processes at once break it."""
    if not uri.startswith("sqlite:///"):
        yield
        return
    path = os.path.abspath(uri.removeprefix("sqlite:///"))
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path + ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _parts(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[i : i + size] for i in range(0, len(items), size))
