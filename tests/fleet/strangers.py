"""Owns servers that are no encoders: one that answers an error to everything, one that never answers, one of somebody
else."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_PAGE = b"<!doctype html><html><head><title>Welcome</title></head><body>It works.</body></html>\n"


class _Stranger(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True
    request_queue_size = 128


def _answering(status: int, kind: str, body: bytes, port: int) -> _Stranger:
    class Handler(BaseHTTPRequestHandler):
        """The same to every request."""

        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_PUT = do_DELETE = answer
        do_HEAD = answer

        def log_message(self, *args: object) -> None:
            """Says nothing."""

        def handle(self) -> None:
            with contextlib.suppress(OSError):  # the peer has left
                super().handle()

    return _Stranger(("127.0.0.1", port), Handler)


@contextlib.contextmanager
def _serving(server: _Stranger) -> Iterator[None]:
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), name="stranger", daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def failing(port: int) -> AbstractContextManager[None]:
    """Answers 500 to everything."""
    return _serving(_answering(500, "application/json", b'{"message": "out of order"}', port))


def web_server(port: int) -> AbstractContextManager[None]:
    """Answers 200 to everything, with a page."""
    return _serving(_answering(200, "text/html; charset=utf-8", _PAGE, port))


@contextlib.contextmanager
def silent(port: int) -> Iterator[None]:
    """Accepts every connection, and never says a word."""
    connections: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", port), backlog=128) as listener:
        listener.settimeout(0.1)
        ending = threading.Event()

        def accept() -> None:
            while not ending.is_set():
                with contextlib.suppress(TimeoutError):
                    connections.append(listener.accept()[0])

        thread = threading.Thread(target=accept, name="silent", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ending.set()
            thread.join()
            for connection in connections:
                connection.close()


STRANGERS: dict[str, Callable[[int], AbstractContextManager[None]]] = {
    "answers 500 to everything": failing,
    "accepts connections and never answers": silent,
    "a stranger's web server": web_server,
}
