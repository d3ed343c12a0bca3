"""An eventfd that one thread waits on and any other may ring."""

from __future__ import annotations

import contextlib
import os
import threading


class Wakeup:
    """Ring from any thread; the waiter polls ``fileno()`` and calls ``clear()`` before it looks for work."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lock = threading.Lock()
        self._closed = False

    def fileno(self) -> int:
        return self._fd

    def ring(self) -> None:
        with self._lock, contextlib.suppress(BlockingIOError):
            if not self._closed:  # the descriptor may be somebody else's by then
                os.eventfd_write(self._fd, 1)

    def clear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._fd)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            os.close(self._fd)
