"""An eventfd that one thread waits on and any other may ring."""

from __future__ import annotations

import contextlib
import os


class Wakeup:
    """Ring from any thread; the waiter polls ``fileno()`` and calls ``clear()`` before it looks for work."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def fileno(self) -> int:
        return self._fd

    def ring(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_write(self._fd, 1)

    def clear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._fd)

    def close(self) -> None:
        os.close(self._fd)
