"""Owns the watch over encoders: tells one watcher the status of each, at each change and once a second."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from sglang_mm_conn.core.dispatch.encoders import EncoderStatus

EncoderWatcher: TypeAlias = Callable[[list[EncoderStatus]], None]

_REPEAT_SECONDS = 1.0


class EncoderWatch:
    """The control thread calls ``look`` in every tick.

    Attributes:
        watcher: whom to tell; None: nobody, and nothing is looked at.
    """

    def __init__(self) -> None:
        self.watcher: EncoderWatcher | None = None
        self._told: list[EncoderStatus] = []
        self._repeat_at = 0.0

    def look(self, statuses: Callable[[], list[EncoderStatus]], now: float) -> None:
        """Tell the watcher if something has changed or a second has passed."""
        if self.watcher is None:
            return
        current = statuses()
        if current != self._told or now >= self._repeat_at:
            self._told, self._repeat_at = current, now + _REPEAT_SECONDS
            self.watcher(current)
