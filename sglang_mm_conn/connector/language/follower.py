"""A language rank that is not the first of its host: it reads what that rank, its leader, receives.

It awaits the same rooms under the same names as the leader (connector.language), but has no pool, no session and no
socket. Who holds the memory:

- the leader's process makes the result, and gives it its name when every row is in it;
- from its first successful ``poll`` of a room on, this process has the result mapped, whatever the leader does;
- the leader takes the name away when it forgets the room. It must not do so before every rank of its host has mapped
  the result or given the room up; sglang's ranks agree on that in every tick (sglang_plugin.scheduler).

A leader that fails, or dies, never publishes: the room ends here at its deadline, or when the ranks agree.
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

from sglang_mm_conn.connector.metadata import dtype_of
from sglang_mm_conn.connector.runtime import Runtime
from sglang_mm_conn.control.wakeup import Wakeup
from sglang_mm_conn.core.errors import ConnError, ProtocolError
from sglang_mm_conn.core.outcomes import SUCCEEDED, FailureCode, Outcome
from sglang_mm_conn.core.settings import Settings
from sglang_mm_conn.core.states import Poll
from sglang_mm_conn.memory.results import Contents, fault_in, read_result

logger = logging.getLogger(__name__)

Value = TypeVar("Value")


@dataclass
class _Room:
    """One room; ``outcome`` where it failed, ``result`` where it succeeded."""

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
    """One per language rank that does not lead its host; in the shape of a LanguageEndpoint."""

    def __init__(
        self, settings: Settings, *, rank: int = 1, host_index: int = 0, runtime: Runtime | None = None
    ) -> None:
        """``rank``: for logs. ``host_index``: as the leader's results have it (memory.results)."""
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
        """The leader connects to encoders, this rank does not."""

    def expect(self, room: str, encoder: str, timeout: float, label: str) -> None:
        """A request waits for ``room`` for ``timeout`` seconds. ``label`` and ``encoder`` are for logs."""
        now = self._clock()
        with self._lock:
            if room in self._rooms:
                raise ConnError(f"room {room} was expected before")
            self._rooms[room] = _Room(encoder, label, now, now + timeout)

    def poll(self, room: str) -> Poll:
        """Looks for the leader's result: one ``open`` as long as it is not there. Raises ConnError where the room is
        unknown.

        Success means that the result is mapped here. No row is touched: that is left to ``take``.
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
                room, entry, f"rank {self._rank} cannot read what its leader received: {error}", FailureCode.INTERNAL
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
                room, entry, f"rank {self._rank} got nothing from its leader in {waited:.1f} s", FailureCode.TIMED_OUT
            )

    def _fail(self, room: str, entry: _Room, reason: str, code: int) -> None:
        entry.outcome = Outcome(reason, code)
        logger.warning(
            "Embedding failed: room=%s rid=%s peer=%s code=%d reason=%s", room, entry.label, entry.encoder, code, reason
        )

    def outcome(self, room: str) -> Outcome:
        """Why the room failed."""
        return self._room(room).outcome or SUCCEEDED

    def take(self, room: str) -> tuple[torch.Tensor, bytes]:
        """The embedding [tokens, width] and metadata of a room that ended in Success; the memory is the caller's.

        Touches every page, so not for the scheduler's tick.
        """
        result = self._room(room).result
        if result is None:
            raise ConnError(f"room {room} has no embedding to take")
        rows, contents = result
        fault_in(rows)
        return rows.view(dtype_of(contents.dtype)).reshape(contents.tokens, -1), contents.metadata

    def abort(self, room: str, reason: str, code: int = FailureCode.ABORTED) -> None:
        """Give the room up. The leader tells the encoder, and the log."""
        with self._lock:
            entry = self._rooms.get(room)
            if entry is not None and entry.poll() is Poll.Bootstrapping:
                entry.outcome = Outcome(reason, code)

    def resume_transfer(self, room: str, embedding_indices: list[int], sent_tokens: int, allocated_tokens: int) -> None:
        """Only the leader has blocks to offer."""
        raise ConnError(f"room {room}: rank {self._rank} has no blocks, its leader offers them")

    def forget(self, room: str) -> None:
        """Drop what is kept of the room. Whoever took its rows keeps them."""
        with self._lock:
            self._rooms.pop(room, None)

    def report(self) -> dict[str, Any]:
        """For operators: rooms by what a poll of them says. The leader reports the pool."""
        with self._lock:
            return {"rooms": dict(Counter(entry.poll().name.lower() for entry in self._rooms.values()))}

    def submit(self, work: Callable[[], Value]) -> Future[Value]:
        """Run something large off the caller's thread; notifies ``completions`` when it is done."""
        future = self._readers.submit(work)
        future.add_done_callback(lambda _: self.completions.notify())
        return future

    def _room(self, room: str) -> _Room:
        entry = self._rooms.get(room)
        if entry is None:
            raise ConnError(f"room {room} is unknown here")
        return entry

    def close(self) -> None:
        """Stop the threads; for tests and orderly shutdown."""
        self._readers.shutdown(wait=True)
