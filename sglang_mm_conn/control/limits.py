"""Owns the limits of both control loops, the time until a tick, and the guard against a failing callback."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)

# Messages (a frame, or a batch of frames) that may wait for one peer. If a peer does not read, messages beyond the
# limit are dropped. No thread waits for it, and it counts as lost when it has been silent for too long.
HIGH_WATER_MARK = 10_000
# Messages of one peer that libzmq reads ahead. Further ones wait at the peer, or are dropped there. A small number,
# because libzmq counts messages, not bytes, and one message may hold all metadata of a part.
READ_AHEAD = 16
# Frames and bytes that are read from one socket before the loop handles its other work.
BATCH = 64
BATCH_BYTES = 1 << 20
# Handling a frame may copy an embedding. After BATCH_SECONDS the loop handles its other work all the same, and after
# ANSWER_SECONDS it sends the answers that wait.
BATCH_SECONDS = 0.005
ANSWER_SECONDS = 0.001


def milliseconds_until(moment: float) -> int:
    """Milliseconds from now until ``moment`` (time.monotonic), rounded up so that a poll does not return just before
    it."""
    return max(0, math.ceil((moment - time.monotonic()) * 1000))


def guarded(call: Callable[[], None]) -> None:
    """Run ``call``. If it raises, log the error, so that the thread continues."""
    try:
        call()
    except Exception:
        logger.exception("Control thread: one event failed, continuing")
