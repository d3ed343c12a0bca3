"""Owns the queues of messages and of work that other threads leave for a control thread, on either side."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from sglang_mm_conn.control.limits import guarded, milliseconds_until
from sglang_mm_conn.control.rate_limited_log import RateLimitedLog
from sglang_mm_conn.control.traffic import Traffic
from sglang_mm_conn.control.wakeup import Wakeup


def _ignore(peer: str) -> None:
    """Do nothing: the default for endpoints that need no events of connections."""


@dataclass(frozen=True)
class ControlCallbacks:
    """The callbacks of an endpoint, all called on its control thread: for each frame, when a connection is made or lost
    (with the name of the peer), and every ``tick_seconds``.

    A ControlServer reports no connections: a peer is known from its first frame on.
    """

    on_frame: Callable[[str, bytes], None]
    on_tick: Callable[[], None]
    tick_seconds: float
    on_connected: Callable[[str], None] = _ignore
    on_disconnected: Callable[[str], None] = _ignore


class ControlThread:
    """``send``, ``call`` and ``stop`` may be called from any thread, everything else only from the thread of
    ``run``."""

    def __init__(
        self, send: Callable[[str, bytes], None], callbacks: ControlCallbacks, rate_limited_log: RateLimitedLog
    ) -> None:
        """``send``: see Traffic."""
        self._traffic = Traffic(send, callbacks.on_frame, rate_limited_log)
        self._callbacks = callbacks
        self._work: deque[Callable[[], None]] = deque()
        self._wakeup = Wakeup()
        self._stopping = False
        self._thread = 0  # ident of the thread of ``run``

    def send(self, peer: str, frame: bytes) -> None:
        """Queue ``frame`` for ``peer``. Frames of one caller arrive in order. If the peer is gone, the frame is
        dropped."""
        self._traffic.put(peer, frame)
        self._notify()

    def call(self, work: Callable[[], None]) -> None:
        """Run ``work`` on the thread of ``run``."""
        self._work.append(work)
        self._notify()

    def stop(self) -> None:
        """Make ``run`` return."""
        self._stopping = True
        self._wakeup.notify()

    def _notify(self) -> None:
        if threading.get_ident() != self._thread:  # which checks for work after every callback
            self._wakeup.notify()

    def _wait_ms(self, next_tick: float) -> int:
        """How long a poll may wait: 0 if finalizers queued work on this thread without a wake-up."""
        return 0 if self._work else milliseconds_until(next_tick)

    def _run_work(self) -> None:
        while self._work:
            guarded(self._work.popleft())
            self._traffic.flush()  # do not delay the answers: the next work may take long
        self._traffic.flush()
