"""Owns the semaphore that limits the batches of a link, and serves threads in the order of their arrival."""

from __future__ import annotations

import threading
from collections import deque


class FairSemaphore:
    """A semaphore with ``count`` permits that serves waiting threads in the order of their arrival.

    A large write acquires many permits one after the other. With an unfair semaphore, small writes would wait until the
    large one ends."""

    def __init__(self, count: int) -> None:
        self._lock = threading.Lock()
        self._free = count
        self._waiting: deque[threading.Event] = deque()

    def acquire(self, *, wait: bool) -> bool:
        """Acquire a permit. Returns whether the caller has one; with ``wait``, this waits until it has."""
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
