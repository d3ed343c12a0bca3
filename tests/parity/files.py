"""Owns the media that requests name: files in a directory, and an HTTP server on loopback that serves them."""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any


class Files:
    """Named bytes, each as a file, by HTTP, and as text.

    Over HTTP, ``/redirect/NAME`` leads to ``/NAME``, ``/slow/NAME`` takes a second, ``/status/404`` answers 404, and
    ``/cut/NAME`` ends in the middle.
    """

    def __init__(self, directory: Path, made: dict[str, Callable[[], bytes]]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._made = made
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"files": self}))
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def data(self, name: str) -> bytes:
        return self.path(name).read_bytes()

    def path(self, name: str) -> Path:
        path = self._directory / name
        if not path.exists():
            path.write_bytes(self._made[name]())
        return path

    def url(self, name: str, way: str = "") -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/{way}{name}"

    def base64(self, name: str) -> str:
        return base64.b64encode(self.data(name)).decode()

    def uri(self, name: str, mime: str = "image/png") -> str:
        return f"data:{mime};base64,{self.base64(name)}"

    def __enter__(self) -> Files:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    files: Files

    def do_GET(self) -> None:
        way, _, name = self.path.lstrip("/").rpartition("/")
        if way == "status":
            self._answer(int(name), b"no")
        elif way == "redirect":
            self._answer(302, b"", Location=f"/{name}")
        else:
            time.sleep(1.0 if way == "slow" else 0.0)
            self._answer(200, self.files.data(name), cut=way == "cut")

    def _answer(self, status: int, content: bytes, *, cut: bool = False, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "image/png", "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if cut else content)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a test's output is for failures."""
