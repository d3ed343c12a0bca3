"""Permits of a link, in the order of arrival."""

from __future__ import annotations

import threading
from collections import deque


class FairSemaphore:
    """A semaphore of ``count`` permits that serves waiting threads in the order of their arrival. A large write takes
    many permits one after the other; with an unfair semaphore the small writes would wait until it ends."""

    def __init__(self, count: int) -> None:
        self._lock = threading.Lock()
        self._free = count
        self._waiting: deque[threading.Event] = deque()

    def acquire(self, *, wait: bool) -> bool:
        """Whether the caller has a permit now; with ``wait`` it waits until it has."""
        with self._lock:
            if self._free:
                self._free -= 1
                return True
            if not wait:
                return False
            handed_over = threading.Event()
            self._waiting.append(handed_over)
        return handed_over.wait()

    def release(self) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().set()
            else:
                self._free += 1
