"""The encoder's end: announces rooms, writes windows, answers language ranks.

Threads: ``embedding_thread`` owns the control socket; ``transfer_worker`` threads, a few per transfer queue, make the
data calls, but for copies in memory that are short (``_should_write_inline``); one registrar attaches memory. All state
is in the core and a few tables, under one lock that is never held during a data call, an attachment, or a socket
operation.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch

from sglang_mm_conn.connector.encoder.links import LinkBusy, LinkLease, Links
from sglang_mm_conn.connector.runtime import Runtime
from sglang_mm_conn.control.authentication import DeploymentKey
from sglang_mm_conn.control.bootstrap import BootstrapInfo, Worker
from sglang_mm_conn.control.rate_limited_log import RateLimitedLog
from sglang_mm_conn.control.thread import ControlCallbacks
from sglang_mm_conn.core.actions import Action, CopyOut, Ended, Release, Send, TransferEmbeddingChunk
from sglang_mm_conn.core.errors import (
    ConnError,
    DataPathError,
    DataPathUnavailable,
    ProtocolError,
    WriterSlotTaken,
)
from sglang_mm_conn.core.layout import Extent, Geometry, window_extents
from sglang_mm_conn.core.messages import (
    PROTOCOL_VERSION,
    Heartbeat,
    Message,
    Refused,
    Register,
    Registered,
    Resume,
    Retire,
    as_text,
    decode_from_language,
    encode,
)
from sglang_mm_conn.core.rooms import new_id
from sglang_mm_conn.core.sender import RegisteredSession, SenderCore, SenderRoom, WindowWrite
from sglang_mm_conn.core.settings import Settings
from sglang_mm_conn.core.sharding import session_port
from sglang_mm_conn.core.states import Poll
from sglang_mm_conn.datapath.base import DataPath, WriteLink
from sglang_mm_conn.memory.device import Event

logger = logging.getLogger(__name__)

_TICK_SECONDS = 0.25
# Peers whose registration may wait for the registrar; of each only the newest counts.
_WAITING_REGISTRATIONS = 1024
# A session whose process was heard within so many heartbeats is not given to another process.
_ALIVE_HEARTBEATS = 3


@dataclass(frozen=True, slots=True)
class Source:
    """An embedding that was handed over. It may be read once ``ready`` has happened: a GPU may still compute it."""

    rows: torch.Tensor  # uint8, one dimension
    ready: Event


@dataclass(slots=True)
class DataCall:
    """One window on its way: what is written, from where, and through which link."""

    write: WindowWrite
    entry: SenderRoom
    source: Source  # kept until the write has returned, and the copies that it waits for have happened
    lease: LinkLease | None  # of the link, which stays open until the call has returned
    refusal: str = ""  # why there is no link

    @property
    def link(self) -> WriteLink | None:
        return None if self.lease is None else self.lease.link

    def extents(self) -> list[Extent]:
        """Where the bytes of the window go."""
        write, row_bytes = self.write, self.entry.row_bytes
        first, nbytes = write.first_token * row_bytes, write.tokens * row_bytes
        return window_extents(write.session.geometry, write.blocks, nbytes, first)


@dataclass
class _ControlPeer:
    last_seen: float
    session: str = ""


class EncoderEndpoint:
    """One per encoder process that holds embeddings (rank 0 of each worker)."""

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
        self.dtype = dtype
        self.widest_row_bytes = widest_row_bytes
        self._clock = runtime.clock
        self._device = runtime.device
        self._inline_limit_bytes = runtime.inline_limit_bytes
        self._uncontended_inline_limit_bytes = runtime.uncontended_inline_limit_bytes
        self._lock = threading.Lock()
        self.core = SenderCore(queues=settings.queues, send_timeout=send_timeout, claim_timeout=settings.claim_timeout)
        self._links = Links(data_paths)
        self._peers: dict[str, _ControlPeer] = {}
        self._sources: dict[str, Source] = {}
        self._listeners: dict[str, Callable[[Ended], None]] = {}
        self._registering: set[str] = set()  # attaching may take long: they hear heartbeats meanwhile
        self._to_register: dict[str, Register] = {}  # the newest of each peer that waits for the registrar
        self._rate_limited_log = RateLimitedLog(logger)
        self._next_heartbeat = 0.0
        self.transfer_queues: list[queue.SimpleQueue[TransferEmbeddingChunk | None]] = [
            queue.SimpleQueue() for _ in range(settings.queues)
        ]
        self._registrar = runtime.executor(1, "mm-conn-registrar")
        self.key = None if settings.key_file is None else DeploymentKey.load(settings.key_file)
        self._control = runtime.control_server(
            host,
            ControlCallbacks(self._on_frame, self._on_tick, min(_TICK_SECONDS, settings.heartbeat / 2)),
            key=self.key,
            max_frame_bytes=settings.max_frame_bytes,
        )
        # Threads start last: they use everything above.
        self._threads = [runtime.start_thread(self.embedding_thread, "mm-conn-embedding")]
        for index in range(settings.queues):
            for number in range(settings.workers_per_queue):
                worker = partial(self.transfer_worker, index)
                self._threads.append(runtime.start_thread(worker, f"mm-conn-transfer-{index}.{number}"))
        logger.info(
            "conn_multimodal encoder %s: control port %d on %s, %d transfer queues with %d workers each, data path %s",
            self.incarnation, self._control.port, host, settings.queues, settings.workers_per_queue, settings.data_path,
        )  # fmt: skip

    @property
    def bootstrap_info(self) -> tuple[BootstrapInfo, DeploymentKey | None]:
        """What the bootstrap route answers, and to whom."""
        return BootstrapInfo(PROTOCOL_VERSION, [Worker(self.incarnation, self._control.port)]), self.key

    # -- what a sender asks for ----------------------------------------------------------------------------------

    def announce(
        self, room: str, total_tokens: int, row_bytes: int, dtype: str, listener: Callable[[Ended], None]
    ) -> None:
        """The size of ``room`` is known. ``listener`` hears its end, once, on a thread of this endpoint or at once."""
        with self._lock:
            ended = self._perform(self.core.announce(room, total_tokens, row_bytes, dtype, self._clock()))
            self._listeners.setdefault(room, listener)
        self._notify_listeners(ended)

    def add_transfer_request(self, room: str, embedding: torch.Tensor, metadata: bytes) -> None:
        """The embedding of ``room`` is there: [tokens, width], contiguous. It must never change: a write may be under
        way when the room ends. This side keeps it until no write reads it any more. On a GPU it may still be being
        computed, on the stream that is current in the calling thread: no write reads it before that.

        Raises ConnError where its size is not what was announced. Queues a TransferEmbeddingChunk once every
        language rank has said Init.
        """
        # Each operation lets go of the GIL, and may wait for it.
        values = embedding.detach() if embedding.requires_grad else embedding
        rows = values.reshape(-1).view(torch.uint8)
        source = Source(rows, self._device.mark(rows))
        row_bytes = embedding.shape[1] * embedding.element_size()
        checksum = self._checksum(source) if self.settings.checksum else None
        blocks = -(-embedding.shape[0] // self.settings.block_size)
        inline: list[TransferEmbeddingChunk] = []
        with self._lock:
            entry = self.core.rooms.get(room)
            if entry is None:
                return  # ended; its listener was told
            if (entry.total_tokens, entry.row_bytes) != (embedding.shape[0], row_bytes):
                raise ConnError(
                    f"room {room}: {embedding.shape[0]} rows of {row_bytes} bytes, but "
                    f"{entry.total_tokens} of {entry.row_bytes} were announced"
                )
            actions = self.core.add_source(room, range(blocks), metadata, checksum, self._clock())
            if not entry.machine.final:
                self._sources[room] = source  # before the chunk is queued, and never in place of another
            ended = self._perform(actions, inline)
        self._notify_listeners(ended)
        for chunk in inline:
            if rows.numel() <= self._inline_limit_bytes:
                self._serve(chunk)
            else:  # the caller has other things to do: it writes no window of a large embedding
                self._control.call(partial(self._serve, chunk))

    def _checksum(self, source: Source) -> int:
        """This waits for a GPU: a checksum is for tests, and for finding faults."""
        source.ready.synchronize()
        return self._device.checksum(source.rows)

    def fail(self, room: str, reason: str, code: int) -> None:
        """The encode of ``room`` failed; its language ranks are told."""
        with self._lock:
            ended = self._perform(self.core.fail(room, reason, code, self._clock()))
        self._notify_listeners(ended)

    def poll(self, room: str) -> Poll | None:
        """None where the room is not (any more) in the tables."""
        with self._lock:
            entry = self.core.rooms.get(room)
            return None if entry is None else entry.poll()

    # -- embedding thread ----------------------------------------------------------------------------------------

    def embedding_thread(self) -> None:
        """Owns the control socket until ``close``."""
        self._control.run()

    def _on_frame(self, peer: str, frame: bytes) -> None:
        now = self._clock()
        inline: list[TransferEmbeddingChunk] = []
        try:
            message = decode_from_language(frame, self.settings.max_frame_bytes)
            if isinstance(message, Register):
                self._register_soon(peer, message)
                return
            known = self._peers.get(peer)
            if known is None:
                self._send(peer, Refused(reason="this encoder does not know the session", kind="register_first"))
                return
            known.last_seen = now
            if isinstance(message, Heartbeat):
                return
            if isinstance(message, Retire):
                self._retire(known, message)
                return
            with self._lock:
                actions = self.core.on_message(peer, message, now)
                ended = self._perform(actions, inline)
        except ProtocolError as error:
            self._rate_limited_log.log(peer, logging.WARNING, "Control message from %s refused: %s", peer, error)
            return
        if isinstance(message, Resume):
            for action in actions:
                if isinstance(action, TransferEmbeddingChunk):
                    logger.info(
                        "Resume transfer triggered: room=%s, queue_idx=%d, src_blocks=%d",
                        action.room, action.queue_idx, len(action.embedding_indices),
                    )  # fmt: skip
        self._notify_listeners(ended)
        for chunk in inline:
            self._serve(chunk)

    def _on_tick(self) -> None:
        now = self._clock()
        with self._lock:
            ended = self._perform(self.core.tick(now))
        self._notify_listeners(ended)
        for peer, known in list(self._peers.items()):
            if now - known.last_seen > self.settings.peer_timeout:
                self._drop_peer(peer, f"the language server was silent for {self.settings.peer_timeout:g} s")
        if now >= self._next_heartbeat:
            self._next_heartbeat = now + self.settings.heartbeat
            for peer in {*self._peers, *self._registering}:
                self._send(peer, Heartbeat(incarnation=self.incarnation))

    def _retire(self, known: _ControlPeer, message: Retire) -> None:
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
                return  # the session speaks through a newer connection
            ended = self._perform(self.core.session_lost(known.session, reason, self._clock()))
            self._links.close(known.session)
        logger.warning("Language rank %s lost: %s", known.session, reason)
        self._notify_listeners(ended)

    # -- registration (registrar thread) -------------------------------------------------------------------------

    def _register_soon(self, peer: str, message: Register) -> None:
        """One job for each peer, however often it registers while it waits: the others get their turn."""
        with self._lock:
            waiting = self._to_register.get(peer)
            waits = waiting is not None
            full = not waits and len(self._to_register) >= _WAITING_REGISTRATIONS
            overtaken = (
                waiting is not None and waiting.incarnation == message.incarnation and waiting.number > message.number
            )
            if not full and not overtaken:
                self._to_register[peer] = message
                self._registering.add(peer)
        if full:
            self._send(peer, Refused(reason="too many language ranks register at once", kind="register_first"))
        elif not waits:
            self._registrar.submit(self._register, peer)

    def _register(self, peer: str) -> None:
        with self._lock:
            message = self._to_register.pop(peer)
        try:
            problem = self._mismatch(message)
            if problem:
                self._rate_limited_log.log(
                    peer, logging.ERROR, "Language rank %s refused: %s", message.mooncake_session_id, problem
                )
                self._send(peer, Refused(reason=problem, kind="mismatch"))
            else:
                self._attach(peer, message)
        except (LinkBusy, WriterSlotTaken) as error:  # a registration that was overtaken: the next may do
            self._send(peer, Refused(reason=str(error), kind="register_first"))
        except (DataPathUnavailable, ProtocolError) as error:
            self._rate_limited_log.log(
                peer, logging.WARNING, "Language rank %s: %s", message.mooncake_session_id, error
            )
            self._send(peer, Refused(reason=as_text(str(error)), kind="data_path", data_path=message.data_path))
        except Exception as error:
            logger.exception("Language rank %s could not be registered", message.mooncake_session_id)
            reason = as_text(f"{type(error).__name__}: {error}")
            self._send(peer, Refused(reason=reason, kind="data_path", data_path=message.data_path))
        finally:
            with self._lock:
                if peer not in self._to_register:
                    self._registering.discard(peer)

    def _attach(self, peer: str, message: Register) -> None:
        with self._lock:
            known = self.core.sessions.get(message.mooncake_session_id)
        if known is not None and known.incarnation == message.incarnation and known.number > message.number:
            return  # overtaken, on a connection that is broken: whoever speaks now speaks through another
        if known is not None and known.incarnation != message.incarnation and self._is_alive(known):
            raise LinkBusy(f"session {message.mooncake_session_id} is another process's, which lives")
        same_session = self._links.open(message)
        session = RegisteredSession(
            mooncake_session_id=message.mooncake_session_id,
            peer=peer,
            incarnation=message.incarnation,
            server=message.server,
            rank=message.rank,
            size=message.size,
            geometry=Geometry(message.block_bytes, message.blocks_per_region, len(message.regions)),
            epochs=(message.epoch,),
            most_writes=max(1, self.settings.workers_per_queue // 2),
            number=message.number,
        )
        now = self._clock()
        answer = Registered(
            mooncake_session_id=message.mooncake_session_id, epoch=message.epoch, incarnation=self.incarnation
        )
        with self._lock:
            ended: list[Ended] = []
            known = self.core.sessions.get(message.mooncake_session_id)
            if not same_session:
                ended += self._perform(
                    self.core.session_lost(message.mooncake_session_id, "the language rank registered anew", now)
                )
            elif known is not None:
                living = {epoch for epoch in known.epochs if epoch >= message.oldest_epoch}
                session = replace(session, epochs=tuple(sorted({*living, message.epoch})))
            if self._links.has(message.mooncake_session_id, message.epoch):
                ended += self._give_up_other_session(peer, message.mooncake_session_id, now)
                self._peers[peer] = _ControlPeer(now, message.mooncake_session_id)
                self._send(peer, answer)
                ended += self._perform(self.core.register(session, now))
            else:  # dropped for its silence on an older connection, in this very moment
                self._send(peer, Refused(reason="the link was closed meanwhile", kind="register_first"))
        if message.oldest_epoch:
            self._links.close(message.mooncake_session_id, up_to=message.oldest_epoch - 1)
        self._rate_limited_log.log(
            peer, logging.INFO,
            "Language rank %d of %d registered: session=%s epoch=%d path=%s pool=%d blocks of %d bytes",
            message.rank, message.size, message.mooncake_session_id, message.epoch, message.data_path,
            session.geometry.blocks, message.block_bytes,
        )  # fmt: skip
        self._notify_listeners(ended)

    def _is_alive(self, session: RegisteredSession) -> bool:
        peer = self._peers.get(session.peer)
        return peer is not None and self._clock() - peer.last_seen < _ALIVE_HEARTBEATS * self.settings.heartbeat

    def _give_up_other_session(self, peer: str, session: str, now: float) -> list[Ended]:
        """Under the lock. A peer speaks for one session; nobody would end the one that it registered before."""
        known = self._peers.get(peer)
        other = None if known is None or known.session == session else self.core.sessions.get(known.session)
        if other is None or other.peer != peer:
            return []
        self._links.close(other.mooncake_session_id)
        return self._perform(self.core.session_lost(other.mooncake_session_id, "its peer registered another", now))

    def _mismatch(self, message: Register) -> str:
        """Why the two sides do not fit, naming both values; empty where they do."""
        for what, theirs, ours in (
            ("block size (SGLANG_EMBEDDING_CACHE_BLOCK_SIZE)", message.block_size, self.settings.block_size),
            ("dtype", message.dtype, self.dtype),
            ("SGLANG_MM_CONN_CHECKSUM", message.checksum, self.settings.checksum),
            ("SGLANG_MM_CONN_MAX_FRAME_BYTES", message.max_frame_bytes, self.settings.max_frame_bytes),
            ("SGLANG_MM_CONN_MAX_METADATA_BYTES", message.max_metadata_bytes, self.settings.max_metadata_bytes),
        ):
            if theirs != ours:
                return f"{what} is {theirs} on the language server and {ours} on the encoder"
        if self.widest_row_bytes > message.row_bytes:
            return (
                f"the encoder's widest row has {self.widest_row_bytes} bytes, "
                f"the language server expects at most {message.row_bytes}"
            )
        if self.settings.data_path not in ("auto", message.data_path):
            return (
                f"SGLANG_MM_CONN_DATA_PATH is {self.settings.data_path} on the encoder, "
                f"but the language server offers {message.data_path}"
            )
        try:
            session_port(message.mooncake_session_id)  # the shard rule needs it
        except ProtocolError as error:
            return str(error)
        if message.rank >= message.size:
            return f"rank {message.rank} of {message.size}"
        length = message.blocks_per_region * message.block_bytes
        if any(region.length != length for region in message.regions):
            return f"a region is not {message.blocks_per_region} blocks of {message.block_bytes} bytes long"
        return ""

    # -- transfer workers ----------------------------------------------------------------------------------------

    def transfer_worker(self, index: int) -> None:
        """Serves transfer queue ``index`` until ``close``."""
        while (chunk := self.transfer_queues[index].get()) is not None:
            self._serve(chunk)

    def _serve(self, chunk: TransferEmbeddingChunk) -> None:
        """Writes the offered windows of a room. Its failure, of whatever kind, ends only that room."""
        try:
            while self._write_window(chunk.room):
                pass
        except Exception as error:
            logger.exception("Writing windows of room %s failed", chunk.room)
            self.fail(chunk.room, f"{type(error).__name__}: {error}", 500)

    def _should_write_inline(self, chunk: TransferEmbeddingChunk) -> bool:
        """Under the lock. Whether no worker need be woken, since the writes wait for nobody, being copies in memory,
        and are short: those of a small embedding that is taken as a whole, and all of an embedding beside which no
        other is here (the workers write several in parallel), as long as they are not large together."""
        entry = self.core.rooms[chunk.room]
        offers = entry.offers
        if not all(self._links.synchronous(session, info.epoch) for session, info in offers):
            return False
        if len(self._sources) == 1 and entry.offered_bytes <= self._uncontended_inline_limit_bytes:
            return True
        whole = all(info.allocated_tokens == entry.total_tokens for _, info in offers)
        return whole and entry.total_tokens * entry.row_bytes <= self._inline_limit_bytes

    def _write_window(self, room: str) -> bool:
        call = self.begin_window(room)
        if call is None:
            return False
        error, in_doubt = self.data_call(call)
        self.end_window(call, error, in_doubt)
        return True

    def begin_window(self, room: str) -> DataCall | None:
        """The next data call for ``room``, its link pinned until ``end_window``; None where there is none now."""
        lease, refusal = None, ""
        with self._lock:
            write = self.core.begin_write(room)
            if write is None:
                return None
            entry, source = self.core.rooms[room], self._sources[room]
            try:
                # Pin the link in the same critical section as begin_write. Otherwise a process that is suspended
                # between the two could find a different link under the same name after the old one was revoked.
                lease = self._links.lease(write.session.mooncake_session_id, write.epoch)
            except DataPathError as failure:
                refusal = str(failure)
                self._send(write.session.peer, Refused(reason=refusal, kind="register_first"))
            return DataCall(write, entry, source, lease, refusal)

    def end_window(self, call: DataCall, error: str, in_doubt: bool) -> None:
        """The data call has returned. ``error`` says what went wrong (empty: nothing), ``in_doubt`` whether bytes may
        still land."""
        if call.lease is not None:
            call.lease.release()
        with self._lock:
            ended = self._perform(self.core.on_written(call.write, error, in_doubt, self._clock()))
        for action in ended:
            if action.success:
                logger.info(
                    "Embedding sent: room=%s tokens=%d windows=%d path=%s ms=%.1f",
                    action.room, call.entry.total_tokens, call.entry.windows,
                    call.link.name if call.link is not None else "none", call.entry.elapsed * 1000,
                )  # fmt: skip
        self._notify_listeners(ended)

    def data_call(self, call: DataCall) -> tuple[str, bool]:
        """Returns what went wrong (empty: nothing) and whether bytes may still land."""
        link = call.link
        if link is None:
            return call.refusal, False
        try:
            call.source.ready.synchronize()
        except Exception as failure:
            return f"the embedding was not computed: {failure}", False
        try:
            link.write(call.source.rows, call.extents())
        except DataPathError as failure:
            return str(failure), failure.in_doubt
        except Exception as failure:
            # Nothing is known about what a data call did that ended in a way it should not.
            logger.exception("Data call for room %s failed", call.write.room)
            return f"{type(failure).__name__}: {failure}", not link.synchronous
        return "", False

    # -- helpers -------------------------------------------------------------------------------------------------

    def _send(self, peer: str, message: Message) -> None:
        self._control.send(peer, encode(message))

    def _perform(self, actions: list[Action], inline: list[TransferEmbeddingChunk] | None = None) -> list[Ended]:
        """Under the lock, so that messages leave in the order of the decisions. Returns the ends, to be told after.

        Chunks that no worker need serve are left in ``inline``, where there is one.
        """
        ended = []
        for action in actions:
            if isinstance(action, Send):
                self._send(action.peer, action.message)
            elif isinstance(action, TransferEmbeddingChunk):
                if inline is not None and self._should_write_inline(action):
                    inline.append(action)
                else:
                    self.transfer_queues[action.queue_idx].put(action)
            elif isinstance(action, Release):
                self._sources.pop(action.room, None)
            elif isinstance(action, Ended):
                ended.append(action)
            elif isinstance(action, CopyOut):
                raise ConnError("unexpected action CopyOut in an encoder")
        return ended

    def _notify_listeners(self, ended: list[Ended]) -> None:
        for action in ended:
            if not action.success:
                logger.warning(
                    "Embedding not sent: room=%s peer=%s code=%d reason=%s",
                    action.room, action.peer or "none", action.code, action.reason,
                )  # fmt: skip
            with self._lock:
                listener = self._listeners.pop(action.room, None)
            if listener is not None:
                try:
                    listener(action)
                except Exception:
                    logger.exception("Listener of room %s failed", action.room)

    def close(self) -> None:
        """Stop all threads; for tests and orderly shutdown."""
        self._control.stop()
        for transfer_queue in self.transfer_queues:
            for _ in range(self.settings.workers_per_queue):
                transfer_queue.put(None)
        for thread in self._threads:
            thread.join(10)
        self._registrar.shutdown(wait=True)
        self._links.close_all()
