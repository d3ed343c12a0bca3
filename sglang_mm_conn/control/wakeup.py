"""Owns an eventfd that one thread waits on and any thread may notify."""

from __future__ import annotations

import contextlib
import os
import threading


class Wakeup:
    """Any thread calls ``notify()``. The waiter polls ``fileno()`` and calls ``clear()`` before it looks for work."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        # Reentrant: a finalizer may call ``notify`` while its thread is inside ``notify``.
        self._lock = threading.RLock()
        self._closed = False
        self._notified = False

    def fileno(self) -> int:
        return self._fd

    def notify(self) -> None:
        """Wake the waiter. Costs a system call only for the first notification since ``clear``."""
        if self._notified:
            return  # the waiter has yet to look for work, and will find what was added before this call
        with self._lock, contextlib.suppress(BlockingIOError):
            if not self._closed:  # after ``close`` the descriptor may belong to another file
                self._notified = True
                os.eventfd_write(self._fd, 1)

    def clear(self) -> None:
        with self._lock, contextlib.suppress(BlockingIOError):
            if not self._closed:
                os.eventfd_read(self._fd)
        # Reset the flag after the read. A notification between the two is skipped, but the waiter is about to look for
        # its work anyway. In the other order, the read could consume the write of such a notification and leave the
        # flag set: every later notification would be skipped.
        self._notified = False

    def close(self) -> None:
        """May be called again: the descriptor is closed once, for later it may belong to another file."""
        with self._lock:
            if not self._closed:
                self._closed = True
                os.close(self._fd)
