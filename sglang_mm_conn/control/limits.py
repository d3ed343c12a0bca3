"""What the two control loops share: the time until a tick, and keeping one bad event from ending the thread."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)

# Messages (a frame, or a batch of them) that may wait for one peer. One that does not read loses what is beyond; nobody
# waits for it, and it is dropped for its silence.
HIGH_WATER_MARK = 10_000
# Messages of one peer that are read ahead; the rest waits at the peer, or is lost there. Few, because libzmq counts
# messages, and one may be as long as all metadata of a part.
READ_AHEAD = 16
# Frames, and bytes of them, that are read from one socket before others get their turn.
BATCH = 64
BATCH_BYTES = 1 << 20
# Handling a frame may copy an embedding: others, and peers that wait for an answer, get their turn all the same.
BATCH_SECONDS = 0.005
ANSWER_SECONDS = 0.001


def milliseconds_until(moment: float) -> int:
    """From now until ``moment`` (time.monotonic), rounded up so that a poll does not return just before it."""
    return max(0, math.ceil((moment - time.monotonic()) * 1000))


def guarded(call: Callable[[], None]) -> None:
    """Run ``call``; whatever it raises is logged, and the thread goes on."""
    try:
        call()
    except Exception:
        logger.exception("Control thread: one event failed, going on")
