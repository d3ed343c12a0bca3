"""Owns the HTTP route that sends language servers the addresses of an encoder's control sockets."""

from __future__ import annotations

import threading
from collections.abc import Callable

import uvicorn
from fastapi import APIRouter, FastAPI, Request, Response

from sglang_mm_conn.control.authentication import DeploymentKey, NotAuthentic, RefusalLog
from sglang_mm_conn.control.bootstrap import ROUTE, SIGNATURE, BootstrapInfo, answer_request

# Returns the answer of the route and the key that protects it; None while the encoder starts (HTTP 503).
Source = Callable[[], tuple[BootstrapInfo, DeploymentKey | None] | None]


def bootstrap_router(source: Source) -> APIRouter:
    """A router with the one route. With a key, a client that does not prove it gets HTTP 401."""
    router = APIRouter()
    refusals = RefusalLog()

    @router.get(ROUTE, include_in_schema=False)
    async def conn_multimodal(request: Request) -> Response:
        ready = source()
        if ready is None:
            return Response("the encoder is starting", status_code=503)
        try:
            body, signature = answer_request(*ready, request.headers)
        except NotAuthentic:
            refusals.refused(request.client.host if request.client else "?", "its look-up proves no key")
            return Response("this deployment requires a key", status_code=401)
        return Response(body, media_type="application/json", headers={SIGNATURE: signature})

    return router


class StandaloneBootstrap:
    """Serves the route on a separate port, for encoders without an HTTP server (tests, benchmarks)."""

    def __init__(self, host: str, port: int, source: Source) -> None:
        """``port``: 0 for any free port. Returns when the server accepts connections."""
        app = FastAPI(openapi_url=None)
        app.include_router(bootstrap_router(source))
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
