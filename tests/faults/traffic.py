"""Bystanders: rooms between processes that no fault touches, which must arrive, right and in time, all the while."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from sglang_mm_conn.core.states import Poll
from tests.connector.payload import Part
from tests.connector.processes import Encoder, Language, World, wait_for

PAUSE_SECONDS = 0.05
# One window, several rows less than a block, and more than a first offer: with a resume.
SIZES = (900, 10, 1500)


class Route:
    """A thread that sends one room after another from ``encoder`` to ``language``."""

    def __init__(self, world: World, encoder: Encoder, language: Language, deadline: float) -> None:
        self.rooms = 0
        self.slowest = 0.0
        self.problem = ""
        self.language = language
        self._world = world
        self._encoder = encoder
        self._deadline = deadline
        self._stopping = threading.Event()
        self._turn = threading.Lock()
        self._thread = threading.Thread(target=self._run, daemon=True, name="bystander")
        self._thread.start()

    def _run(self) -> None:
        for tokens in itertools.cycle(SIZES):
            if self._stopping.wait(PAUSE_SECONDS) or self.problem:
                return
            with self._turn:
                began = time.monotonic()
                try:
                    one_room(self._world, self._encoder, self.language, tokens, self._deadline)
                except Exception as error:
                    self.problem = f"bystander room failed: {type(error).__name__}: {str(error)[-500:]}"
                self.slowest = max(self.slowest, time.monotonic() - began)
                self.rooms += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """No room is under way in here."""
        with self._turn:
            yield

    def one_more(self) -> None:
        """Wait until a room that begins after this call has ended. Raises AssertionError where none does."""
        seen = self.rooms + 1  # one may be under way
        wait_for(lambda: self.rooms > seen or self.problem, "a bystander room ends", 3 * self._deadline)

    def halt(self) -> None:
        """No further room."""
        self._stopping.set()

    def stop(self) -> None:
        """Raises AssertionError where a room was not right or never ended."""
        self.halt()
        self._thread.join(3 * self._deadline)
        assert not self._thread.is_alive(), "a bystander room never ended"
        assert not self.problem, self.problem


def one_room(world: World, encoder: Encoder, language: Language, tokens: int, timeout: float) -> None:
    """Assert that a new room arrives with the right bytes within ``timeout``; both sides forget it."""
    part: Part = world.part(language, tokens)
    language.expect(part, encoder, timeout)
    encoder.offer(part)
    ended = language.wait_end(part, timeout + 5)
    assert ended is Poll.Success, language.outcome(part)
    assert language.call("take", room=part.room) == part.expected(), f"WRONG BYTES in room {part.room}"
    language.forget(part)
    encoder.wait_ended(part, timeout)
    encoder.call("forget", room=part.room)
