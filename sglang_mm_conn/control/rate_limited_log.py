"""Owns the rate limit on log lines about a faulty peer.

A peer can send invalid messages faster than the disk can store log lines about them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

LINES = 5
SECONDS = 10.0
_REMEMBERED_PEERS = 1024


@dataclass
class _Account:
    since: float
    lines: int = 0
    left_out: int = 0


class RateLimitedLog:
    """Logs at most LINES lines about one peer per SECONDS. The next line counts those left out. Thread-safe."""

    def __init__(self, logger: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._logger = logger
        self._clock = clock
        self._lock = threading.Lock()
        self._accounts: OrderedDict[str, _Account] = OrderedDict()

    def log(self, peer: str, level: int, text: str, *args: object) -> None:
        """Like ``logger.log(level, text, *args)``."""
        now = self._clock()
        with self._lock:
            account = self._accounts.get(peer)
            if account is None or now - account.since >= SECONDS:
                account = _Account(now, left_out=0 if account is None else account.left_out)
                self._accounts[peer] = account
                self._accounts.move_to_end(peer)
                if len(self._accounts) > _REMEMBERED_PEERS:
                    self._accounts.popitem(last=False)
            if account.lines >= LINES:
                account.left_out += 1
                return
            account.lines += 1
            left_out, account.left_out = account.left_out, 0
        if left_out:
            text, args = text + " (%d lines like it left out)", (*args, left_out)
        self._logger.log(level, text, *args)
