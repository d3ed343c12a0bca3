"""The language rank's end: offers blocks, copies rows out of them, hands finished embeddings over.

Threads: ``embedding_thread`` owns the control sockets and copies small windows out of blocks, a few copiers the others;
a small pool looks up encoders. Callers (the scheduler's tick) only read states and take results. All state is in the
core and a few tables, under one lock that is never held during a copy or a socket operation.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

import torch

from sglang_mm_conn.connector.language.encoder_directory import Encoders
from sglang_mm_conn.connector.language.sessions import LocalSessions
from sglang_mm_conn.connector.metadata import dtype_of
from sglang_mm_conn.connector.runtime import Runtime
from sglang_mm_conn.control.authentication import DeploymentKey
from sglang_mm_conn.control.rate_limited_log import RateLimitedLog
from sglang_mm_conn.control.thread import ControlCallbacks
from sglang_mm_conn.control.wakeup import Wakeup
from sglang_mm_conn.core.actions import Action, CopyOut, Ended, Release, Send, TransferEmbeddingChunk
from sglang_mm_conn.core.blocks import BlockAllocator
from sglang_mm_conn.core.errors import ConnError, MemoryUnavailable, ProtocolError
from sglang_mm_conn.core.messages import Heartbeat, Refused, Registered, decode_from_encoder, encode
from sglang_mm_conn.core.receiver import Peer, ReceiverCore, ReceiverRoom
from sglang_mm_conn.core.rooms import new_id
from sglang_mm_conn.core.settings import Settings
from sglang_mm_conn.core.states import Poll
from sglang_mm_conn.core.tombstones import Outcome
from sglang_mm_conn.datapath.mooncake.revocation import Revocation
from sglang_mm_conn.memory.buffer_cache import BufferCache
from sglang_mm_conn.memory.pool import pool_geometry
from sglang_mm_conn.memory.results import Contents, PrivateResult, Result, ResultMaker, ViewResult

logger = logging.getLogger(__name__)

_TICK_SECONDS = 0.1
_ALIGNMENT = 16  # of memory that tensors of any dtype may begin in

Value = TypeVar("Value")


class LanguageEndpoint:
    """One per language rank (scheduler process)."""

    def __init__(
        self,
        settings: Settings,
        *,
        server: str,
        host: str,
        dtype: str,
        widest_row_bytes: int,
        rank: int = 0,
        size: int = 1,
        make_result: ResultMaker = PrivateResult,
        runtime: Runtime | None = None,
    ) -> None:
        """``server``: incarnation of the language server, the prefix of its rooms. ``host``: where Mooncake peers
        reach this process. ``make_result``: where rows are copied to, if not to memory of this process alone.
        Raises MemoryUnavailable, DataPathUnavailable."""
        runtime = runtime or Runtime()
        self.settings = settings
        self.server = server
        self.incarnation = new_id()
        self._clock = runtime.clock
        self._device = runtime.device
        self._device.require(settings)
        private = make_result is PrivateResult
        if not private and settings.resolved_embedding_device != "cpu":
            raise MemoryUnavailable(
                f"SGLANG_MM_CONN_EMBEDDING_DEVICE={settings.resolved_embedding_device}: what ranks share is in host "
                "memory, set it to cpu"
            )
        self._lock = threading.Lock()
        shared = settings.shared_pool
        self.pool = runtime.pool(
            pool_geometry(settings, widest_row_bytes, shared=shared), shared=shared, memory_device=settings.pool_device
        )
        # The control thread waits for no GPU, and a copy from a view to one may be under way when its last tensor goes.
        on_host = private and self._device.synchronous
        self._inline_limit_bytes = runtime.inline_limit_bytes if on_host else 0
        geometry = self.pool.geometry
        aligned = geometry.block_bytes % _ALIGNMENT == 0
        self.core = ReceiverCore(
            BlockAllocator(geometry.blocks),
            geometry,
            view_blocks=geometry.blocks * settings.view_percent // 100 if on_host and aligned else 0,
            view_least_bytes=runtime.view_least_bytes,
            first_offer=settings.first_offer,
            claim_timeout=settings.claim_timeout,
            max_embedding_bytes=settings.max_embedding_bytes,
        )
        self._sessions = LocalSessions(
            settings, self.pool, host=host, incarnation=self.incarnation, server=server, rank=rank, size=size,
            widest_row_bytes=widest_row_bytes, dtype=dtype, runtime=runtime,
        )  # fmt: skip
        self._size = size
        self._buffer_cache = BufferCache(settings.result_cache_bytes)
        empty = self._buffer_cache.tensor
        if settings.resolved_embedding_device != "cpu":  # torch keeps GPU memory warm by itself
            empty = partial(self._device.empty, memory_device=settings.resolved_embedding_device)
        self._make_result = partial(PrivateResult, empty=empty) if private else make_result
        self._results: dict[str, Result] = {}
        self._labels: dict[str, str] = {}
        self._rate_limited_log = RateLimitedLog(logger)
        self.completions = Wakeup()  # notified when a room ends
        self._copiers = runtime.executor(settings.copiers, "mm-conn-copier")
        key = None if settings.key_file is None else DeploymentKey.load(settings.key_file)
        self._encoders = Encoders(
            self._sessions,
            key,
            self.incarnation,
            insecure=settings.insecure,
            peer_timeout=settings.peer_timeout,
            heartbeat=settings.heartbeat,
            on_ready=self._on_ready,
            on_lost=self._on_lost,
            on_refused=self._on_refused,
            runtime=runtime,
        )
        self._control = runtime.control_client(
            ControlCallbacks(
                self._on_frame,
                self._on_tick,
                min(_TICK_SECONDS, settings.heartbeat / 2),
                self._encoders.on_connected,
                self._encoders.on_disconnected,
            ),
            key=key,
            max_frame_bytes=settings.max_frame_bytes + settings.max_metadata_bytes,
        )
        self._encoders.control = self._control
        self._revoker = runtime.executor(1, "mm-conn-revoker")
        self.revocation = Revocation(
            self._sessions,
            self._revoker,
            patience=settings.doubt_patience,
            in_doubt_since=lambda: self.core.in_doubt_since("mooncake"),
            is_in_use=self.core.is_in_use,
            register_again=lambda: self._encoders.register_again("mooncake"),
            revoked=self._on_epoch_revoked,
        )
        # The thread starts last: it uses everything above.
        self._thread = runtime.start_thread(self.embedding_thread, "mm-conn-embedding")

    # -- what a receiver asks for --------------------------------------------------------------------------------

    def use_encoder(self, url: str) -> None:
        """Connect to the encoder at ``url``, where that has not been done."""
        self._encoders.use(url)

    def expect(self, room: str, encoder: str, timeout: float, label: str) -> None:
        """A request waits for ``room`` from ``encoder`` (its URL) for ``timeout`` seconds. ``label`` is for logs."""
        now = self._clock()
        with self._lock:
            actions = self.core.expect(room, encoder, now + timeout, now, required_dst_info_num=self._size)
            self._labels[room] = label
            self._perform(actions)
        self._encoders.use(encoder)

    def poll(self, room: str) -> Poll:
        """Raises ConnError where the room is unknown."""
        return self._room(room).poll()

    def outcome(self, room: str) -> Outcome:
        """Why the room failed."""
        return self._room(room).outcome or Outcome("", 200)

    def take(self, room: str) -> tuple[torch.Tensor, bytes]:
        """The embedding [tokens, width] and metadata of a room that ended in Success; the memory is the caller's."""
        with self._lock:
            entry = self._room(room)
            if entry.poll() is not Poll.Success or room not in self._results:
                raise ConnError(f"room {room} has no embedding to take")
            rows = self._results[room].rows
        dtype = dtype_of(entry.dtype)
        return rows.view(dtype).reshape(entry.total_tokens, -1), entry.metadata

    def abort(self, room: str, reason: str, code: int = 499) -> None:
        """Give the room up. Its blocks are reused only when nobody can write them any more."""
        with self._lock:
            self._perform(self.core.abort(room, reason, code, self._clock()))

    def resume_transfer(self, room: str, embedding_indices: list[int], sent_tokens: int, allocated_tokens: int) -> None:
        """Offer the next window of a room that waits for blocks (see EmbeddingReceiver.resume_transfer)."""
        with self._lock:
            entry = self._room(room)
            offer = self.core.resume_transfer(entry, embedding_indices, sent_tokens, allocated_tokens, self._clock())
            self._perform([offer])

    def forget(self, room: str) -> None:
        """Drop what is kept of an ended room."""
        with self._lock:
            self.core.forget(room)
            self._drop_result(room)
            self._labels.pop(room, None)

    def report(self) -> dict[str, Any]:
        """For operators: see ReceiverCore.report."""
        with self._lock:
            return self.core.report()

    def submit(self, work: Callable[[], Value]) -> Future[Value]:
        """Run something large off the caller's thread; notifies ``completions`` when it is done."""

        def finish() -> Value:
            value = work()
            if self.settings.resolved_embedding_device != "cpu":
                self._device.drain()  # what it made is there for every stream
            return value

        future = self._copiers.submit(finish)
        future.add_done_callback(lambda _: self.completions.notify())
        return future

    def _room(self, room: str) -> ReceiverRoom:
        entry = self.core.rooms.get(room)
        if entry is None:
            raise ConnError(f"room {room} is unknown here")
        return entry

    # -- embedding thread ----------------------------------------------------------------------------------------

    def embedding_thread(self) -> None:
        """Owns the control sockets until ``close``."""
        self._control.run()

    def _on_frame(self, incarnation: str, frame: bytes) -> None:
        limit = self.settings.max_frame_bytes + self.settings.max_metadata_bytes
        try:
            message = decode_from_encoder(frame, limit)
            self._encoders.on_seen(incarnation)
            if isinstance(message, Heartbeat):
                return
            if isinstance(message, Registered):
                self._encoders.on_registered(incarnation, message)
            elif isinstance(message, Refused):
                self._encoders.on_refused(incarnation, message)
            else:
                inline: list[CopyOut] = []
                with self._lock:
                    self._perform(self.core.on_message(incarnation, message, self._clock()), inline)
                for copy in inline:
                    self._copy_out(copy)
        except ProtocolError as error:
            self._rate_limited_log.log(
                incarnation, logging.WARNING, "Control message from encoder process %s refused: %s", incarnation, error
            )

    def _on_ready(self, peer: Peer) -> None:
        with self._lock:
            self._perform(self.core.peer_ready(peer, self._clock()))

    def _on_lost(self, incarnation: str, reason: str) -> None:
        with self._lock:
            self._perform(self.core.peer_lost(incarnation, reason, self._clock()))

    def _on_refused(self, encoder: str, reason: str) -> None:
        with self._lock:
            self._perform(self.core.encoder_failed(encoder, reason, 502, self._clock()))

    def _on_tick(self) -> None:
        self._encoders.tick()
        self._buffer_cache.trim()
        with self._lock:
            self._perform(self.core.tick(self._clock()))
            quarantined = {peer.incarnation: peer.data_path for peer in self.core.quarantined_peers()}
        for incarnation, path in quarantined.items():
            slot = self._encoders.slot_of(incarnation)
            if path == "shm" and slot is not None and self._sessions.retire_writer(slot):
                self._encoders.replace_slot(incarnation)
                with self._lock:
                    logger.info("Encoder process %s cannot write any more: its blocks are free again", incarnation)
                    self._perform(self.core.writer_gone(incarnation, self._clock()))
        self._encoders.forget_slots(keep=set(quarantined))
        with self._lock:
            self.revocation.tick(self._clock())

    def _on_epoch_revoked(self, session: str, epoch: int) -> None:
        """Under the lock, from the revocation's tick."""
        self._perform(self.core.epoch_revoked(session, epoch, self._clock()))
        self._encoders.send_retired("mooncake")

    # -- copiers --------------------------------------------------------------------------------------------------

    def _copy_out(self, copy: CopyOut) -> None:
        error = ""
        view = False
        try:
            # ``flat`` keeps a view alive until the core knows of it.
            flat = self._result_of(copy).rows
            view = copy.view
            if not view:
                first, nbytes = copy.first_token * copy.row_bytes, copy.tokens * copy.row_bytes
                self.pool.read(copy.blocks, flat, nbytes, first)
            if copy.last and self.settings.checksum:
                error = self._checksum_error(flat, copy.checksum)
        except Exception as failure:
            logger.exception("Copying rows of room %s failed", copy.room)
            error = f"{type(failure).__name__}: {failure}"
        with self._lock:
            if copy.last and not error and self._room(copy.room).poll() is not Poll.Failed:
                error = self._publish(copy.room)
            try:
                self._perform(self.core.on_copied(copy.room, copy.window, error, self._clock(), view=view))
            except ConnError as failure:
                logger.exception("Room %s", copy.room)
                self._perform(self.core.abort(copy.room, str(failure), 500, self._clock()))
            entry = self.core.rooms.get(copy.room)
            if entry is None or entry.poll() is Poll.Failed:
                self._drop_result(copy.room)

    def _result_of(self, copy: CopyOut) -> Result:
        """The room's result; made at its first copy."""
        with self._lock:
            result = self._results.get(copy.room)
            metadata = self._room(copy.room).metadata
        if result is None:
            if (copy.row_bytes % dtype_of(copy.dtype).itemsize) != 0:
                raise ProtocolError(f"a row of {copy.row_bytes} bytes is not whole values of {copy.dtype}")
            nbytes = copy.total_tokens * copy.row_bytes
            if copy.view:
                result = self._view_of(copy, nbytes)
            else:
                result = self._make_result(copy.room, Contents(copy.total_tokens, copy.dtype, nbytes, metadata))
            with self._lock:
                self._results[copy.room] = result
        return result

    def _view_of(self, copy: CopyOut, nbytes: int) -> Result:
        """Over when the last tensor on it is gone: told on the control thread, since finalizers must not wait."""
        on_release = partial(self._control.call, partial(self._view_released, copy.room))
        return ViewResult(self.pool.view(copy.blocks, nbytes, on_release))

    def _view_released(self, room: str) -> None:
        with self._lock:
            self._perform(self.core.view_released(room, self._clock()))

    def _publish(self, room: str) -> str:
        """Under the lock, so that no result gets a name after it was dropped. Returns why it could not be done."""
        try:
            self._results[room].publish()
        except OSError as error:
            return f"the result could not be shared with the other ranks: {error}"
        return ""

    def _drop_result(self, room: str) -> None:
        """Under the lock. Whoever took the rows keeps them."""
        result = self._results.pop(room, None)
        if result is not None:
            result.close()

    def _checksum_error(self, flat: torch.Tensor, expected: int | None) -> str:
        if expected is None:
            return "no checksum came: set SGLANG_MM_CONN_CHECKSUM=1 on the encoder too"
        actual = self._device.checksum(flat)
        return "" if actual == expected else f"checksum {actual:#010x}, but {expected:#010x} was sent"

    # -- helpers -------------------------------------------------------------------------------------------------

    def _perform(self, actions: list[Action], inline: list[CopyOut] | None = None) -> None:
        """Under the lock, so that messages leave in the order of the decisions.

        Copies that take no longer than waking a copier are left in ``inline``, where there is one.
        """
        for action in actions:
            if isinstance(action, Send):
                self._control.send(action.peer, encode(action.message))
            elif isinstance(action, CopyOut):
                if inline is not None and self._should_copy_inline(action):
                    inline.append(action)
                else:
                    self._copiers.submit(self._copy_out, action)
            elif isinstance(action, Ended):
                self._ended(action)
            elif isinstance(action, TransferEmbeddingChunk | Release):
                raise ConnError("unexpected action in a language rank")

    def _should_copy_inline(self, copy: CopyOut) -> bool:
        """A view copies nothing, whatever its size. A checksum reads the whole embedding, after its last window."""
        if copy.view and not self.settings.checksum:
            return self._inline_limit_bytes > 0
        tokens = copy.total_tokens if copy.last and self.settings.checksum else copy.tokens
        return tokens * copy.row_bytes <= self._inline_limit_bytes

    def _ended(self, action: Ended) -> None:
        entry = self.core.rooms[action.room]
        label = self._labels.get(action.room, "")
        if action.success:
            nbytes = entry.total_tokens * entry.row_bytes
            seconds = max(entry.elapsed, 1e-9)
            logger.info(
                "Embedding received: room=%s rid=%s tokens=%d bytes=%d windows=%d resumes=%d path=%s ms=%.1f "
                "rate=%.1fMB/s wait_ms=%.1f",
                action.room, label, entry.total_tokens, nbytes, entry.window + 1, entry.resumes,
                entry.peer.data_path if entry.peer is not None else "none", seconds * 1000, nbytes / seconds / 1e6,
                (entry.ended - entry.started) * 1000,
            )  # fmt: skip
        else:
            self._drop_result(action.room)
            logger.warning(
                "Embedding failed: room=%s rid=%s peer=%s code=%d reason=%s",
                action.room, label, entry.peer.incarnation if entry.peer is not None else entry.encoder,
                action.code, action.reason,
            )  # fmt: skip
        self.completions.notify()

    def close(self) -> None:
        """Stop all threads and unlink the segment; for tests and orderly shutdown."""
        self._control.stop()
        self._thread.join(10)
        self._encoders.close()
        self._copiers.shutdown(wait=True)
        self._revoker.shutdown(wait=True)
        with self._lock:
            for room in list(self._results):
                self._drop_result(room)
        self._sessions.close()
        self.pool.close()
