"""The encoder's action runner: owns the transfer queues and the listeners, and carries out what the core asks for.

It is below every other part of the encoder and calls none of them: it returns what is left to do.

Locking: the endpoint's one lock guards the core and the tables of sources and listeners. ``perform`` and ``listen`` run
under it. ``notify`` takes it only to look a listener up, since a listener may call the endpoint. The transfer queues
need no lock.
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

TransferQueue = queue.SimpleQueue[TransferEmbeddingChunk | None]  # None: a worker ends
Listener = Callable[[Ended], None]


class ActionRunner:
    """Sends messages, queues chunks, releases sources, tells listeners that their room has ended."""

    def __init__(
        self, lock: threading.Lock, control: ControlServer, sources: dict[str, Source], *, queues: int
    ) -> None:
        """``sources``: by room; those that the core releases are dropped from it."""
        self.transfer_queues: list[TransferQueue] = [queue.SimpleQueue() for _ in range(queues)]
        self.listeners: dict[str, Listener] = {}
        self._lock = lock
        self._control = control
        self._sources = sources

    def send(self, peer: str, message: Message) -> None:
        """Leave ``message`` to the control thread, which owns the socket. Any thread, with the lock or without."""
        self._control.send(peer, encode(message))

    def queue_chunk(self, chunk: TransferEmbeddingChunk) -> None:
        """A worker of the chunk's queue serves it."""
        self.transfer_queues[chunk.queue_idx].put(chunk)

    def perform(self, actions: list[Action]) -> list[Ended]:
        """Under the lock, so that messages leave in the order of the decisions. Returns the rooms that have ended, for
        ``notify`` when the lock is released."""
        ended, chunks = self.perform_without_queueing(actions)
        for chunk in chunks:
            self.queue_chunk(chunk)
        return ended

    def perform_without_queueing(self, actions: list[Action]) -> tuple[list[Ended], list[TransferEmbeddingChunk]]:
        """As ``perform``, but it returns the chunks too. The caller must queue or serve each: a room whose chunk is
        dropped hangs."""
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
        """Under the lock. ``listener`` hears the end of ``room``, once. A room keeps its first listener."""
        self.listeners.setdefault(room, listener)

    def notify(self, ended: list[Ended]) -> None:
        """Without the lock: tell the listeners of ``ended``."""
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
