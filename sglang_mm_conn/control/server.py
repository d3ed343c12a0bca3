"""Owns the encoder's control socket: one ROUTER that every language rank connects to."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import zmq
from zmq.utils.monitor import recv_monitor_message

from sglang_mm_conn.control.addresses import UNKNOWN_ADDRESS, peer_address
from sglang_mm_conn.control.authentication import DeploymentKey, RefusalLog, ZapHandler
from sglang_mm_conn.control.limits import HIGH_WATER_MARK, READ_AHEAD, guarded
from sglang_mm_conn.control.rate_limited_log import RateLimitedLog
from sglang_mm_conn.control.thread import ControlCallbacks, ControlThread
from sglang_mm_conn.control.traffic import Received

logger = logging.getLogger(__name__)

_HANDSHAKE_FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)


class ControlServer(ControlThread):
    """Owns the ROUTER. Only the thread of ``run`` uses it."""

    def __init__(
        self, host: str, callbacks: ControlCallbacks, *, key: DeploymentKey | None, max_frame_bytes: int
    ) -> None:
        """Bind ``host`` on a port that the kernel chooses (``port``). A peer's name is its routing id in hex.

        With ``key``, only peers with the same key can connect.
        """
        self._context: zmq.Context[Any] = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._zap: ZapHandler | None = None
        self._refusals = RefusalLog()
        if key is not None:
            self._zap = ZapHandler(self._context, key, self._refusals)
            key.secure_server(self._socket)
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.SNDHWM, HIGH_WATER_MARK),
            (zmq.RCVHWM, READ_AHEAD),
            (zmq.MAXMSGSIZE, max_frame_bytes),
            (zmq.ROUTER_MANDATORY, 1),
            (zmq.IPV6, 1 if ":" in host else 0),
        ):
            self._socket.setsockopt(option, value)
        self._monitor = self._socket.get_monitor_socket(
            zmq.EVENT_ACCEPTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | _HANDSHAKE_FAILED
        )
        self._shaking_hands: deque[str] = deque(maxlen=1024)  # addresses of new connections, oldest first
        bound = f"[{host}]" if ":" in host else host
        self._socket.bind(f"tcp://{bound}:*")
        self.port = int(str(self._socket.get_string(zmq.LAST_ENDPOINT)).rpartition(":")[2])
        super().__init__(self._send, callbacks, RateLimitedLog(logger))

    def run(self) -> None:
        """Serve until ``stop``. If handling a frame or a tick raises, the error is logged and the others are still
        handled."""
        self._thread = threading.get_ident()
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._wakeup.fileno(), zmq.POLLIN)
        poller.register(self._monitor, zmq.POLLIN)
        if self._zap is not None:
            poller.register(self._zap.socket, zmq.POLLIN)
        next_tick = time.monotonic() + self._callbacks.tick_seconds
        while not self._stopping:
            ready = {item for item, _ in poller.poll(self._wait_ms(next_tick))}
            if self._wakeup.fileno() in ready:
                self._wakeup.clear()
            if self._zap is not None and self._zap.socket in ready:
                guarded(self._zap.serve)
            if self._monitor in ready:
                guarded(self._watch)
            if self._socket in ready:
                guarded(lambda: self._traffic.process_batch(self._receive()))
            if time.monotonic() >= next_tick:
                next_tick = time.monotonic() + self._callbacks.tick_seconds
                guarded(self._callbacks.on_tick)
            self._run_work()
        self._run_work()
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close()
        if self._zap is not None:
            self._zap.close()
        self._context.term()
        self._wakeup.close()

    def _receive(self) -> Iterator[Received]:
        while True:
            try:
                name, *parts = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            yield name.hex(), parts, len(name) + sum(map(len, parts))

    def _send(self, peer: str, batch: bytes) -> None:
        self._socket.send_multipart([bytes.fromhex(peer), batch], zmq.NOBLOCK)

    def _watch(self) -> None:
        """Log handshakes that failed before a key was checked: the peer has no key, or does not use ZeroMQ."""
        while True:
            try:
                event = recv_monitor_message(self._monitor, zmq.NOBLOCK)
            except zmq.ZMQError:
                return
            if event["event"] == zmq.EVENT_ACCEPTED:
                self._shaking_hands.append(peer_address(event["value"]))  # libzmq reports only the descriptor
                continue
            address = self._shaking_hands.popleft() if self._shaking_hands else UNKNOWN_ADDRESS
            if event["event"] & _HANDSHAKE_FAILED:
                self._refusals.refused(address, "it has another key or none, or uses another protocol")
