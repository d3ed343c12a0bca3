"""Owns the encoder's transfer queues and listeners, and carries out the actions that the core returns.

The other parts of the encoder call this one; it calls none of them, and returns what remains to be done.

Locking: the endpoint has one lock, which guards the core and the tables of sources and listeners. ``perform`` and
``listen`` run under it. ``notify`` takes it only to look a listener up, since a listener may call the endpoint. The
transfer queues need no lock.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

from sglang_mm_conn.connector.encoder.source import Source
from sglang_mm_conn.control.server import ControlServer
from sglang_mm_conn.core.actions import Action, CopyOut, Ended, Release, Send, TransferEmbeddingChunk
from sglang_mm_conn.core.errors import ConnError
from sglang_mm_conn.core.messages import Message, encode

logger = logging.getLogger(__name__)

TransferQueue = queue.SimpleQueue[TransferEmbeddingChunk | None]  # None ends one worker
Listener = Callable[[Ended], None]


class ActionRunner:
    """Sends messages, queues chunks, releases sources, notifies the listeners of rooms that have ended."""

    def __init__(
        self, lock: threading.Lock, control: ControlServer, sources: dict[str, Source], *, queues: int
    ) -> None:
        """``sources``: by room. Sources that the core releases are removed from it."""
        self.transfer_queues: list[TransferQueue] = [queue.SimpleQueue() for _ in range(queues)]
        self.listeners: dict[str, Listener] = {}
        self._lock = lock
        self._control = control
        self._sources = sources

    def send(self, peer: str, message: Message) -> None:
        """Queue ``message`` for the control thread, which owns the socket. Any thread may call this, with or without
        the lock."""
        self._control.send(peer, encode(message))

    def queue_chunk(self, chunk: TransferEmbeddingChunk) -> None:
        """Leave ``chunk`` to a worker of its transfer queue."""
        self.transfer_queues[chunk.queue_idx].put(chunk)

    def perform(self, actions: list[Action]) -> list[Ended]:
        """Carry ``actions`` out. Call this under the lock, so that messages are sent in the order of the core's
        decisions. Returns the rooms that have ended: pass them to ``notify`` once the lock is released."""
        ended, chunks = self.perform_without_queueing(actions)
        for chunk in chunks:
            self.queue_chunk(chunk)
        return ended

    def perform_without_queueing(self, actions: list[Action]) -> tuple[list[Ended], list[TransferEmbeddingChunk]]:
        """Like ``perform``, but return the chunks instead of queueing them. The caller must queue or serve each one: if
        a chunk is dropped, its room hangs."""
        ended: list[Ended] = []
        chunks: list[TransferEmbeddingChunk] = []
        for action in actions:
            if isinstance(action, Send):
                self.send(action.peer, action.message)
            elif isinstance(action, TransferEmbeddingChunk):
                chunks.append(action)
            elif isinstance(action, Release):
                self._sources.pop(action.room, None)
            elif isinstance(action, Ended):
                ended.append(action)
            elif isinstance(action, CopyOut):
                raise ConnError("unexpected action CopyOut in an encoder")
        return ended, chunks

    def listen(self, room: str, listener: Listener) -> None:
        """Under the lock. Call ``listener`` once when ``room`` ends. A room keeps its first listener."""
        self.listeners.setdefault(room, listener)

    def notify(self, ended: list[Ended]) -> None:
        """Without the lock: call the listeners of the rooms in ``ended``."""
        for action in ended:
            if not action.success:
                logger.warning(
                    "Embedding not sent: room=%s peer=%s code=%d reason=%s",
                    action.room, action.peer or "none", action.code, action.reason,
                )  # fmt: skip
            with self._lock:
                listener = self.listeners.pop(action.room, None)
            if listener is not None:
                try:
                    listener(action)
                except Exception:
                    logger.exception("Listener of room %s failed", action.room)
