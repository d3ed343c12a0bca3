"""Owns the frames of a control loop, on either side: sends the queued ones, handles the received ones in batches."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial

import zmq

from sglang_mm_conn.control.batches import batches, frames_in
from sglang_mm_conn.control.limits import ANSWER_SECONDS, BATCH, BATCH_BYTES, BATCH_SECONDS, guarded
from sglang_mm_conn.control.rate_limited_log import RateLimitedLog
from sglang_mm_conn.core.errors import ProtocolError

logger = logging.getLogger(__name__)

Received = tuple[str, list[bytes], int]  # the peer, the parts of its message, the message's bytes


class Traffic:
    """``put`` may be called from any thread, everything else only from the loop."""

    def __init__(
        self,
        send: Callable[[str, bytes], None],
        on_frame: Callable[[str, bytes], None],
        rate_limited_log: RateLimitedLog,
    ) -> None:
        """``send(peer, batch)`` must never wait. It may raise ZMQError."""
        self._send = send
        self._on_frame = on_frame
        self._rate_limited_log = rate_limited_log
        self._outbox: deque[tuple[str, bytes]] = deque()

    def put(self, peer: str, frame: bytes) -> None:
        """Queue ``frame`` for ``peer``, in the order of the calls."""
        self._outbox.append((peer, frame))

    def flush(self) -> None:
        """Send the queued frames. Frames for a peer that is gone are dropped."""
        for peer, batch in batches(self._outbox):
            try:
                self._send(peer, batch)
            except zmq.ZMQError as error:
                # EHOSTUNREACH: the peer is gone. EAGAIN: it is down, or does not read. Its silence reveals both.
                logger.debug("Control messages to %s dropped: %s", peer, error)

    def process_batch(self, received: Iterable[Received]) -> None:
        """Handle messages of one socket until none is left, or the limits on one batch are reached."""
        count = nbytes = 0
        until = time.monotonic() + BATCH_SECONDS
        for peer, parts, size in received:
            nbytes += size
            count += self._take(peer, parts)
            self.flush()  # the peer handles these answers while this side makes the next
            if count >= BATCH or nbytes >= BATCH_BYTES or time.monotonic() >= until:
                return

    def _take(self, peer: str, parts: list[bytes]) -> int:
        """Handle the frames of one message. Returns their number."""
        try:
            if len(parts) != 1:
                raise ProtocolError(f"a message of {len(parts)} parts")
            frames = frames_in(parts[0])
        except ProtocolError as error:
            self._rate_limited_log.log(peer, logging.WARNING, "Control message from %s dropped: %s", peer, error)
            return 1
        answer_at = time.monotonic() + ANSWER_SECONDS
        for frame in frames:
            guarded(partial(self._on_frame, peer, frame))
            if time.monotonic() > answer_at:
                self.flush()
                answer_at = time.monotonic() + ANSWER_SECONDS
        return len(frames)
