"""An eventfd that one thread waits on and any other may notify."""

from __future__ import annotations

import contextlib
import os
import threading


class Wakeup:
    """Ring from any thread; the waiter polls ``fileno()`` and calls ``clear()`` before it looks for work."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        # Reentrant: a finalizer may notify in the middle of a notify.
        self._lock = threading.RLock()
        self._closed = False
        self._notified = False

    def fileno(self) -> int:
        return self._fd

    def notify(self) -> None:
        """Costs a system call only where nobody has notified since the waiter last cleared it."""
        if self._notified:
            return  # the waiter has not looked for work yet, and will see what was added before this call
        with self._lock, contextlib.suppress(BlockingIOError):
            if not self._closed:  # the descriptor may be somebody else's by then
                self._notified = True
                os.eventfd_write(self._fd, 1)

    def clear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._fd)
        # After the read: a notification that comes between the two is dropped, and the waiter looks for its work now.
        # The other way round its write would be read away here and every later notification be dropped.
        self._notified = False

    def close(self) -> None:
        with self._lock:
            self._closed = True
            os.close(self._fd)
