"""An HTTP server of a folder, with byte ranges and etags, that goes wrong where it is told to; and that keeps a log."""

import hashlib
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

# those that a client can get over, and those that it must not
PASSING = ("503", "500", "cut", "stall", "short", "no_length", "flip", "reset", "late")
FATAL = ("403", "404", "changed")


class Request(NamedTuple):
    """A GET of bytes [start, end) of the file `name`; `turn` counts those of the same bytes, from 0."""

    name: str
    start: int
    end: int
    turn: int


class FaultServer:
    """Serves the files of `folder` at `url` while it is entered.

    Attributes:
        fault: names what goes wrong with a request, or None.
        log: the GETs that were answered, in order, each with its fault.
        stall, late: seconds that a stalled or a late answer takes.
        whole: names of GETs without a range, in order.
        refusals: number of next ones that are answered with 503.
    """

    def __init__(self, folder: Path, fault: Callable[[Request], str | None] = lambda request: None):
        self.folder, self.fault = folder, fault
        self.log: list[tuple[Request, str | None]] = []
        self.stall, self.late = 3.0, 0.02
        self.whole: list[str] = []
        self.refusals = 0
        self._turns: Counter = Counter()
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients may hang up
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "FaultServer":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def note(self, name: str, start: int, end: int) -> str | None:
        """Log a request; its fault."""
        with self._lock:
            request = Request(name, start, end, self._turns[name, start, end])
            self._turns[name, start, end] += 1
            fault = self.fault(request)
            self.log.append((request, fault))
        return fault


def _handler(server: FaultServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _refuse(self, status: int) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def _answer(self, body: bool) -> None:
            name = unquote(urlsplit(self.path).path).lstrip("/")
            path = server.folder / name
            if not path.is_file():
                return self._refuse(404)
            data = path.read_bytes()
            span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            start, end = (int(span[1]), int(span[2]) + 1) if span else (0, len(data))
            fault = server.note(name, start, end) if body and span else None
            if body and not span:
                server.whole.append(name)
                if server.refusals > 0:
                    server.refusals -= 1
                    return self._refuse(503)
            if fault in ("503", "500", "403", "404"):
                return self._refuse(int(fault))
            etag = f'"{hashlib.md5(data).hexdigest()}"'
            if fault == "changed":
                etag, data = '"other"', bytes(len(data))
            if self.headers.get("If-Match", etag) != etag:
                return self._refuse(412)
            if start >= len(data):
                return self._refuse(416)
            return self._send(data[start:end], start, len(data), etag, bool(span), body, fault)

        def _send(
            self, part: bytes, start: int, total: int, etag: str, partial: bool, body: bool, fault: str | None
        ) -> None:
            length = len(part)
            if fault and fault.startswith("flip"):
                place = int(fault[8:] or length // 2)  # "flip at 17"
                part = part[:place] + bytes([part[place] ^ 4]) + part[place + 1 :]
            if fault in ("short", "no_length"):
                part = part[: length - 1 - length // 3]
                length = len(part)
            if fault == "late":
                time.sleep(server.late)
            if fault == "reset":
                self.close_connection = True
                return
            self.send_response(206 if partial else 200)
            self.send_header("ETag", etag)
            if partial:
                self.send_header("Content-Range", f"bytes {start}-{start + len(part) - 1}/{total}")
            if fault == "no_length":
                self.send_header("Connection", "close")
            else:
                self.send_header("Content-Length", str(length))
            self.end_headers()
            if not body:
                return
            if fault in ("cut", "stall"):
                self.wfile.write(part[: length // 2])
                self.wfile.flush()
                if fault == "stall":
                    time.sleep(server.stall)
                self.close_connection = True
                return
            self.wfile.write(part)
            self.close_connection = fault == "no_length"

    return Handler
