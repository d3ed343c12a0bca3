"""Owns the data calls of an encoder: their order within a room, and the choice of the thread that makes each.

The transfer workers, several per transfer queue, make the data calls, except for short memory copies, which are made
inline (``_writer``).

Locking: the endpoint's one lock guards the core and the sources. It is held to begin a window and to end it, never
during the data call in between. Meanwhile a lease keeps the link open, and the DataCall keeps the source alive.
"""

from __future__ import annotations

import enum
import logging
import threading
from dataclasses import dataclass
from functools import partial

from sglang_mm_conn.connector.encoder.actions import ActionRunner
from sglang_mm_conn.connector.encoder.links import LinkLease, Links
from sglang_mm_conn.connector.encoder.source import Source
from sglang_mm_conn.connector.runtime import Runtime
from sglang_mm_conn.control.server import ControlServer
from sglang_mm_conn.core.actions import Action, Ended, TransferEmbeddingChunk
from sglang_mm_conn.core.encoder.sender import SenderCore, SenderRoom, WindowWrite
from sglang_mm_conn.core.errors import DataPathError
from sglang_mm_conn.core.layout import Extent, window_extents
from sglang_mm_conn.core.messages import RefusalKind, Refused
from sglang_mm_conn.core.outcomes import LANDED, FailureCode, WriteResult, WriteStatus
from sglang_mm_conn.datapath.base import WriteLink

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class DataCall:
    """One window that is being written: its write, its source and its link."""

    write: WindowWrite
    entry: SenderRoom
    source: Source  # kept alive until the write has returned, which waits for its copies
    lease: LinkLease | None  # keeps the link open until the call has returned
    refusal: str = ""  # why no link is open

    @property
    def link(self) -> WriteLink | None:
        return None if self.lease is None else self.lease.link

    def extents(self) -> list[Extent]:
        """Where the bytes of the window belong in the rank's blocks."""
        write, row_bytes = self.write, self.entry.row_bytes
        first, nbytes = write.first_token * row_bytes, write.tokens * row_bytes
        return window_extents(write.session.geometry, write.blocks, nbytes, first)


class Writer(enum.Enum):
    """Which thread writes the offered windows of a room."""

    CALLER = "caller"  # the thread that completes the room
    CONTROL_THREAD = "control thread"
    WORKER = "worker"


Inline = list[tuple[TransferEmbeddingChunk, Writer]]  # chunks that no worker serves


class Transfer:
    """Makes the data calls of all rooms. The windows of a room are written in order, each once (see ``SenderCore``)."""

    def __init__(
        self,
        lock: threading.Lock,
        core: SenderCore,
        actions: ActionRunner,
        links: Links,
        sources: dict[str, Source],
        control: ControlServer,
        runtime: Runtime,
    ) -> None:
        """``sources``: by room."""
        self._inline_limit_bytes = runtime.inline_limit_bytes
        self._uncontended_inline_limit_bytes = runtime.uncontended_inline_limit_bytes
        self._lock = lock
        self._core = core
        self._actions = actions
        self._links = links
        self._sources = sources
        self._control = control
        self._clock = runtime.clock

    # -- choosing the thread -------------------------------------------------------------------------------------

    def perform(self, actions: list[Action], *, on_control_thread: bool) -> tuple[list[Ended], Inline]:
        """Under the lock: carry ``actions`` out, and queue the chunks that a worker must write.

        Once the lock is released, the caller passes the first list to ``ActionRunner.notify`` and the second to
        ``write_inline``."""
        ended, chunks = self._actions.perform_without_queueing(actions)
        inline: Inline = []
        for chunk in chunks:
            writer = self._writer(chunk, on_control_thread)
            if writer is Writer.WORKER:
                self._actions.queue_chunk(chunk)
            else:
                inline.append((chunk, writer))
        return ended, inline

    def _writer(self, chunk: TransferEmbeddingChunk, on_control_thread: bool) -> Writer:
        """Under the lock. Which thread should write the offered windows of the room.

        They are written inline if every link is synchronous, so that a write is a memory copy that waits for nothing,
        and if one of these holds:

        - the embedding is small, and every rank has offered blocks for all of it;
        - the embedding is uncontended, and its offers are not large in total. With several embeddings, the workers
          write in parallel.

        The control thread makes the inline writes that become possible by a message. The thread that hands an embedding
        over has other work: it writes a small embedding, and leaves every window of a larger one to the control thread.
        """
        entry = self._core.rooms[chunk.room]
        offers = entry.offers
        if not all(self._links.synchronous(session, info.epoch) for session, info in offers):
            return Writer.WORKER
        small = entry.total_tokens * entry.row_bytes <= self._inline_limit_bytes
        whole = all(info.allocated_tokens == entry.total_tokens for _, info in offers)
        alone = len(self._sources) == 1
        if not (alone and entry.offered_bytes <= self._uncontended_inline_limit_bytes) and not (whole and small):
            return Writer.WORKER
        return Writer.CALLER if on_control_thread or small else Writer.CONTROL_THREAD

    def write_inline(self, inline: Inline) -> None:
        """Without the lock: write the chunks that ``perform`` did not queue for a worker."""
        for chunk, writer in inline:
            if writer is Writer.CALLER:
                self._serve(chunk)
            else:
                self._control.call(partial(self._serve, chunk))

    # -- writing -------------------------------------------------------------------------------------------------

    def work(self, index: int) -> None:
        """Serve transfer queue ``index`` until it yields None."""
        while (chunk := self._actions.transfer_queues[index].get()) is not None:
            self._serve(chunk)

    def _serve(self, chunk: TransferEmbeddingChunk) -> None:
        """Write the offered windows of a room. Any failure ends only that room."""
        try:
            while (call := self.begin_window(chunk.room)) is not None:
                self.end_window(call, self.data_call(call))
        except Exception as error:
            logger.exception("Writing windows of room %s failed", chunk.room)
            self.fail(chunk.room, f"{type(error).__name__}: {error}", FailureCode.INTERNAL)

    def begin_window(self, room: str) -> DataCall | None:
        """Begin the next data call for ``room`` and pin its link until ``end_window``. None if nothing can be written
        now."""
        lease, refusal = None, ""
        with self._lock:
            write = self._core.begin_write(room)
            if write is None:
                return None
            entry, source = self._core.rooms[room], self._sources[room]
            try:
                # Pin the link in the same critical section as begin_write. Otherwise a process that is suspended
                # between the two could find a different link under the same name after the old one was revoked.
                lease = self._links.lease(write.session.mooncake_session_id, write.epoch)
            except DataPathError as failure:
                refusal = str(failure)
                self._actions.send(write.session.peer, Refused(reason=refusal, kind=RefusalKind.REGISTER_FIRST))
            return DataCall(write, entry, source, lease, refusal)

    def data_call(self, call: DataCall) -> WriteResult:
        """Without the lock: write the window. Never raises."""
        link = call.link
        if link is None:
            return WriteResult(WriteStatus.FAILED, call.refusal)
        try:
            call.source.ready.synchronize()
        except Exception as failure:
            return WriteResult(WriteStatus.FAILED, f"the embedding was not computed: {failure}")
        try:
            link.write(call.source.rows, call.extents())
        except DataPathError as failure:
            return _failed_write(str(failure), failure.in_doubt)
        except Exception as failure:
            # After an unexpected error it is unknown which bytes the data call wrote, or may still write.
            logger.exception("Data call for room %s failed", call.write.room)
            return _failed_write(f"{type(failure).__name__}: {failure}", not link.synchronous)
        return LANDED

    def end_window(self, call: DataCall, result: WriteResult) -> None:
        """Report the result of ``data_call`` to the core, so that the room continues or ends."""
        if call.lease is not None:
            call.lease.release()
        with self._lock:
            ended = self._actions.perform(self._core.on_written(call.write, result, self._clock()))
        for action in ended:
            if action.success:
                logger.info(
                    "Embedding sent: room=%s tokens=%d windows=%d path=%s ms=%.1f",
                    action.room, call.entry.total_tokens, call.entry.windows,
                    call.link.name if call.link is not None else "none", call.entry.elapsed * 1000,
                )  # fmt: skip
        self._actions.notify(ended)

    def fail(self, room: str, reason: str, code: int) -> None:
        """Fail ``room`` and notify its language ranks."""
        with self._lock:
            ended = self._actions.perform(self._core.fail(room, reason, code, self._clock()))
        self._actions.notify(ended)


def _failed_write(reason: str, in_doubt: bool) -> WriteResult:
    return WriteResult(WriteStatus.IN_DOUBT if in_doubt else WriteStatus.FAILED, reason)
