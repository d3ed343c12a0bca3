"""HTTP servers that stand in for encoders: the bootstrap route, and an ``/encode`` that a test programs."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from aiohttp import web

from sglang_mm_conn.control.bootstrap import ROUTE, BootstrapInfo, Worker
from sglang_mm_conn.core.messages import PROTOCOL_VERSION

Answer = Callable[[web.Request, dict[str, Any]], Awaitable[web.StreamResponse]]


async def arrived(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    """What sglang answers once the embedding was delivered."""
    return web.Response(body=b"null", content_type="application/json")


async def hang(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    await asyncio.sleep(3600)
    raise AssertionError


async def cut(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    """The process dies while it has the part."""
    assert request.transport is not None
    request.transport.abort()
    await asyncio.sleep(3600)
    raise AssertionError


def error(status: int, message: str = "why", headers: dict[str, str] | None = None) -> Answer:
    """What sglang answers to an encode that failed."""

    async def answer(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        content = {"status": "error", "message": message, "req_id": body["req_id"]}
        return web.json_response(content, status=status, headers=headers)

    return answer


def plain(status: int, text: str = "", headers: dict[str, str] | None = None) -> Answer:
    """An answer of some other server."""

    async def answer(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return web.Response(status=status, text=text, content_type="text/html", headers=headers)

    return answer


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(condition: Callable[[], object], what: str, seconds: float = 10.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"waited {seconds} s for {what}"
        time.sleep(0.005)


class FakeEncoder:
    """One encoder server on a thread of its own.

    Attributes:
        encode: answers ``/encode``.
        info: the answer of the bootstrap route; None: no answer comes.
        bodies: what was posted.
        connections: the client ports of the posts.
        left: posts whose client went away before the answer.
        probes: number of look-ups.
    """

    def __init__(self, encode: Answer = arrived, *, port: int = 0, prefix_cache: bool = False) -> None:
        self.encode = encode
        worker = Worker("0123456789abcdef", 4711)
        self.info: BootstrapInfo | None = BootstrapInfo(PROTOCOL_VERSION, [worker], prefix_cache=prefix_cache)
        self.bodies: list[dict[str, Any]] = []
        self.connections: list[int] = []
        self.left = 0
        self.probes = 0
        self.url = ""
        self._port = port
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        assert self._started.wait(10)

    def _serve(self) -> None:
        try:
            self._loop.run_until_complete(self._run())
        finally:
            self._loop.close()

    async def _run(self) -> None:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_get(ROUTE, self._look_up)
        app.router.add_post("/encode", self._encode)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        listener = socket.create_server(("127.0.0.1", self._port))
        await web.SockSite(runner, listener).start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        self._started.set()
        await self._stop.wait()
        # asyncio leaks a connection accepted just before its server closes: accept no more, and let those come in.
        self._loop.remove_reader(listener)
        await asyncio.sleep(0.01)
        await runner.cleanup()

    async def _look_up(self, _: web.Request) -> web.Response:
        self.probes += 1
        if self.info is None:
            await asyncio.sleep(3600)
        return web.Response(body=msgspec.json.encode(self.info), content_type="application/json")

    async def _encode(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        assert request.transport is not None
        self.bodies.append(body)
        self.connections.append(request.transport.get_extra_info("peername")[1])
        try:
            return await self.encode(request, body)
        except asyncio.CancelledError:
            self.left += 1
            raise

    @property
    def rooms(self) -> list[str]:
        return [body["req_id"] for body in self.bodies]

    def close(self) -> None:
        with contextlib.suppress(RuntimeError):  # closed before
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        assert not self._thread.is_alive()
