"""Owns the wait of a request for its parts: which room of each part is current, and what the dispatcher is asked. Pure.

If a room fails for no fault of the input, the dispatcher decides: it names another encoder and room for the part
(``redispatch``), or gives the request up. Until then the request waits, within its deadline.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from sglang_mm_conn.core.dispatch.actions import Redispatched
from sglang_mm_conn.core.dispatch.reports import RoomFailed, room_failed
from sglang_mm_conn.core.dispatch.verdicts import may_be_tried_again
from sglang_mm_conn.core.errors import TransferFailed
from sglang_mm_conn.core.states import Poll

ASK_AGAIN_SECONDS = 1.0  # a report may be lost


class ExpectedRoom(Protocol):
    """A room that the request waits for, as ``EmbeddingReceiver`` is one."""

    @property
    def room(self) -> str:
        """Its name."""

    def poll(self) -> Poll:
        """Its state."""

    def failure_exception(self) -> None:
        """Raise TransferFailed if it has failed."""

    def clear(self) -> None:
        """Give it up, and forget it."""


Room = TypeVar("Room", bound=ExpectedRoom)


class WaitingParts(Generic[Room]):
    """The rooms of one request on one rank.

    Attributes:
        rooms: the current room of each part, by its number. Empty once the request is over on this rank.
    """

    def __init__(
        self, expect: Callable[[str, str], Room], report: Callable[[RoomFailed], None] | None, patience: float
    ) -> None:
        """
        Args:
            expect: begins to wait for a room of an encoder (URL, room).
            report: tells the dispatcher; None: this rank cannot. What fails a part on every rank is told by another.
            patience: without ``report``, how many seconds after the failure of a room the request fails, too.
        """
        self.rooms: list[Room] = []
        self._expect = expect
        self._report = report
        self._patience = patience
        self._asked: dict[str, float] = {}  # failed rooms: when the dispatcher is told again, or patience ends

    def expect(self, url: str, room: str) -> None:
        """Wait for the next part."""
        self.rooms.append(self._expect(url, room))

    def redispatch(self, news: Redispatched) -> bool:
        """A part comes from another encoder, in another room. Returns False if the request is over on this rank.

        Raises ConnError if this rank cannot wait for that room.
        """
        if not 0 <= news.part < len(self.rooms):
            return False
        self.rooms[news.part].clear()
        self.rooms[news.part] = self._expect(news.url, news.room)
        return True

    def arrived(self, now: float) -> bool:
        """Whether every part has arrived. Tells the dispatcher of rooms that have failed.

        Raises TransferFailed if the request has failed with one of them.
        """
        states = [room.poll() for room in self.rooms]
        for room, state in zip(self.rooms, states, strict=True):
            if state is Poll.Failed:
                self._ask_about(room, now)
        return all(state is Poll.Success for state in states)

    def _ask_about(self, failed: Room, now: float) -> None:
        try:
            failed.failure_exception()
        except TransferFailed as error:
            if not may_be_tried_again(error.code):
                raise
            if self._report is None:
                if now > self._asked.setdefault(error.room, now + self._patience):
                    raise
            elif now >= self._asked.get(error.room, now):
                self._asked[error.room] = now + ASK_AGAIN_SECONDS
                self._report(room_failed(error.room, error.code, error.reason))

    def clear(self) -> None:
        """The request is over: give up and forget its rooms."""
        for room in self.rooms:
            room.clear()
        self.rooms = []
