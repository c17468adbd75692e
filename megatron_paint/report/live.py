"""`--serve`: the report of runs that may still train, on this machine alone."""

import hashlib
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import urlsplit

from megatron_paint.base.errors import UserError
from megatron_paint.base.json_text import to_json
from megatron_paint.report.build import make_readers, report_data, title_of
from megatron_paint.report.page import render
from megatron_paint.report.pages import PAGE_FILE, encode
from megatron_paint.report.reader import RunReader

ADDRESS = "127.0.0.1"
NO_FRAMES = "frame-ancestors 'none'"


class LiveReport:
    """The data of the report as they are now. One request at a time reads the run folders."""

    def __init__(self, runs: Sequence[Path]) -> None:
        self._paths = list(runs)
        self._readers = make_readers(runs)
        self._lock = Lock()
        self._stamp = ""
        self._data: dict[str, Any] = {}
        self._trees: list[dict[str, Any] | None] = []

    def page(self) -> str:
        """The HTML page."""
        _, data = self.data()
        return render(data, title=title_of(data), pages={}, live=True)

    def data(self) -> tuple[str, dict[str, Any]]:
        """A text that changes with the run folders, and the data."""
        with self._lock:
            stamp = self._stamp_now()
            if stamp != self._stamp:
                found = [reader.read() for reader in self._readers]
                self._trees = [run.tree for run in found]
                self._data = {**report_data(self._paths, found), "live": True}
                self._stamp = stamp
            return stamp, self._data

    def page_of(self, key: str) -> str | None:
        """A page of samples or answers by its key, encoded; None: there is none."""
        run, name = key.removeprefix("r").split("_", 1)
        if int(run) >= len(self._readers):
            return None
        with self._lock:
            content = self._readers[int(run)].page(name, self._trees[int(run)] if self._trees else None)
        return None if content is None else encode(content)

    def _stamp_now(self) -> str:
        digest = hashlib.sha256()
        for reader in self._readers:
            for path in _watched(reader):
                try:
                    status = path.stat()
                    digest.update(f"{path}:{status.st_mtime_ns}:{status.st_size};".encode())
                except OSError:
                    digest.update(f"{path}:-;".encode())
        return digest.hexdigest()[:32]


def _watched(reader: RunReader) -> list[Path]:
    """What changes when a run writes something that the report shows. A new file changes its folder."""
    folder = reader.folder
    files = [folder.config_file, folder.metrics_file, folder.logs / "console.log"]
    return [*files, *(folder.path / name for name in ("samples", "eval", "changes.jsonl"))]


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, report: LiveReport, port: int) -> None:
        self.report = report
        super().__init__((ADDRESS, port), _Handler)
        self.hosts = {f"{name}:{self.server_port}" for name in (ADDRESS, "localhost")}


class _Handler(BaseHTTPRequestHandler):
    """Answers GET for three kinds of paths: /, /data and /pages/KEY."""

    server: _Server
    protocol_version = "HTTP/1.1"
    server_version = "megatron-paint"
    sys_version = ""
    timeout = 30.0  # seconds that a connection may rest

    def do_GET(self) -> None:
        if self.headers.get("Host", "") not in self.server.hosts:
            # A page of another site whose name leads to this machine must not read the report.
            self._answer(
                HTTPStatus.MISDIRECTED_REQUEST, "text/plain", b"This server answers only requests for localhost.\n"
            )
            return
        path, report = urlsplit(self.path).path, self.server.report
        if path == "/":
            self._answer(HTTPStatus.OK, "text/html", report.page().encode("utf-8"))
        elif path == "/data":
            self._send_data(report)
        elif path.startswith("/pages/") and PAGE_FILE.fullmatch(f"{path.removeprefix('/pages/')}.js"):
            found = report.page_of(path.removeprefix("/pages/"))
            if found is None:
                self._answer(HTTPStatus.NOT_FOUND, "text/plain", b"There is no such page.\n")
            else:
                self._answer(HTTPStatus.OK, "text/plain", found.encode("ascii"))
        else:
            self._answer(HTTPStatus.NOT_FOUND, "text/plain", b"There is no such page.\n")

    def _send_data(self, report: LiveReport) -> None:
        stamp, data = report.data()
        if self.headers.get("If-None-Match") == f'"{stamp}"':
            self._answer(HTTPStatus.NOT_MODIFIED, "application/json", b"", stamp=stamp)
        else:
            self._answer(HTTPStatus.OK, "application/json", to_json(data).encode("utf-8", "replace"), stamp=stamp)

    def _answer(self, status: HTTPStatus, kind: str, body: bytes, *, stamp: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Content-Security-Policy", NO_FRAMES)
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        if stamp:
            self.send_header("ETag", f'"{stamp}"')
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Requests are not printed."""


def make_server(runs: Sequence[Path], *, port: int = 0) -> _Server:
    """A server that listens on 127.0.0.1; port 0: any free one. UserError: a folder is no run, or the port is taken."""
    report = LiveReport(runs)
    try:
        return _Server(report, port)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"--port={port} cannot be used on {ADDRESS} ({error}); give another port, or 0 for any"
        ) from error


def address_of(server: _Server) -> str:
    """The address to open."""
    return f"http://{ADDRESS}:{server.server_port}/"
