"""A metadata service, as clouds have one for the credentials of a machine, that throttles where it is told to."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class MetadataService:
    """Attributes:
    endpoint: for AWS_EC2_METADATA_SERVICE_ENDPOINT.
    throttled: number of next requests that are answered with 503.
    role: whether the machine has one.
    requests: all so far, those throttled among them.
    """

    def __init__(self, endpoint: str, key: str, secret: str):
        self.endpoint, self.key, self.secret = endpoint, key, secret
        self.throttled, self.requests, self.role = 0, 0, True

    def answer(self, path: str) -> tuple[int, str]:
        """Status and body."""
        self.requests += 1
        if self.throttled > 0:
            self.throttled -= 1
            return 503, ""
        if path.endswith("/api/token"):
            return 200, "token"
        if not self.role:
            return 404, ""
        if path.endswith("/security-credentials/"):
            return 200, "trainer"
        until = (datetime.now(UTC) + timedelta(hours=6)).strftime("%Y-%m-%dT%H:%M:%SZ")
        names = {
            "AccessKeyId": self.key,
            "SecretAccessKey": self.secret,
            "Token": "",
            "Expiration": until,
        }  # moto refuses a user's key with one
        return 200, json.dumps(names | {"Code": "Success"})


@contextmanager
def metadata_service(key: str, secret: str) -> Iterator[MetadataService]:
    """One that gives these credentials."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    server.daemon_threads = True
    service = MetadataService(f"http://127.0.0.1:{server.server_port}", key, secret)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            status, body = service.answer(self.path)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        do_PUT = do_GET

    server.RequestHandlerClass = Handler
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield service
    server.shutdown()
    server.server_close()
