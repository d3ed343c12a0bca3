"""Owns a language rank's results: their memory, the copies into it, the copier threads, the log line of each.

``Results`` returns the result of each copy, and the endpoint reports it to the core. The endpoint's lock guards the
table; it is never held during a copy.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from sglang_mm_conn.connector.metadata import dtype_of
from sglang_mm_conn.connector.runtime import Runtime
from sglang_mm_conn.core.actions import CopyOut, Ended
from sglang_mm_conn.core.errors import MemoryUnavailable, ProtocolError
from sglang_mm_conn.core.language.receiver import ReceiverRoom
from sglang_mm_conn.core.outcomes import FailureCode
from sglang_mm_conn.core.settings import Settings
from sglang_mm_conn.memory.buffer_cache import BufferCache
from sglang_mm_conn.memory.device import Device
from sglang_mm_conn.memory.pool import BlockPool
from sglang_mm_conn.memory.results import Contents, PrivateResult, Result, ResultMaker, ViewResult

logger = logging.getLogger(__name__)

_ALIGNMENT = 16  # of memory in which a tensor of any dtype may begin

Value = TypeVar("Value")


class ResultMemory:
    """Makes results: in host memory from the buffer cache, in GPU memory, or with another ``make``."""

    def __init__(self, settings: Settings, device: Device, make: ResultMaker) -> None:
        """Raises MemoryUnavailable."""
        private = make is PrivateResult
        on_gpu = settings.resolved_embedding_device != "cpu"
        if on_gpu and not private:
            raise MemoryUnavailable(
                f"SGLANG_MM_CONN_EMBEDDING_DEVICE={settings.resolved_embedding_device}: ranks share results in host "
                "memory, set it to cpu"
            )
        # Not with a GPU: the control thread must not wait for it, and when the last tensor of a view is released, a
        # copy from its blocks to the GPU may still be under way.
        self.allows_inline_and_views = private and device.synchronous
        self._buffer_cache = BufferCache(settings.result_cache_bytes)
        empty = self._buffer_cache.tensor
        if on_gpu:  # torch caches GPU memory itself
            empty = partial(device.empty, memory_device=settings.resolved_embedding_device)
        self.make: ResultMaker = partial(PrivateResult, empty=empty) if private else make

    def trim(self) -> None:
        """Return cached memory above the limit to the system."""
        self._buffer_cache.trim()


@dataclass(frozen=True, slots=True)
class Copied:
    """The result of a copy. ``error`` is empty if every row is in place; ``code`` says whose fault it is (a
    FailureCode). ``view``: the rows stay in their blocks.

    ``rows`` keeps a view alive. Hold it until the view was reported to the core: otherwise the view may be released
    before the core has recorded it.
    """

    error: str
    code: int
    view: bool
    rows: torch.Tensor | None


class Results:
    """Holds the result of every room, from its first copy until it is dropped."""

    def __init__(
        self, settings: Settings, memory: ResultMemory, pool: BlockPool, *, lock: threading.Lock, runtime: Runtime
    ) -> None:
        """``lock``: the endpoint's lock."""
        self._settings = settings
        self._memory = memory
        self._pool = pool
        self._lock = lock
        self._device = runtime.device
        self._inline_limit_bytes = runtime.inline_limit_bytes if memory.allows_inline_and_views else 0
        self._results: dict[str, Result] = {}
        self._copiers = runtime.executor(settings.copiers, "mm-conn-copier")

    @property
    def view_blocks(self) -> int:
        """How many blocks views may hold together."""
        geometry = self._pool.geometry
        if not self._memory.allows_inline_and_views or geometry.block_bytes % _ALIGNMENT != 0:
            return 0
        return geometry.blocks * self._settings.view_percent // 100

    def __len__(self) -> int:
        return len(self._results)

    def should_copy_inline(self, copy: CopyOut) -> bool:
        """Whether ``copy`` takes no longer than waking a copier.

        A view copies nothing, whatever its size. A checksum reads the whole embedding after the last window.
        """
        if copy.view and not self._settings.checksum:
            return self._inline_limit_bytes > 0
        tokens = copy.total_tokens if copy.last and self._settings.checksum else copy.tokens
        return tokens * copy.row_bytes <= self._inline_limit_bytes

    # -- without the lock ----------------------------------------------------------------------------------------

    def leave_to_copier(self, work: Callable[[], object]) -> None:
        """Run ``work`` as soon as a copier is free."""
        self._copiers.submit(work)

    def submit(self, work: Callable[[], Value], done: Callable[[], None]) -> Future[Value]:
        """Run ``work``, which makes tensors from results, on a copier. Calls ``done`` when they are complete."""

        def finish() -> Value:
            value = work()
            if self._settings.resolved_embedding_device != "cpu":
                self._device.drain()  # so that work on any stream may read what it made
            return value

        future = self._copiers.submit(finish)
        future.add_done_callback(lambda _: done())
        return future

    def copy_out(self, copy: CopyOut, metadata: bytes, on_view_released: Callable[[], None]) -> Copied:
        """Copy the rows of a window into the room's result, which the first copy creates. Takes the lock.

        If the result is a view, ``on_view_released`` is called once nothing refers to it: see memory.buffer_cache.
        """
        rows, view, code = None, False, FailureCode.INTERNAL  # the encoder's fault
        try:
            rows = self._result_of(copy, metadata, on_view_released).rows
            view = copy.view
            if not view:
                first, nbytes = copy.first_token * copy.row_bytes, copy.tokens * copy.row_bytes
                self._pool.read(copy.blocks, rows, nbytes, first)
            error = self._checksum_error(rows, copy.checksum) if copy.last and self._settings.checksum else ""
        except Exception as failure:
            logger.exception("Copying rows of room %s failed", copy.room)
            error = f"{type(failure).__name__}: {failure}"
            if not isinstance(failure, ProtocolError):
                code = FailureCode.RANK_FAILED
        return Copied(error, code, view, rows)

    def _result_of(self, copy: CopyOut, metadata: bytes, on_view_released: Callable[[], None]) -> Result:
        with self._lock:
            result = self._results.get(copy.room)
        if result is None:
            if (copy.row_bytes % dtype_of(copy.dtype).itemsize) != 0:
                raise ProtocolError(f"a row of {copy.row_bytes} bytes is not a whole number of {copy.dtype} values")
            nbytes = copy.total_tokens * copy.row_bytes
            if copy.view:
                result = ViewResult(self._pool.view(copy.blocks, nbytes, on_view_released))
            else:
                result = self._memory.make(copy.room, Contents(copy.total_tokens, copy.dtype, nbytes, metadata))
            with self._lock:
                self._results[copy.room] = result
        return result

    def _checksum_error(self, rows: torch.Tensor, expected: int | None) -> str:
        if expected is None:
            return "the encoder sent no checksum: set SGLANG_MM_CONN_CHECKSUM=1 on the encoder too"
        actual = self._device.checksum(rows)
        return "" if actual == expected else f"received checksum {actual:#010x}, expected {expected:#010x}"

    def trim(self) -> None:
        """Return cached memory above the limit to the system."""
        self._memory.trim()

    def close(self) -> None:
        """Wait for the copiers and drop every result. Takes the lock."""
        self._copiers.shutdown(wait=True)
        with self._lock:
            for room in list(self._results):
                self.drop(room)

    # -- under the lock ------------------------------------------------------------------------------------------

    def rows(self, room: str) -> torch.Tensor | None:
        """The rows (uint8, one dimension) of the room's result; None if it has no result."""
        result = self._results.get(room)
        return None if result is None else result.rows

    def publish(self, room: str) -> str:
        """Publish the room's result, whose rows are all in place. Under the lock, so that a dropped result gets no
        name. Returns why that failed, or an empty text."""
        try:
            self._results[room].publish()
        except OSError as error:
            return f"the result could not be shared with the other ranks: {error}"
        return ""

    def drop(self, room: str) -> None:
        """Drop the room's result. Rows that were taken stay valid."""
        result = self._results.pop(room, None)
        if result is not None:
            result.close()


def embedding_of(rows: torch.Tensor, tokens: int, dtype: str) -> torch.Tensor:
    """``rows`` as [tokens, width], without a copy."""
    return rows.view(dtype_of(dtype)).reshape(tokens, -1)


def log_end(action: Ended, entry: ReceiverRoom, label: str) -> None:
    """Log one line for an embedding that was received or has failed."""
    if not action.success:
        logger.warning(
            "Embedding failed: room=%s rid=%s peer=%s code=%d reason=%s",
            action.room, label, entry.peer.incarnation if entry.peer is not None else entry.encoder,
            action.code, action.reason,
        )  # fmt: skip
        return
    nbytes = entry.total_tokens * entry.row_bytes
    seconds = max(entry.elapsed, 1e-9)
    logger.info(
        "Embedding received: room=%s rid=%s tokens=%d bytes=%d windows=%d resumes=%d path=%s ms=%.1f "
        "rate=%.1fMB/s wait_ms=%.1f",
        action.room, label, entry.total_tokens, nbytes, entry.window + 1, entry.resumes,
        entry.peer.data_path if entry.peer is not None else "none", seconds * 1000, nbytes / seconds / 1e6,
        (entry.ended - entry.started) * 1000,
    )  # fmt: skip
