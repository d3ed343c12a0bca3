"""Owns what draining does on an encoder's HTTP server: the gate before /encode, and the route that takes orders."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import AbstractAsyncContextManager
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from sglang_mm_conn.control.authentication import DeploymentKey, NotAuthentic, RefusalLog, is_loopback, new_nonce
from sglang_mm_conn.control.draining import ANSWER, ASK, DONE, DRAIN_ROUTE, ORDER, DrainOrder, DrainStatus
from sglang_mm_conn.control.http_exchange import NONCE, SIGNATURE
from sglang_mm_conn.core.dispatch.verdicts import DRAINING, STATE_HEADER
from sglang_mm_conn.core.encoder.draining import Draining
from sglang_mm_conn.core.errors import ConnError
from sglang_mm_conn.core.states import DrainState

logger = logging.getLogger(__name__)

ENCODE = "/encode"
_CHALLENGE_SECONDS = 30.0
_MOST_BYTES = 1024  # of an order
_REFUSAL = b'{"status":"error","message":"the encoder is draining","req_id":null}'
_REFUSAL_HEADERS = [
    (b"content-type", b"application/json"),
    (b"content-length", str(len(_REFUSAL)).encode()),
    (STATE_HEADER.lower().encode(), DRAINING.encode()),
]

_ORDER = msgspec.json.Decoder(DrainOrder)  # made at import, see bootstrap.py

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]
Lifespan = Callable[[Any], AbstractAsyncContextManager[None]]


class HeldRequests:
    """The requests to /encode that the server holds, as tasks of its event loop."""

    def __init__(self, draining: Draining) -> None:
        self.draining = draining
        self.abandoned = False
        self._tasks: set[asyncio.Task[Any] | None] = set()

    def add(self, task: asyncio.Task[Any] | None) -> None:
        self._tasks.add(task)
        self.draining.held = len(self._tasks)

    def remove(self, task: asyncio.Task[Any] | None) -> None:
        self._tasks.discard(task)
        self.draining.held = len(self._tasks)

    def abandon(self) -> None:
        """Cancel all. The gate answers each as it refuses new ones, so that its sender goes to another encoder."""
        self.abandoned = True
        for task in list(self._tasks):
            if task is not None:
                task.cancel()


class EncodeGate:
    """ASGI middleware: counts the requests to /encode, and refuses new ones while the encoder drains.

    The body of a refused request is not read: the HTTP server drops it as it arrives.
    """

    def __init__(self, app: AsgiApp, held: HeldRequests) -> None:
        self._app = app
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != ENCODE or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        held = self._held
        if held.draining.refuses:
            await _refuse(send)
            return
        started = False

        async def forward(message: MutableMapping[str, Any]) -> None:
            nonlocal started
            started = True
            await send(message)

        task = asyncio.current_task()
        held.add(task)
        try:
            await self._app(scope, receive, forward)
        except asyncio.CancelledError:
            if started or not held.abandoned:
                raise
            await _refuse(send)
        finally:
            held.remove(task)


async def _refuse(send: Send) -> None:
    await send({"type": "http.response.start", "status": 503, "headers": _REFUSAL_HEADERS})
    await send({"type": "http.response.body", "body": _REFUSAL})


class Challenge:
    """The nonce that the next order must bring. An accepted order and time replace it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._value = ""
        self._issued = 0.0

    def current(self) -> str:
        """At most one new one per _CHALLENGE_SECONDS: whoever only asks cannot take an order's challenge away."""
        now = self._clock()
        if not self._value or now - self._issued >= _CHALLENGE_SECONDS:
            self._value, self._issued = new_nonce(), now
        return self._value

    def redeem(self, value: str) -> bool:
        """Whether ``value`` is the current challenge; then it is none any more."""
        if not self._value or value != self._value or self._clock() - self._issued >= 2 * _CHALLENGE_SECONDS:
            return False
        self._value = ""
        return True


class DrainRoute:
    """Answers with the status of the encoder, and takes orders to drain."""

    def __init__(
        self, draining: Draining, key: DeploymentKey | None, *, insecure: bool, changed: Callable[[], None]
    ) -> None:
        """``changed``: called when draining has begun or ended. ``insecure``: without a key, clients that are not on
        loopback may give orders too."""
        self._draining = draining
        self._key = key
        self._insecure = insecure
        self._changed = changed
        self._challenge = Challenge()
        self._refusals = RefusalLog()

    def router(self, lifespan: Lifespan | None = None) -> APIRouter:
        """``lifespan``: of the application that includes the router, beside its own."""
        router = APIRouter(lifespan=lifespan)
        router.add_api_route(DRAIN_ROUTE, self._ask, methods=["GET"], include_in_schema=False)
        router.add_api_route(DRAIN_ROUTE, self._order, methods=["POST"], include_in_schema=False)
        return router

    async def _ask(self, request: Request) -> Response:
        nonce = request.headers.get(NONCE, "")
        if refusal := self._unproven(request, ASK, nonce.encode()):
            return refusal
        return self._status(ANSWER, nonce, self._challenge.current())

    async def _order(self, request: Request) -> Response:
        challenge = request.headers.get(NONCE, "")
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > _MOST_BYTES:
                return Response("the order is too long", status_code=413)
        if refusal := self._unproven(request, ORDER, challenge.encode(), body):
            return refusal
        try:
            order = _ORDER.decode(body)
        except msgspec.DecodeError as error:
            return Response(f"the order is malformed: {error}", status_code=400)
        # Only now: who cannot prove the key cannot use a challenge up.
        if not self._challenge.redeem(challenge):
            return Response("the challenge is used up or too old: ask for another one", status_code=412)
        try:
            changed = self._draining.order(drain=order.drain)
        except ConnError as error:
            return Response(str(error), status_code=409)
        if changed:
            began = self._draining.state is DrainState.DRAINING
            logger.info(
                "Draining %s by an order; %d requests to /encode are held",
                "begun" if began else "undone", self._draining.held,
            )  # fmt: skip
            self._changed()
        return self._status(DONE, challenge, "")

    def _unproven(self, request: Request, purpose: str, *parts: bytes) -> Response | None:
        """The answer to a client that may not use the route; None if it may."""
        host = request.client.host if request.client else None
        if self._key is None:
            if self._insecure or is_loopback(host):
                return None
            self._refusals.refused(host or "?", "without a key only this host may ask the encoder to drain")
            return Response(
                "without a key (SGLANG_MM_CONN_KEY_FILE) only clients on the encoder's own host may do this, over "
                "its loopback address",
                status_code=403,
            )
        try:
            self._key.verify(request.headers.get(SIGNATURE, ""), purpose, *parts)
        except NotAuthentic:
            self._refusals.refused(host or "?", "its request about draining proves no key")
            return Response("this deployment requires a key", status_code=401)
        return None

    def _status(self, purpose: str, nonce: str, challenge: str) -> Response:
        draining = self._draining
        ending = draining.state in (DrainState.ENDING, DrainState.OVER)
        body = msgspec.json.encode(DrainStatus(draining.refuses, ending, draining.held, challenge))
        signature = "" if self._key is None else self._key.sign(purpose, nonce.encode(), body)
        return Response(body, media_type="application/json", headers={SIGNATURE: signature})
