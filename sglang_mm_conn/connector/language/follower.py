"""Owns the endpoint of a follower: a language rank that reads the results of its host's first rank, the leader.

It waits for the same rooms under the same names as the leader (connector.language), but has no pool, no session and no
socket. Who holds the memory of a result:

- The leader's process creates the result, and gives it a name when every row is in it.
- Once a ``poll`` of the room has returned Success, this process has mapped the result. It stays mapped, whatever the
  leader does.
- The leader removes the name when it forgets the room. It must not do so before every rank of its host has mapped the
  result or given the room up. sglang's ranks agree on that in every tick (sglang_plugin.scheduler).

If the leader fails or dies, it never publishes. The room then ends here at its deadline, or when the ranks agree on it.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from sglang_mm_conn.connector.language.encoder_watch import EncoderWatcher
from sglang_mm_conn.connector.metadata import dtype_of
from sglang_mm_conn.connector.runtime import Runtime
from sglang_mm_conn.control.wakeup import Wakeup
from sglang_mm_conn.core.errors import ConnError, ProtocolError
from sglang_mm_conn.core.outcomes import SUCCEEDED, FailureCode, Outcome, failure
from sglang_mm_conn.core.settings import Settings
from sglang_mm_conn.core.states import Poll
from sglang_mm_conn.memory.results import Contents, fault_in, read_result

logger = logging.getLogger(__name__)

Value = TypeVar("Value")


@dataclass
class _Room:
    """One room. ``outcome`` is set if it failed, ``result`` if it succeeded."""

    encoder: str
    label: str
    started: float
    deadline: float
    outcome: Outcome | None = None
    result: tuple[torch.Tensor, Contents] | None = None

    def poll(self) -> Poll:
        if self.outcome is not None:
            return Poll.Failed
        return Poll.Bootstrapping if self.result is None else Poll.Success


class FollowerEndpoint:
    """One per language rank that does not lead its host. It has the methods of a LanguageEndpoint."""

    def __init__(
        self, settings: Settings, *, rank: int = 1, host_index: int = 0, runtime: Runtime | None = None
    ) -> None:
        """``rank``: for logs. ``host_index``: number of the host, part of the names of the leader's results."""
        runtime = runtime or Runtime()
        self.settings = settings
        self._rank = rank
        self._host_index = host_index
        self._clock = runtime.clock
        self._lock = threading.Lock()
        self._rooms: dict[str, _Room] = {}
        self.completions = Wakeup()  # notified when work given to ``submit`` is done
        self._readers = runtime.executor(settings.copiers, "mm-conn-reader")

    def use_encoder(self, url: str) -> None:
        """Do nothing: only the leader connects to encoders."""

    def expect(self, room: str, encoder: str, timeout: float, label: str) -> None:
        """Wait for ``room`` for ``timeout`` seconds. ``label`` and ``encoder`` are for logs."""
        now = self._clock()
        with self._lock:
            if room in self._rooms:
                raise ConnError(f"room {room} was expected before")
            self._rooms[room] = _Room(encoder, label, now, now + timeout)

    def poll(self, room: str) -> Poll:
        """The state of ``room``. Success means that this process has mapped the leader's result.

        As long as the leader has not published, each poll costs one ``open``. It touches no row: ``take`` does. Raises
        ConnError if the room is unknown.
        """
        with self._lock:
            entry = self._room(room)
            if entry.poll() is Poll.Bootstrapping:
                self._look(room, entry)
            return entry.poll()

    def _look(self, room: str, entry: _Room) -> None:
        try:
            entry.result = read_result(room, self._host_index)
        except (OSError, ValueError, ProtocolError) as error:
            self._fail(
                room, entry, f"rank {self._rank} cannot read its leader's result: {error}", FailureCode.RANK_FAILED
            )
            return
        now = self._clock()
        if entry.result is not None:
            contents = entry.result[1]
            logger.info(
                "Embedding shared: room=%s rid=%s tokens=%d bytes=%d rank=%d ms=%.1f",
                room, entry.label, contents.tokens, contents.nbytes, self._rank, (now - entry.started) * 1000,
            )  # fmt: skip
        elif now >= entry.deadline:
            waited = now - entry.started
            self._fail(
                room, entry, f"rank {self._rank} got no result from its leader in {waited:.1f} s", FailureCode.TIMED_OUT
            )

    def _fail(self, room: str, entry: _Room, reason: str, code: int) -> None:
        entry.outcome = failure(reason, code)
        logger.warning(
            "Embedding failed: room=%s rid=%s peer=%s code=%d reason=%s", room, entry.label, entry.encoder, code, reason
        )

    def outcome(self, room: str) -> Outcome:
        """The outcome of an ended room: why it failed, or SUCCEEDED."""
        return self._room(room).outcome or SUCCEEDED

    def take(self, room: str) -> tuple[torch.Tensor, bytes]:
        """The embedding [tokens, width] and metadata of a room that ended in Success. The caller may keep the memory.

        This touches every page, so the scheduler's tick must not call it.
        """
        result = self._room(room).result
        if result is None:
            raise ConnError(f"room {room} has no embedding to take")
        rows, contents = result
        fault_in(rows)
        return rows.view(dtype_of(contents.dtype)).reshape(contents.tokens, -1), contents.metadata

    def abort(self, room: str, reason: str, code: int = FailureCode.ABORTED) -> None:
        """Give the room up. The leader notifies the encoder and writes the log line."""
        with self._lock:
            entry = self._rooms.get(room)
            if entry is not None and entry.poll() is Poll.Bootstrapping:
                entry.outcome = failure(reason, code)

    def watch_encoders(self, watcher: EncoderWatcher) -> None:
        """Does nothing: only the leader has connections to encoders."""

    def resume_transfer(self, room: str, embedding_indices: list[int], sent_tokens: int, allocated_tokens: int) -> None:
        """Raises ConnError: only the leader has blocks to offer."""
        raise ConnError(f"room {room}: rank {self._rank} has no blocks, its leader offers them")

    def forget(self, room: str) -> None:
        """Drop everything that is kept for the room. Rows that were taken stay valid."""
        with self._lock:
            self._rooms.pop(room, None)

    def report(self) -> dict[str, Any]:
        """A report for operators: the number of rooms in each state. The leader reports the pool."""
        with self._lock:
            return {"rooms": dict(Counter(entry.poll().name.lower() for entry in self._rooms.values()))}

    def submit(self, work: Callable[[], Value]) -> Future[Value]:
        """Run ``work`` on another thread and notify ``completions`` when it is done."""
        future = self._readers.submit(work)
        future.add_done_callback(lambda _: self.completions.notify())
        return future

    def _room(self, room: str) -> _Room:
        entry = self._rooms.get(room)
        if entry is None:
            raise ConnError(f"room {room} is unknown to this rank")
        return entry

    def close(self) -> None:
        """Stop the threads. For tests and an orderly shutdown."""
        self._readers.shutdown(wait=True)
        self.completions.close()  # last, because work that ends until here notifies it
