"""One run in an MLflow store: found or created, and written to. Everything here may block for long."""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from fulllora_dist.core.messages import one_line
from fulllora_dist.storage import urls
from fulllora_dist.tracking.mlflow_store import allowed_name, experiment_id, first_use_alone, patient_client
from fulllora_dist.tracking.spool import Line, metrics_of

KEY = "fulllora_run"
"""Tag with a key of our own, by which a run is found whose id was lost, with the answer or with the file."""
_MAX_PARAM, _MAX_TAG, _MAX_DIGEST = 6000, 8000, 36  # characters
ARTIFACTS = ("artifact", "text")
"""Events for the artifact store, which may fail alone."""


class Refused(Exception):
    """A request that can never succeed; retrying is useless."""


class MlflowRun:
    """The run of one key.

    Attributes:
        id: of the run.
        is_new: whether it was created here.
    """

    def __init__(self, uri: str, experiment: str, name: str, key: str, run_id: str | None, started: int | None = None):
        """Args:
        name: display name of a run that is created.
        key: see KEY.
        run_id: if it is known.
        started: when a run that is created began, in ms: its store may have been found much later.
        """
        with first_use_alone(uri):
            client = patient_client(uri)  # this, too, is a use
            number = experiment_id(client, experiment, uri)
        self._client = client
        self._refused: set[str] = set()  # names of metrics
        self.id = self._existing(run_id)
        if self.id is None:
            same_key = client.search_runs([number], f"tags.{KEY} = '{key}'")
            self.id = same_key[0].info.run_id if same_key else None
        self.is_new = self.id is None
        if self.id is None:
            self.id = client.create_run(number, started, run_name=name, tags={KEY: key}).info.run_id

    def _existing(self, run_id: str | None) -> str | None:
        """None for one that this store does not have."""
        from mlflow.exceptions import MlflowException

        if run_id is None:
            return None
        try:
            return self._client.get_run(run_id).info.run_id
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise

    def log(self, lines: Iterable[Line]) -> dict[str, str]:
        """The metrics of lines {"step", "time" in ms, name: value, ...}.

        Returns:
            {name: reason} of those that MLflow rejects for good, at their first appearance; all others are stored.
        """
        from mlflow.entities import Metric

        metrics: dict[str, list[Metric]] = {}
        for line in lines:
            for given, value in metrics_of(line).items():
                if (name := allowed_name(given)) not in self._refused:
                    metrics.setdefault(name, []).append(Metric(name, value, line["time"], line["step"]))
        refused: dict[str, str] = {}
        try:
            self._log([metric for named in metrics.values() for metric in named])
        except Refused:
            for name, named in metrics.items():
                try:
                    self._log(named)
                except Refused as error:
                    refused[name] = str(error)
        self._refused |= refused.keys()
        return refused

    def _log(self, metrics: Sequence[Any]) -> None:
        with self._telling_refusals():
            self._client.log_batch(self.id, metrics=metrics)

    @contextlib.contextmanager
    def _telling_refusals(self) -> Iterator[None]:
        """Raise `Refused` where retrying is useless. A deleted run rejects everything, until it is restored."""
        from mlflow.exceptions import MlflowException

        try:
            yield
        except MlflowException as error:
            permanent = error.error_code in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "INVALID_STATE")
            if permanent and self._client.get_run(self.id).info.lifecycle_stage != "deleted":
                raise Refused(one_line(error)) from error
            raise

    def do(self, event: Line, folder: str) -> None:
        """Carry out an event that `Tracker` wrote. Idempotent.

        Args:
            folder: the paths of artifacts are relative to it.

        Raises:
            Refused: it can never succeed.
        """
        with self._telling_refusals():
            self._do(event, folder)

    def _do(self, event: Line, folder: str) -> None:
        from mlflow.entities import Param, RunTag

        client, kind = self._client, event["do"]
        if kind in ("params", "tags"):
            entity, limit = (Param, _MAX_PARAM) if kind == "params" else (RunTag, _MAX_TAG)
            values = [entity(allowed_name(name), str(value)[:limit]) for name, value in event["values"].items()]
            client.log_batch(self.id, **{kind: values})
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
            if not os.path.exists(path):
                raise Refused(f"{event['path']} does not exist any more")
            log = client.log_artifacts if os.path.isdir(path) else client.log_artifact
            log(self.id, path, event["folder"])
        else:
            raise Refused(f"{kind!r} is unknown to this version")

    def _data(self, event: Line) -> None:
        """Under the name of the split: MLflow drops a second data set of one name, whatever its context is."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        kind = urls.scheme_of(event["source"])
        source = {"url" if kind.startswith("http") else "uri": event["source"]}
        data = Dataset(
            name=event["split"],
            digest=event["digest"][:_MAX_DIGEST],
            source_type={"file": "local", "https": "http"}.get(kind, kind),
            source=json.dumps(source),
            profile=json.dumps({"images": event["images"], "classes": event["classes"], "index": event["digest"]}),
        )
        tags = [InputTag("mlflow.data.context", event["context"])]
        self._client.log_inputs(self.id, [DatasetInput(data, tags)])

    def end(self, run_id: str, status: str) -> None:
        """Set the status of another run, if it is in this store."""
        if self._existing(run_id) is not None:
            self._client.set_terminated(run_id, status)
