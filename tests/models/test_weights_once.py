"""Two ranks of a machine fetch a backbone's weights once, through answers that a store gives when it is busy."""

import errno
import fcntl
import os
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file

from fulllora_dist.models.checkpoint_file import read_weights
from fulllora_dist.models.hub import download, kept_weights
from fulllora_dist.models.weights import fingerprint
from fulllora_dist.storage import machine_copy, store
from tests.ranks import RankServer
from tests.services.fault_server import FaultServer

TAG = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
WEIGHTS = {"blocks.0.attn.qkv.weight": torch.arange(12.0).reshape(3, 4)}


def refusing(folder: Path) -> Callable[[Any, int], None]:
    """flock on a file system that has none."""
    real = fcntl.flock

    def flock(file: Any, operation: int) -> None:
        if Path(os.readlink(f"/proc/self/fd/{file.fileno()}")).is_relative_to(folder):
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        real(file, operation)

    return flock


def read(_: object, url: str, cache: Path, locks: bool) -> str:
    os.environ["XDG_CACHE_HOME"] = str(cache)
    store._FIRST_PAUSE = 0.05
    if not locks:
        machine_copy.fcntl.flock = refusing(cache)
    return fingerprint(read_weights(url))


@pytest.mark.parametrize("locks", [True, False])
def test_weights_in_a_bucket_are_fetched_once_a_machine(rank_server: RankServer, tmp_path: Path, locks: bool) -> None:
    save_file(WEIGHTS, tmp_path / "vit.safetensors")
    with FaultServer(tmp_path) as server:
        server.refusals = 2
        seen = rank_server.run(2, read, f"{server.url}/vit.safetensors", tmp_path / "cache", locks)
        assert server.whole == ["vit.safetensors"] * 3
    assert seen == [fingerprint(WEIGHTS)] * 2


def test_a_cache_that_cannot_be_written_costs_only_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save_file(WEIGHTS, tmp_path / "vit.safetensors")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with FaultServer(tmp_path) as server:
        assert fingerprint(read_weights(f"{server.url}/vit.safetensors")) == fingerprint(WEIGHTS)
    assert "the weights are not kept (Not a directory); set XDG_CACHE_HOME" in caplog.text


class Hub(BaseHTTPRequestHandler):
    """A hub with one model, that is busy at first."""

    protocol_version = "HTTP/1.1"
    busy, asked = 2, 0

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        data = save(WEIGHTS)
        type(self).asked += 1
        type(self).busy -= 1
        there = self.path.endswith("/model.safetensors")
        self.send_response(503 if self.busy >= 0 else 200 if there else 404)
        self.send_header("X-Repo-Commit", "0123456789abcdef0123456789abcdef01234567")
        self.send_header("ETag", '"etag"')
        whole = self.busy < 0 and there
        self.send_header("Content-Length", str(len(data) if whole else 0))
        self.end_headers()
        if whole and self.command == "GET":
            self.wfile.write(data)

    do_HEAD = do_GET


def from_hub(_: object, url: str, cache: Path) -> str:
    from huggingface_hub import constants, file_download

    store._FIRST_PAUSE = 0.05
    constants.ENDPOINT, constants.HF_HUB_CACHE = url, str(cache)
    file_download.HUGGINGFACE_CO_URL_TEMPLATE = url + "/{repo_id}/resolve/{revision}/{filename}"
    constants.HUGGINGFACE_CO_URL_TEMPLATE = file_download.HUGGINGFACE_CO_URL_TEMPLATE
    weights = fingerprint(download(TAG))
    assert kept_weights(TAG)
    return weights


def test_the_hub_is_asked_once_a_machine(rank_server: RankServer, tmp_path: Path) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        seen = rank_server.run(2, from_hub, f"http://127.0.0.1:{server.server_port}", tmp_path / "hub")
    finally:
        server.shutdown()
        server.server_close()
    assert seen == [fingerprint(WEIGHTS)] * 2
    assert Hub.busy < 0
    assert Hub.asked <= 2 + 3, "the length, the file, and what was refused"
