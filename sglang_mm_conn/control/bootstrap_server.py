"""The route that tells language servers where an encoder's control sockets are."""

from __future__ import annotations

import threading
from collections.abc import Callable

import msgspec
import uvicorn
from fastapi import APIRouter, FastAPI, Response

from sglang_mm_conn.control.bootstrap import ROUTE, BootstrapInfo


def bootstrap_router(info: Callable[[], BootstrapInfo | None]) -> APIRouter:
    """A router with the one route; ``info`` answers None as long as the encoder is not ready (HTTP 503)."""
    router = APIRouter()

    @router.get(ROUTE, include_in_schema=False)
    async def conn_multimodal() -> Response:
        answer = info()
        if answer is None:
            return Response("the encoder is starting", status_code=503)
        return Response(msgspec.json.encode(answer), media_type="application/json")

    return router


class StandaloneBootstrap:
    """The route on a port of its own, for encoders that have no HTTP server (tests, benchmarks)."""

    def __init__(self, host: str, port: int, info: Callable[[], BootstrapInfo | None]) -> None:
        """``port`` 0 takes a free one. Returns when the server answers."""
        app = FastAPI(openapi_url=None)
        app.include_router(bootstrap_router(info))
        self._server = uvicorn.Server(uvicorn.Config(app, host=host, port=port, log_level="warning"))
        self._thread = threading.Thread(target=self._server.run, name="mm-conn-bootstrap-http", daemon=True)
        self._thread.start()
        pause = threading.Event()
        while not self._server.started:
            if not self._thread.is_alive():
                raise OSError(f"bootstrap server cannot listen on {host}:{port}")
            pause.wait(0.01)
        bound = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://[{host}]:{bound}" if ":" in host else f"http://{host}:{bound}"

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)
