"""Owns the language rank's control sockets: one DEALER per encoder process, all used by one thread."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import zmq
from zmq.utils.monitor import recv_monitor_message

from sglang_mm_conn.control.authentication import DeploymentKey
from sglang_mm_conn.control.limits import HIGH_WATER_MARK, READ_AHEAD, guarded
from sglang_mm_conn.control.rate_limited_log import RateLimitedLog
from sglang_mm_conn.control.thread import ControlCallbacks, ControlThread
from sglang_mm_conn.control.traffic import Received

logger = logging.getLogger(__name__)


class _Link:
    def __init__(
        self, context: zmq.Context[Any], address: str, key: DeploymentKey | None, max_frame_bytes: int
    ) -> None:
        self.address = address
        self.socket = context.socket(zmq.DEALER)
        if key is not None:
            key.secure_client(self.socket)
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.SNDHWM, HIGH_WATER_MARK),
            (zmq.RCVHWM, READ_AHEAD),
            (zmq.MAXMSGSIZE, max_frame_bytes),
            # Queue nothing for a connection that is down. After a reconnect both sides resynchronize, and a message
            # from before must not arrive after that.
            (zmq.IMMEDIATE, 1),
            (zmq.RECONNECT_IVL, 50),
            (zmq.RECONNECT_IVL_MAX, 1000),
            (zmq.IPV6, 1 if "[" in address else 0),
        ):
            self.socket.setsockopt(option, value)
        self.monitor = self.socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        self.socket.connect(address)

    def close(self) -> None:
        self.socket.disable_monitor()
        self.monitor.close(0)
        self.socket.close(0)


class ControlClient(ControlThread):
    """Owns the DEALERs. Only the thread of ``run`` uses them. The public methods may be called from any thread.

    ``key`` names a connection. The callbacks run on the thread of ``run``.
    """

    def __init__(self, callbacks: ControlCallbacks, *, key: DeploymentKey | None, max_frame_bytes: int) -> None:
        self._rate_limited_log = RateLimitedLog(logger)
        super().__init__(self._send, callbacks, self._rate_limited_log)
        self._context: zmq.Context[Any] = zmq.Context()
        self._key = key
        self._max_frame_bytes = max_frame_bytes
        self._links: dict[str, _Link] = {}

    def connect(self, key: str, address: str) -> None:
        """Open connection ``key`` to ``address`` (``tcp://host:port``). It reconnects until ``disconnect``."""
        self.call(lambda: self._connect(key, address))

    def disconnect(self, key: str) -> None:
        self.call(lambda: self._disconnect(key))

    def run(self) -> None:
        """Serve until ``stop``. If handling one event raises, the error is logged and the others are still handled."""
        self._thread = threading.get_ident()
        next_tick = time.monotonic() + self._callbacks.tick_seconds
        while not self._stopping:
            poller = zmq.Poller()
            poller.register(self._wakeup.fileno(), zmq.POLLIN)
            links = list(self._links.values())
            for link in links:
                poller.register(link.socket, zmq.POLLIN)
                poller.register(link.monitor, zmq.POLLIN)
            while not self._stopping and links == list(self._links.values()):
                ready = {item for item, _ in poller.poll(self._wait_ms(next_tick))}
                if self._wakeup.fileno() in ready:
                    self._wakeup.clear()
                    self._run_work()
                for key, link in list(self._links.items()):
                    if link.socket in ready:
                        received = self._receive(key, link)
                        guarded(partial(self._traffic.process_batch, received))
                    if link.monitor in ready:
                        self._watch(key, link)
                if time.monotonic() >= next_tick:
                    next_tick = time.monotonic() + self._callbacks.tick_seconds
                    guarded(self._callbacks.on_tick)
                self._run_work()
        self._run_work()
        for link in self._links.values():
            link.close()
        self._context.term()
        self._wakeup.close()

    def _connect(self, key: str, address: str) -> None:
        self._disconnect(key)
        self._links[key] = _Link(self._context, address, self._key, self._max_frame_bytes)

    def _disconnect(self, key: str) -> None:
        link = self._links.pop(key, None)
        if link is not None:
            link.close()

    def _send(self, key: str, batch: bytes) -> None:
        link = self._links.get(key)
        if link is not None:
            link.socket.send(batch, zmq.NOBLOCK)

    def _receive(self, key: str, link: _Link) -> Iterator[Received]:
        while True:
            try:
                batch = link.socket.recv(zmq.NOBLOCK)
                more = link.socket.getsockopt(zmq.RCVMORE)
            except zmq.ZMQError:
                return
            if more:
                # No encoder sends a multipart message. Hazard: the other parts must not be read. If the connection
                # breaks between two parts, libzmq aborts the process (DEALER with IMMEDIATE; "Assertion failed:
                # !_more").
                self._rate_limited_log.log(key, logging.WARNING, "Control message of several parts: reconnecting")
                self.connect(key, link.address)  # runs after this batch; a failure there is only logged
                return
            yield key, [batch], len(batch)

    def _watch(self, key: str, link: _Link) -> None:
        while True:
            try:
                event = recv_monitor_message(link.monitor, zmq.NOBLOCK)
            except zmq.ZMQError:
                return
            if event["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                guarded(lambda: self._callbacks.on_connected(key))
            elif event["event"] == zmq.EVENT_DISCONNECTED:
                guarded(lambda: self._callbacks.on_disconnected(key))
