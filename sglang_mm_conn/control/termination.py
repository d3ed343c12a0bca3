"""Owns what SIGTERM does to an encoder: it drains for a limited time, then its HTTP server ends as without this module.

uvicorn installs its signal handlers before the application's lifespan begins. The lifespan of this module takes
SIGTERM's place there, and calls uvicorn's handler when the encoder has drained. SIGINT stays uvicorn's.
"""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from http import HTTPStatus
from types import FrameType
from typing import Any

import uvicorn

from sglang_mm_conn.control.draining_server import HeldRequests

logger = logging.getLogger(__name__)

DRAINED = "the encoder has drained"
_POLL_SECONDS = 0.05
# Time for the answers of requests whose rooms were failed, then for those that were cancelled. A process that has not
# ended _FORCE_SECONDS after that does not end by itself: a thread hangs.
_GRACE_SECONDS = 2
_FORCE_SECONDS = 4


class Termination:
    """The answer to SIGTERM, for a server that ``uvicorn.run`` runs in the main thread."""

    def __init__(
        self,
        held: HeldRequests,
        seconds: float,
        *,
        changed: Callable[[], None],
        fail_rooms: Callable[[str, int], None],
    ) -> None:
        """
        Args:
            held: The requests of the server.
            seconds: How long it finishes what it holds; 0: SIGTERM stays uvicorn's.
            changed: Called when draining has begun.
            fail_rooms: Called with a reason and an HTTP status when the time is up: fails every open room.
        """
        self._held = held
        self._seconds = seconds
        self._changed = changed
        self._fail_rooms = fail_rooms
        self._signals = 0
        self._end: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def lifespan(self, app: Any) -> AsyncIterator[None]:
        """Holds SIGTERM for as long as the application runs."""
        theirs = signal.getsignal(signal.SIGTERM)
        server = getattr(theirs, "__self__", None)
        main = threading.current_thread() is threading.main_thread()
        if not self._seconds or not main or not isinstance(server, uvicorn.Server):
            if self._seconds and main:
                logger.warning("SIGTERM will not drain this encoder: uvicorn has not installed its handler for it")
            yield
            return
        loop = asyncio.get_running_loop()

        def on_sigterm(number: int, frame: FrameType | None) -> None:
            self._signals += 1
            if self._signals <= 2:  # whoever repeats it does not put the end off
                left = self._seconds if self._signals == 1 else 0.0
                # Needs neither the event loop nor the interpreter's lock, either of which may hang.
                faulthandler.dump_traceback_later(left + 2 * _GRACE_SECONDS + _FORCE_SECONDS, exit=True, file=2)
            # The handler may interrupt anything in this thread, so it changes nothing else.
            loop.call_soon_threadsafe(self._begin, server)

        signal.signal(signal.SIGTERM, on_sigterm)
        try:
            yield
        finally:
            if signal.getsignal(signal.SIGTERM) is on_sigterm:
                signal.signal(signal.SIGTERM, theirs)

    def _begin(self, server: uvicorn.Server) -> None:
        """For the first SIGTERM: drain. For each later one: the time is up."""
        draining = self._held.draining
        began = draining.end(time.monotonic(), self._seconds)
        if self._end is None:
            logger.info(
                "SIGTERM: draining; %d requests to /encode are held and have %g s to finish",
                draining.held, self._seconds,
            )  # fmt: skip
            if began:
                self._changed()
            self._end = asyncio.get_running_loop().create_task(self._drain_and_end(server))

    async def _drain_and_end(self, server: uvicorn.Server) -> None:
        began = time.monotonic()
        try:
            while not self._held.draining.is_over(time.monotonic()):
                await asyncio.sleep(_POLL_SECONDS)
            left = self._held.draining.held
            if left:
                await self._give_up()
            logger.info(
                "Drained after %.1f s, %d requests to /encode were given up: the server ends",
                time.monotonic() - began, left,
            )  # fmt: skip
        finally:
            # uvicorn reads this when it shuts down; without it, it waits for open requests for ever.
            server.config.timeout_graceful_shutdown = _GRACE_SECONDS
            server.handle_exit(signal.SIGTERM, None)

    async def _give_up(self) -> None:
        """Make the requests end that are still held."""
        self._fail_rooms(DRAINED, int(HTTPStatus.SERVICE_UNAVAILABLE))
        until = time.monotonic() + _GRACE_SECONDS / 2  # rooms that have failed end their requests by themselves
        while self._held.draining.held and time.monotonic() < until:
            await asyncio.sleep(_POLL_SECONDS)
        self._held.abandon()
        until = time.monotonic() + _GRACE_SECONDS / 2
        while self._held.draining.held and time.monotonic() < until:
            await asyncio.sleep(_POLL_SECONDS)
