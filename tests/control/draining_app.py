"""An HTTP server with the gate, the route and SIGTERM of an encoder, and without a model.

``/encode?seconds=2`` answers after so long, ``hang=1`` never, ``block=1`` stops the event loop, ``room=1`` waits until
its room is failed. Run as a script it prints its port and serves as sglang does: ``uvicorn.run`` in the main thread.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
import threading
import time

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from sglang_mm_conn.control.authentication import DeploymentKey
from sglang_mm_conn.control.bootstrap import BootstrapInfo, Worker
from sglang_mm_conn.control.bootstrap_server import bootstrap_router
from sglang_mm_conn.control.draining_server import DrainRoute, EncodeGate, HeldRequests
from sglang_mm_conn.control.termination import Termination
from sglang_mm_conn.core.encoder.draining import Draining
from sglang_mm_conn.core.messages import PROTOCOL_VERSION


class App:
    """What a ServerDrain of the plugin joins, with the notices that heartbeats would bring."""

    def __init__(self, key: DeploymentKey | None = None, *, insecure: bool = False, seconds: float = 30.0) -> None:
        self.draining = Draining()
        self.notices: list[bool] = []
        self.encodes = 0
        self.failed: asyncio.Future[tuple[str, int]] | None = None
        held = HeldRequests(self.draining)
        route = DrainRoute(self.draining, key, insecure=insecure, changed=self._changed)
        termination = Termination(held, seconds, changed=self._changed, fail_rooms=self._fail)
        self.app = FastAPI(openapi_url=None)
        self.app.add_middleware(EncodeGate, held=held)
        self.app.include_router(bootstrap_router(lambda: (self._info(), key)))
        self.app.include_router(route.router(termination.lifespan))
        self.app.add_api_route("/encode", self._encode, methods=["POST"])
        self.app.add_api_route("/health", self._health, methods=["GET"])

    def _info(self) -> BootstrapInfo:
        return BootstrapInfo(PROTOCOL_VERSION, [Worker("0123456789abcdef", 4711)], draining=self.draining.refuses)

    def _changed(self) -> None:
        self.notices.append(self.draining.refuses)

    def _fail(self, reason: str, code: int) -> None:
        if self.failed is not None:
            self.failed.set_result((reason, code))

    async def _health(self) -> JSONResponse:
        return JSONResponse({"encodes": self.encodes})

    async def _encode(self, request: Request) -> JSONResponse:
        wish = request.query_params
        self.encodes += 1
        if "room" in wish:
            self.failed = asyncio.get_running_loop().create_future()
            reason, code = await self.failed
            return JSONResponse({"status": "error", "message": reason}, status_code=code)
        body = await request.body()
        await asyncio.sleep(1e6 if "hang" in wish else float(wish.get("seconds", 0)))
        if "block" in wish:  # the event loop hangs, as in a kernel that never returns
            time.sleep(1e6)
        return JSONResponse({"status": "ok", "bytes": len(body)})


class Threaded:
    """Serves an App on a thread of this process; signals stay this process's own."""

    def __init__(self, app: App, host: str = "127.0.0.1") -> None:
        self.app = app
        self._server = uvicorn.Server(uvicorn.Config(app.app, host=host, port=0, log_level="warning"))
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        pause = threading.Event()
        while not self._server.started:
            assert self._thread.is_alive()
            pause.wait(0.01)
        self.url = f"http://{host}:{self._server.servers[0].sockets[0].getsockname()[1]}"

    def __enter__(self) -> Threaded:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(10)
        assert not self._thread.is_alive()


def main(arguments: list[str]) -> None:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    app = App(seconds=float(arguments[0]))
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    sys.stdout.write(f"{port}\n")
    sys.stdout.flush()
    uvicorn.run(app.app, host="127.0.0.1", port=port)


if __name__ == "__main__":
    main(sys.argv[1:])
