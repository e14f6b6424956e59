"""A folder over HTTP/1.1 with byte ranges, each answer late: what an object store in the same region feels like.

python tools/latency_server.py FOLDER SECONDS    prints its port, serves until its stdin is closed
"""

import contextlib
import hashlib
import os
import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, *_: object) -> None:
        """Clients hang up when they have enough."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    folder: Path
    seconds: float

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        time.sleep(self.seconds)
        path = self.folder / Path(self.path).name
        if not path.is_file():
            self.send_error(404)
            return
        status = path.stat()
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, end = (int(span[1]), min(int(span[2]) + 1, status.st_size)) if span else (0, status.st_size)
        self.send_response(206 if span else 200)
        self.send_header("ETag", f'"{hashlib.md5(repr((path.name, status.st_mtime_ns)).encode()).hexdigest()}"')
        self.send_header("Content-Length", str(end - start))
        if span:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{status.st_size}")
        self.end_headers()
        self.wfile.flush()
        if body:
            with open(path, "rb") as file, contextlib.suppress(ConnectionError):  # a client may have read enough
                while start < end:
                    start += os.sendfile(self.connection.fileno(), file.fileno(), start, end - start)


def main() -> None:
    Handler.folder, Handler.seconds = Path(sys.argv[1]), float(sys.argv[2])
    server = Server(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()


if __name__ == "__main__":
    main()
