"""Mock S3: moto's server in a process of its own, with signatures checked, behind a proxy that keeps a log."""

import http.client
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from fulllora_dist.distributed.comm import free_port

BUCKET = "bucket"


class Get(NamedTuple):
    """A GET of bytes [start, end) of an object that was answered with `status`."""

    name: str
    start: int
    end: int
    status: int


class MockS3:
    """Attributes:
    environment: what a client needs to reach it.
    log: GETs of ranges, in order.
    puts: names of the objects that were written, in order.
    outage: while this file exists, every request is answered with 503.
    """

    def __init__(self, endpoint: str, key: str, secret: str):
        self.environment = {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": key,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        self.log: list[Get] = []
        self.puts: list[str] = []
        self.outage: Path | None = None

    def client(self) -> "object":
        """A boto3 client."""
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.environment["AWS_ENDPOINT_URL"],
            aws_access_key_id=self.environment["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self.environment["AWS_SECRET_ACCESS_KEY"],
            region_name="us-east-1",
        )

    def upload(self, folder: Path, prefix: str) -> str:
        """The files of `folder` as objects; the URL of the folder that they make."""
        client = self.client()
        for path in sorted(folder.iterdir()):
            if path.is_file() and not path.name.startswith("."):
                client.upload_file(str(path), BUCKET, f"{prefix}/{path.name}")  # type: ignore[attr-defined]
        return f"s3://{BUCKET}/{prefix}"


@contextmanager
def mock_s3() -> Iterator[MockS3]:
    """A server with one user, who owns all rights, and one bucket; from then on every request must be signed."""
    import boto3
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()  # of an earlier test, which keep the endpoint of their own time
    port = free_port()
    environment = {**os.environ, "INITIAL_NO_AUTH_ACTION_COUNT": "4"}
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            _await(port, process)
            backend = f"http://127.0.0.1:{port}"
            anyone = {"aws_access_key_id": "x", "aws_secret_access_key": "x", "region_name": "us-east-1"}
            iam = boto3.client("iam", endpoint_url=backend, **anyone)
            iam.create_user(UserName="trainer")
            rights = '{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]}'
            iam.put_user_policy(UserName="trainer", PolicyName="all", PolicyDocument=rights)
            key = iam.create_access_key(UserName="trainer")["AccessKey"]
            boto3.client("s3", endpoint_url=backend, **anyone).create_bucket(Bucket=BUCKET)
            proxy = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
            proxy.daemon_threads = True
            s3 = MockS3(f"http://127.0.0.1:{proxy.server_port}", key["AccessKeyId"], key["SecretAccessKey"])
            proxy.RequestHandlerClass = _forwarding(port, s3)
            threading.Thread(target=proxy.serve_forever, args=(0.05,), daemon=True).start()
            yield s3
            proxy.shutdown()
            proxy.server_close()
        finally:
            process.kill()


def _await(port: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1):
                return
        except OSError:
            time.sleep(0.1)
    raise AssertionError("moto's server does not come up")


def _forwarding(port: int, s3: MockS3) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def _forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if s3.outage is not None and s3.outage.exists():
                self.send_response(503)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            backend = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            # with the headers as they came: the signature covers some, the host among them
            backend.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                backend.putheader(name, value)
            backend.endheaders(body)
            answer = backend.getresponse()
            data = answer.read()
            span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            name = unquote(urlsplit(self.path).path).lstrip("/").removeprefix(f"{BUCKET}/")
            if self.command == "PUT":
                s3.puts.append(name)
            if self.command == "GET" and span:
                s3.log.append(Get(name, int(span[1]), int(span[2]) + 1, answer.status))
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("connection", "transfer-encoding", "content-length", "server", "date"):
                    self.send_header(name, value)
            length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
            self.send_header("Content-Length", length or "0")
            self.end_headers()
            self.wfile.write(data)
            backend.close()

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _forward

    return Handler
