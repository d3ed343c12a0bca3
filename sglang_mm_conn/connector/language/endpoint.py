"""Owns the language rank's endpoint: the core, the lock that guards it, and the control thread.

It offers blocks, has rows copied out of them (connector.language.results) and hands finished embeddings over. Threads:
``embedding_thread`` is the control thread: it owns the control sockets and makes small copies. Copier threads make the
others. A small thread pool looks up encoders. Callers (the scheduler's tick) only read states and take results. The
lock is never held during a copy or a socket operation.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

import torch

from sglang_mm_conn.connector.language.encoder_directory import EncoderDirectory, EncoderEvent
from sglang_mm_conn.connector.language.encoder_watch import EncoderWatch, EncoderWatcher
from sglang_mm_conn.connector.language.results import ResultMemory, Results, embedding_of, log_end
from sglang_mm_conn.connector.language.sessions import LocalSessions
from sglang_mm_conn.connector.runtime import Runtime
from sglang_mm_conn.control.authentication import DeploymentKey
from sglang_mm_conn.control.client import ControlClient
from sglang_mm_conn.control.rate_limited_log import RateLimitedLog
from sglang_mm_conn.control.thread import ControlCallbacks
from sglang_mm_conn.control.wakeup import Wakeup
from sglang_mm_conn.core.actions import (
    Action,
    CopyOut,
    EncoderRefused,
    Ended,
    ProcessLost,
    ProcessReady,
    Release,
    Send,
    TransferEmbeddingChunk,
)
from sglang_mm_conn.core.blocks import BlockAllocator
from sglang_mm_conn.core.errors import ConnError, ProtocolError
from sglang_mm_conn.core.language.receiver import Peer, ReceiverCore, ReceiverRoom
from sglang_mm_conn.core.messages import Heartbeat, Refused, Registered, decode_from_encoder, encode
from sglang_mm_conn.core.outcomes import SUCCEEDED, FailureCode, Outcome
from sglang_mm_conn.core.rooms import new_id
from sglang_mm_conn.core.settings import Settings
from sglang_mm_conn.core.states import Poll
from sglang_mm_conn.datapath.base import Doubts, ReceivePath, Revoking
from sglang_mm_conn.memory.pool import pool_geometry
from sglang_mm_conn.memory.results import PrivateResult, ResultMaker

logger = logging.getLogger(__name__)

_TICK_SECONDS = 0.1

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
        """``server``: incarnation of the language server, the prefix of its rooms. ``host``: the address at which
        Mooncake peers reach this process. ``make_result``: makes the memory that rows are copied to; private memory by
        default. Raises MemoryUnavailable, DataPathUnavailable."""
        runtime = runtime or Runtime()
        runtime.device.require(settings)
        memory = ResultMemory(settings, runtime.device, make_result)
        self.settings = settings
        self.server = server
        self.incarnation = new_id()
        self._size = size
        self._clock = runtime.clock
        self._lock = threading.Lock()
        self._labels: dict[str, str] = {}
        self._rate_limited_log = RateLimitedLog(logger)
        shared = settings.shared_pool
        geometry = pool_geometry(settings, widest_row_bytes, shared=shared)
        self.pool = runtime.pool(geometry, shared=shared, memory_device=settings.pool_device)
        self._sessions = LocalSessions(
            settings, self.pool.geometry, runtime.receive_paths(settings, host, self.pool),
            incarnation=self.incarnation, server=server, rank=rank, size=size, widest_row_bytes=widest_row_bytes,
            dtype=dtype,
        )  # fmt: skip
        self.completions = Wakeup()  # notified when a room ends
        self._watch = EncoderWatch()
        self._results = Results(settings, memory, self.pool, lock=self._lock, runtime=runtime)
        self.core = self._new_core(runtime)
        self._encoders, self._control = self._new_connections(runtime)
        self._revoker = runtime.executor(1, "mm-conn-revoker")
        self.revocations = self._new_revocations()
        # Start the thread last: it uses everything above.
        self._thread = runtime.start_thread(self.embedding_thread, "mm-conn-embedding")

    def _new_core(self, runtime: Runtime) -> ReceiverCore:
        geometry = self.pool.geometry
        return ReceiverCore(
            BlockAllocator(geometry.blocks), geometry, view_blocks=self._results.view_blocks,
            view_least_bytes=runtime.view_least_bytes, first_offer=self.settings.first_offer,
            claim_timeout=self.settings.claim_timeout, max_embedding_bytes=self.settings.max_embedding_bytes,
        )  # fmt: skip

    def _new_connections(self, runtime: Runtime) -> tuple[EncoderDirectory, ControlClient]:
        settings = self.settings
        key = None if settings.key_file is None else DeploymentKey.load(settings.key_file)
        # The callbacks may name the directory before it is made: the control thread starts after both exist.
        callbacks = ControlCallbacks(
            on_frame=self._on_frame, on_tick=self._on_tick, tick_seconds=min(_TICK_SECONDS, settings.heartbeat / 2),
            on_connected=lambda incarnation: self._encoders.on_connected(incarnation),
            on_disconnected=lambda incarnation: self._encoders.on_disconnected(incarnation),
        )  # fmt: skip
        limit = settings.max_frame_bytes + settings.max_metadata_bytes
        control = runtime.control_client(callbacks, key=key, max_frame_bytes=limit)
        encoders = EncoderDirectory(
            self._sessions, control, key, self.incarnation, insecure=settings.insecure,
            peer_timeout=settings.peer_timeout, heartbeat=settings.heartbeat, on_event=self._on_encoder_event,
            runtime=runtime,
        )  # fmt: skip
        return encoders, control

    def _new_revocations(self) -> list[Revoking]:
        doubts = Doubts(
            self._revoker, patience=self.settings.doubt_patience, in_doubt_since=self.core.in_doubt_since,
            is_in_use=self.core.is_in_use, register_again=lambda path: self._encoders.register_again(path.name),
            revoked=self._on_epoch_revoked,
        )  # fmt: skip
        made = (path.revocation(doubts) for path in self._sessions.paths.values())
        return [revocation for revocation in made if revocation is not None]

    # -- what a receiver calls -----------------------------------------------------------------------------------

    def use_encoder(self, url: str) -> None:
        """Connect to the encoder at ``url`` if it is not connected."""
        self._encoders.use(url)

    def watch_encoders(self, watcher: EncoderWatcher) -> None:
        """Let ``watcher`` know the status of each encoder, on the control thread: at each change, and every second."""
        self._watch.watcher = watcher

    def expect(self, room: str, encoder: str, timeout: float, label: str) -> None:
        """Wait for ``room`` from ``encoder`` (its URL) for ``timeout`` seconds. ``label`` is for logs."""
        now = self._clock()
        with self._lock:
            actions = self.core.expect(room, encoder, now + timeout, now, required_dst_info_num=self._size)
            self._labels[room] = label
            self._perform(actions)
        self._encoders.use(encoder)

    def poll(self, room: str) -> Poll:
        """The state of ``room``. Raises ConnError if the room is unknown.

        This deliberately takes no lock: the scheduler polls every room in every tick, and must not wait for a thread
        that holds it. Looking a room up is one dict operation. If the state changes meanwhile, the next poll sees it;
        polls never see states out of order.
        """
        return self._room(room).poll()

    def outcome(self, room: str) -> Outcome:
        """The outcome of an ended room: why it failed, or SUCCEEDED."""
        return self._room(room).outcome or SUCCEEDED

    def take(self, room: str) -> tuple[torch.Tensor, bytes]:
        """The embedding [tokens, width] and metadata of a room that ended in Success. The caller may keep the memory.

        This deliberately takes the lock, once per room: state and rows must belong together. ``publish`` replaces the
        rows of a shared result in the critical section that makes the room succeed, and other threads drop results.
        """
        with self._lock:
            entry = self._room(room)
            rows = self._results.rows(room) if entry.poll() is Poll.Success else None
        if rows is None:
            raise ConnError(f"room {room} has no embedding to take")
        return embedding_of(rows, entry.total_tokens, entry.dtype), entry.metadata

    def abort(self, room: str, reason: str, code: int = FailureCode.ABORTED) -> None:
        """Give the room up. Its blocks are reused only when no process can write them any more."""
        with self._lock:
            self._perform(self.core.abort(room, reason, code, self._clock()))

    def resume_transfer(self, room: str, embedding_indices: list[int], sent_tokens: int, allocated_tokens: int) -> None:
        """Offer the next window of a room that waits for blocks: see EmbeddingReceiver.resume_transfer."""
        with self._lock:
            entry = self._room(room)
            offer = self.core.resume_transfer(entry, embedding_indices, sent_tokens, allocated_tokens, self._clock())
            self._perform([offer])

    def forget(self, room: str) -> None:
        """Drop everything that is kept for an ended room."""
        with self._lock:
            self.core.forget(room)
            self._results.drop(room)
            self._labels.pop(room, None)

    def is_registered(self, url: str) -> bool:
        """Whether the encoder at ``url`` can announce rooms to this rank."""
        return self._encoders.is_registered(url)

    def fragment_pool(self) -> None:
        """For benchmarks: take every other free block permanently, so that no two free blocks are adjacent."""
        with self._lock:
            blocks = self.core.allocator.allocate("fragment_pool", self.core.allocator.free_count)
            self.core.allocator.release("fragment_pool", blocks[1::2])

    def report(self) -> dict[str, Any]:
        """A report for operators: see ReceiverCore.report."""
        with self._lock:
            return self.core.report()

    def submit(self, work: Callable[[], Value]) -> Future[Value]:
        """Run ``work`` on a copier and notify ``completions`` when it is done.

        sglang_plugin.scheduler joins the parts of a request with it: joining copies too much for the scheduler's tick,
        and copiers may wait for a GPU.
        """
        return self._results.submit(work, self.completions.notify)

    def _room(self, room: str) -> ReceiverRoom:
        entry = self.core.rooms.get(room)
        if entry is None:
            raise ConnError(f"room {room} is unknown to this rank")
        return entry

    # -- control thread ------------------------------------------------------------------------------------------

    def embedding_thread(self) -> None:
        """Run the control thread, which owns the control sockets, until ``close``."""
        self._control.run()

    def _on_frame(self, incarnation: str, frame: bytes) -> None:
        limit = self.settings.max_frame_bytes + self.settings.max_metadata_bytes
        try:
            message = decode_from_encoder(frame, limit)
            self._encoders.on_seen(incarnation)
            if isinstance(message, Heartbeat):
                self._encoders.on_heartbeat(incarnation, message)
                return
            if isinstance(message, Registered):
                self._encoders.on_registered(incarnation, message)
            elif isinstance(message, Refused):
                self._encoders.on_refused(incarnation, message)
            else:
                inline: list[Callable[[], None]] = []
                with self._lock:
                    self._perform(self.core.on_message(incarnation, message, self._clock()), inline)
                for copy in inline:
                    copy()
        except ProtocolError as error:
            self._rate_limited_log.log(
                incarnation, logging.WARNING, "Control message from encoder process %s refused: %s", incarnation, error
            )

    def _on_encoder_event(self, event: EncoderEvent) -> None:
        now = self._clock()
        with self._lock:
            match event:
                case ProcessReady(incarnation, session, path, epoch, urls):
                    peer = Peer(incarnation, session, path, self._sessions.paths[path].exclusive_lock, epoch, urls)
                    self._perform(self.core.peer_ready(peer, now))
                case ProcessLost(incarnation, reason):
                    self._perform(self.core.peer_lost(incarnation, reason, now))
                case EncoderRefused(url, reason):
                    self._perform(self.core.encoder_failed(url, reason, FailureCode.PEER_FAILED, now))

    def _on_tick(self) -> None:
        self._encoders.tick()
        self._watch.look(self._encoders.statuses, self._clock())
        self._results.trim()
        with self._lock:
            self._perform(self.core.tick(self._clock()))
            quarantined = self.core.quarantined_peers()
        for incarnation in {peer.incarnation for peer in quarantined if peer.exclusive_lock}:
            slot = self._encoders.slot_of(incarnation)
            if slot is not None and self._sessions.retire_writer(slot):
                self._encoders.replace_slot(incarnation)
                with self._lock:
                    logger.info("Encoder process %s cannot write any more: its blocks are free again", incarnation)
                    self._perform(self.core.writer_gone(incarnation, self._clock()))
        self._encoders.forget_slots(keep={peer.incarnation for peer in quarantined})
        with self._lock:
            for revocation in self.revocations:
                revocation.tick(self._clock())

    def _on_epoch_revoked(self, path: ReceivePath, epoch: int) -> None:
        """Under the lock, from the revocation's tick."""
        self._perform(self.core.epoch_revoked(path.session_id, epoch, self._clock()))
        self._encoders.send_retired(path.name)

    # -- copies ---------------------------------------------------------------------------------------------------

    def _copy_out(self, copy: CopyOut, metadata: bytes) -> None:
        """Without the lock, on a copier or on the control thread: copy the rows out and report the result to the
        core."""
        # A finalizer reports that a view was released. It must not wait for the lock, so it leaves that to the control
        # thread.
        on_view_released = partial(self._control.call, partial(self._view_released, copy.room))
        copied = self._results.copy_out(copy, metadata, on_view_released)
        error, code = copied.error, copied.code
        with self._lock:
            if copy.last and not error and self._room(copy.room).poll() is not Poll.Failed:
                error, code = self._results.publish(copy.room), FailureCode.RANK_FAILED
            try:
                ended = self.core.on_copied(copy.room, copy.window, error, self._clock(), view=copied.view, code=code)
                self._perform(ended)
            except ConnError as failure:
                logger.exception("Room %s", copy.room)
                self._perform(self.core.abort(copy.room, str(failure), FailureCode.RANK_FAILED, self._clock()))
            entry = self.core.rooms.get(copy.room)
            if entry is None or entry.poll() is Poll.Failed:
                self._results.drop(copy.room)

    def _view_released(self, room: str) -> None:
        with self._lock:
            self._perform(self.core.view_released(room, self._clock()))

    # -- helpers -------------------------------------------------------------------------------------------------

    def _perform(self, actions: list[Action], inline: list[Callable[[], None]] | None = None) -> None:
        """Carry ``actions`` out. Call this under the lock, so that messages are sent in the order of the core's
        decisions.

        If ``inline`` is given, copies that take no longer than waking a copier are added to it. The caller makes them
        once the lock is released.
        """
        for action in actions:
            if isinstance(action, Send):
                self._control.send(action.peer, encode(action.message))
            elif isinstance(action, CopyOut):
                copy = partial(self._copy_out, action, self.core.rooms[action.room].metadata)
                if inline is not None and self._results.should_copy_inline(action):
                    inline.append(copy)
                else:
                    self._results.leave_to_copier(copy)
            elif isinstance(action, Ended):
                self._ended(action)
            elif isinstance(action, TransferEmbeddingChunk | Release):
                raise ConnError(f"unexpected action {type(action).__name__} in a language rank")

    def _ended(self, action: Ended) -> None:
        if not action.success:
            self._results.drop(action.room)
        log_end(action, self.core.rooms[action.room], self._labels.get(action.room, ""))
        self.completions.notify()

    def close(self) -> None:
        """Stop all threads and unlink the segment. For tests and an orderly shutdown."""
        self._control.stop()
        self._thread.join(10)
        self._encoders.close()
        self._results.close()
        self._revoker.shutdown(wait=True)
        self._sessions.close()
        self.pool.close()
        self.completions.close()  # last, because a room that ends until here notifies it
