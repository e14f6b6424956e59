"""A real `mlflow server` on a free port, that can be killed and come back; and a slow way to it."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

from fulllora_dist.distributed.comm import free_port

_START_SECONDS = 120


_NO_JOBS = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # seven processes more, which keep a core busy


class MlflowServer:
    """Keeps its database and artifacts in `folder`; not running until `start`.

    Args:
        database: a store in sqlite to begin with a copy of; without one, the server takes seconds to make its own.
        serve_artifacts: False gives clients the folder itself to write artifacts into.

    Attributes:
        uri: for clients, the same after every start.
    """

    def __init__(self, folder: Path, database: Path | None = None, serve_artifacts: bool = True):
        self.folder, self._database = folder, database
        self._port = free_port()
        self.uri = f"http://127.0.0.1:{self._port}"
        self._artifacts = (
            ["--artifacts-destination", str(folder / "artifacts")]
            if serve_artifacts
            else ["--no-serve-artifacts", "--default-artifact-root", str(folder / "artifacts")]
        )
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> "MlflowServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self, wait: bool = True) -> None:
        self.folder.mkdir(exist_ok=True)
        if self._database is not None and not (self.folder / "mlflow.db").exists():
            shutil.copy(self._database, self.folder / "mlflow.db")
        store = ["--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db", "--workers", "1"]
        where = ["--host", "127.0.0.1", "--port", str(self._port)]
        with open(self.folder / "server.log", "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", *store, *where, *self._artifacts],
                cwd=self.folder,
                env={k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")} | _NO_JOBS,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        if wait:
            self.wait()

    def wait(self) -> None:
        """Until it answers."""
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=2):
                    return
            except OSError:
                time.sleep(0.1)
        raise AssertionError((self.folder / "server.log").read_text()[-3000:])

    def kill(self) -> None:
        """SIGKILL to it and its workers."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


class SlowWay:
    """Forwards connections to `uri`; everything that the server answers comes `seconds` late.

    Attributes:
        uri: for clients.
        answers: how many came through.
    """

    def __init__(self, uri: str, seconds: float):
        host, _, port = uri.removeprefix("http://").partition(":")
        self._server, self._seconds = (host, int(port)), seconds
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.uri = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.answers = 0

    def __enter__(self) -> "SlowWay":
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(self._server)
            threading.Thread(target=self._pass_on, args=(client, server, 0.0), daemon=True).start()
            threading.Thread(target=self._pass_on, args=(server, client, self._seconds), daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket, late: float) -> None:
        with contextlib.suppress(OSError):
            while source.recv(1, socket.MSG_PEEK):
                time.sleep(late)  # by when an answer has come whole
                self.answers += late > 0
                sink.sendall(source.recv(1 << 20))
            sink.shutdown(socket.SHUT_WR)
