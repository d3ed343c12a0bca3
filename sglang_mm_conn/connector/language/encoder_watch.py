"""Owns the watch over encoders: tells one watcher how they stand, at each change and once a second."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from sglang_mm_conn.core.dispatch.fleet import EncoderStanding

EncoderWatcher: TypeAlias = Callable[[list[EncoderStanding]], None]

_REPEAT_SECONDS = 1.0


class EncoderWatch:
    """The control thread calls ``look`` in every tick.

    Attributes:
        watcher: whom to tell; None: nobody, and nothing is looked at.
    """

    def __init__(self) -> None:
        self.watcher: EncoderWatcher | None = None
        self._told: list[EncoderStanding] = []
        self._repeat_at = 0.0

    def look(self, standings: Callable[[], list[EncoderStanding]], now: float) -> None:
        """Tell the watcher if something has changed or a second has passed."""
        if self.watcher is None:
            return
        current = standings()
        if current != self._told or now >= self._repeat_at:
            self._told, self._repeat_at = current, now + _REPEAT_SECONDS
            self.watcher(current)
