"""Owns the encoder's endpoint: announces rooms, passes embeddings to the transfer, handles messages and silent peers.

It composes the parts of an encoder: ``ActionRunner`` carries out what the core asks for, ``Registrar`` attaches the
memory of language ranks, ``Transfer`` writes windows. They return values and never call this module.

Threads: ``embedding_thread`` is the control thread: it owns the control socket and handles frames and ticks. Several
``transfer_worker`` threads per transfer queue make data calls. One registrar thread attaches memory. Senders may call
from any thread.

Locking: the parts share one lock. It guards the core, the sources, the listeners and the waiting registrations. It is
never held during a data call, an attachment or a socket operation. The registrar adds peers to ``_peers`` under the
lock. The control thread reads and drops peers without it, each in a single dict operation.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from sglang_mm_conn.connector.encoder.actions import ActionRunner
from sglang_mm_conn.connector.encoder.links import Links
from sglang_mm_conn.connector.encoder.registration import ControlPeer, Registrar
from sglang_mm_conn.connector.encoder.source import Source
from sglang_mm_conn.connector.encoder.transfer import Transfer
from sglang_mm_conn.connector.runtime import Runtime
from sglang_mm_conn.control.authentication import DeploymentKey
from sglang_mm_conn.control.bootstrap import BootstrapInfo, Worker
from sglang_mm_conn.control.rate_limited_log import RateLimitedLog
from sglang_mm_conn.control.thread import ControlCallbacks
from sglang_mm_conn.core.actions import Action, Ended, TransferEmbeddingChunk
from sglang_mm_conn.core.encoder.compatibility import mismatch
from sglang_mm_conn.core.encoder.sender import SenderCore
from sglang_mm_conn.core.errors import ConnError, ProtocolError
from sglang_mm_conn.core.messages import (
    PROTOCOL_VERSION,
    Heartbeat,
    RefusalKind,
    Refused,
    Register,
    Resume,
    Retire,
    decode_from_language,
)
from sglang_mm_conn.core.rooms import new_id
from sglang_mm_conn.core.settings import Settings
from sglang_mm_conn.core.states import Poll
from sglang_mm_conn.datapath.base import DataPath

logger = logging.getLogger(__name__)

_TICK_SECONDS = 0.25


@dataclass(frozen=True)
class ServerStatus:
    """What heartbeats say about the encoder's server; see the message Heartbeat."""

    load: int
    draining: bool


class EncoderEndpoint:
    """One per encoder process that holds embeddings (rank 0 of each worker).

    Attributes:
        server_status: what the heartbeats say. Called by the control thread. None: the load is the number of rooms
            that are not over, and the server does not drain.
    """

    server_status: Callable[[], ServerStatus] | None = None

    def __init__(
        self,
        settings: Settings,
        *,
        host: str,
        dtype: str,
        widest_row_bytes: int,
        send_timeout: float,
        data_paths: Mapping[str, DataPath],
        runtime: Runtime | None = None,
    ) -> None:
        """``host``: address to bind the control socket to. ``send_timeout``: longest life of a room, in seconds."""
        runtime = runtime or Runtime()
        self.settings = settings
        self.incarnation = new_id()
        self._clock = runtime.clock
        self._device = runtime.device
        self._rate_limited_log = RateLimitedLog(logger)
        self._next_heartbeat = 0.0
        self._lock = threading.Lock()
        self.core = SenderCore(queues=settings.queues, send_timeout=send_timeout, claim_timeout=settings.claim_timeout)
        self._links = Links(data_paths)
        self._peers: dict[str, ControlPeer] = {}
        self._sources: dict[str, Source] = {}
        executor = runtime.executor(1, "mm-conn-registrar")
        self.key = None if settings.key_file is None else DeploymentKey.load(settings.key_file)
        self._control = runtime.control_server(
            host, ControlCallbacks(self._on_frame, self._on_tick, min(_TICK_SECONDS, settings.heartbeat / 2)),
            key=self.key, max_frame_bytes=settings.max_frame_bytes,
        )  # fmt: skip
        self._actions = ActionRunner(self._lock, self._control, self._sources, queues=settings.queues)
        self.transfer_queues = self._actions.transfer_queues
        self._registrar = Registrar(
            self._lock, self.core, self._actions, self._links, self._peers, settings,
            incarnation=self.incarnation, clock=self._clock, executor=executor, rate_limited_log=self._rate_limited_log,
            mismatch=partial(mismatch, settings=settings, dtype=dtype, widest_row_bytes=widest_row_bytes),
        )  # fmt: skip
        self.transfer = Transfer(
            self._lock, self.core, self._actions, self._links, self._sources, self._control, runtime
        )
        self._threads = self._start_threads(runtime)  # last, because the threads use everything above
        logger.info(
            "conn_multimodal encoder %s: control port %d on %s, %d transfer queues with %d workers each, data path %s",
            self.incarnation, self._control.port, host, settings.queues, settings.workers_per_queue, settings.data_path,
        )  # fmt: skip

    @property
    def bootstrap_info(self) -> tuple[BootstrapInfo, DeploymentKey | None]:
        """The answer of the bootstrap route, and the key that a client must prove to get it."""
        return BootstrapInfo(PROTOCOL_VERSION, [Worker(self.incarnation, self._control.port)]), self.key

    # -- what a sender calls -------------------------------------------------------------------------------------

    def announce(
        self, room: str, total_tokens: int, row_bytes: int, dtype: str, listener: Callable[[Ended], None]
    ) -> None:
        """Announce the size of ``room``. ``listener`` is called once when the room ends: by a thread of this endpoint,
        or before this returns if the room has failed already."""
        with self._lock:
            ended = self._actions.perform(self.core.announce(room, total_tokens, row_bytes, dtype, self._clock()))
            self._actions.listen(room, listener)
        self._actions.notify(ended)

    def add_transfer_request(self, room: str, embedding: torch.Tensor, metadata: bytes) -> None:
        """Hand over the embedding of ``room``: [tokens, width], contiguous.

        Its bytes must never change, not even after the room has ended: a write may still be under way. The encoder
        keeps the embedding until no write reads it any more. A GPU may still be computing it on the calling thread's
        current stream; no write reads it before that has finished.

        Its windows are written once every language rank has sent Init; ``Transfer`` chooses the thread. Raises
        ConnError if its size differs from the announced one.
        """
        source = Source.of(embedding, self._device)
        row_bytes = embedding.shape[1] * embedding.element_size()
        checksum = source.checksum(self._device) if self.settings.checksum else None
        blocks = -(-embedding.shape[0] // self.settings.block_size)
        with self._lock:
            entry = self.core.rooms.get(room)
            if entry is None:
                return  # ended; its listener was called
            if (entry.total_tokens, entry.row_bytes) != (embedding.shape[0], row_bytes):
                raise ConnError(
                    f"room {room}: the embedding has {embedding.shape[0]} rows of {row_bytes} bytes, but "
                    f"{entry.total_tokens} rows of {entry.row_bytes} were announced"
                )
            actions = self.core.add_source(room, range(blocks), metadata, checksum, self._clock())
            if not entry.machine.final:
                self._sources[room] = source  # before the chunk is queued; a source is never replaced
            ended, inline = self.transfer.perform(actions, on_control_thread=False)
        self._actions.notify(ended)
        self.transfer.write_inline(inline)

    def fail(self, room: str, reason: str, code: int) -> None:
        """Fail ``room``, for which no embedding will come, and notify its language ranks."""
        self.transfer.fail(room, reason, code)

    def fail_all(self, reason: str, code: int) -> None:
        """Fail every room that is not over."""
        with self._lock:
            rooms = list(self.core.rooms)
        for room in rooms:
            self.transfer.fail(room, reason, code)

    def send_heartbeats(self) -> None:
        """Send every peer a heartbeat now, since what it says has changed. Any thread may call this."""
        self._control.call(self._send_heartbeats)

    def poll(self, room: str) -> Poll | None:
        """The state of ``room``; None if the encoder has no record of it, or none any more."""
        with self._lock:
            entry = self.core.rooms.get(room)
            return None if entry is None else entry.poll()

    def has_offer(self, room: str) -> bool:
        """Whether a language rank has offered blocks for ``room``. Also True once the room has ended."""
        with self._lock:
            entry = self.core.rooms.get(room)
            return entry is None or bool(entry.transfer_infos)

    # -- threads -------------------------------------------------------------------------------------------------

    def _start_threads(self, runtime: Runtime) -> list[threading.Thread]:
        threads = [runtime.start_thread(self.embedding_thread, "mm-conn-embedding")]
        for index in range(self.settings.queues):
            for number in range(self.settings.workers_per_queue):
                worker = partial(self.transfer_worker, index)
                threads.append(runtime.start_thread(worker, f"mm-conn-transfer-{index}.{number}"))
        return threads

    def embedding_thread(self) -> None:
        """Run the control thread, which owns the control socket, until ``close``."""
        self._control.run()

    def transfer_worker(self, index: int) -> None:
        """Serve transfer queue ``index`` until ``close``."""
        self.transfer.work(index)

    # -- callbacks of the control thread -------------------------------------------------------------------------

    def _on_frame(self, peer: str, frame: bytes) -> None:
        now = self._clock()
        try:
            message = decode_from_language(frame, self.settings.max_frame_bytes)
            if isinstance(message, Register):
                self._registrar.register_soon(peer, message)
                return
            known = self._peers.get(peer)
            if known is None:
                reason = "this encoder does not know the session"
                self._actions.send(peer, Refused(reason=reason, kind=RefusalKind.REGISTER_FIRST))
                return
            known.last_seen = now
            if isinstance(message, Heartbeat):
                return
            if isinstance(message, Retire):
                self._retire(known, message)
                return
            with self._lock:
                actions = self.core.on_message(peer, message, now)
                ended, inline = self.transfer.perform(actions, on_control_thread=True)
        except ProtocolError as error:
            self._rate_limited_log.log(peer, logging.WARNING, "Control message from %s refused: %s", peer, error)
            return
        if isinstance(message, Resume):
            _log_resume(actions)
        self._actions.notify(ended)
        self.transfer.write_inline(inline)

    def _on_tick(self) -> None:
        now = self._clock()
        with self._lock:
            ended = self._actions.perform(self.core.tick(now))
        self._actions.notify(ended)
        for peer, known in list(self._peers.items()):
            if now - known.last_seen > self.settings.peer_timeout:
                self._drop_peer(peer, f"the language server was silent for {self.settings.peer_timeout:g} s")
        if now >= self._next_heartbeat:
            self._next_heartbeat = now + self.settings.heartbeat
            self._send_heartbeats()

    def _send_heartbeats(self) -> None:
        says = self.server_status
        status = ServerStatus(len(self.core.rooms), False) if says is None else says()
        heartbeat = Heartbeat(incarnation=self.incarnation, load=status.load, draining=status.draining)
        for peer in {*self._peers, *self._registrar.registering}:
            self._actions.send(peer, heartbeat)

    def _retire(self, known: ControlPeer, message: Retire) -> None:
        if known.session != message.mooncake_session_id:
            raise ProtocolError(f"session {message.mooncake_session_id} is not registered by this peer")
        with self._lock:
            self.core.retire(message.mooncake_session_id, message.epoch)
        self._links.close(message.mooncake_session_id, up_to=message.epoch)

    def _drop_peer(self, peer: str, reason: str) -> None:
        known = self._peers.pop(peer, None)
        if known is None:
            return
        with self._lock:
            session = self.core.sessions.get(known.session)
            if session is None or session.peer != peer:
                return  # the session uses a newer connection
            ended = self._actions.perform(self.core.session_lost(known.session, reason, self._clock()))
            self._links.close(known.session)
        logger.warning("Language rank %s lost: %s", known.session, reason)
        self._actions.notify(ended)

    def close(self) -> None:
        """Stop all threads. For tests and an orderly shutdown."""
        self._control.stop()
        for transfer_queue in self.transfer_queues:
            for _ in range(self.settings.workers_per_queue):
                transfer_queue.put(None)
        for thread in self._threads:
            thread.join(10)
        self._registrar.close()
        self._links.close_all()


def _log_resume(actions: list[Action]) -> None:
    """Log each chunk that an accepted Resume has queued."""
    for action in actions:
        if isinstance(action, TransferEmbeddingChunk):
            logger.info(
                "Resume transfer triggered: room=%s, queue_idx=%d, src_blocks=%d",
                action.room, action.queue_idx, len(action.embedding_indices),
            )  # fmt: skip
