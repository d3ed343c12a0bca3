"""Frames that are ready at the same time travel together: each message of a socket costs both ends system calls, and
waits for the GIL."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Annotated

import msgspec

from sglang_mm_conn.core.errors import ProtocolError

# Few, so that the peer works on the first ones while the next are made: 64 small rooms on their way were faster so than
# with frames that travel alone, with four in a batch, and with any number (bench, the rooms/s of 64 KiB).
MOST_FRAMES = 16
# A longer frame travels alone, so that no batch is longer than the longest frame.
MOST_BYTES = 32 << 10
# A batch begins with it, a frame with the protocol's version.
_MARK = b"\xff"
_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(Annotated[list[bytes], msgspec.Meta(min_length=2, max_length=MOST_FRAMES)])


def batches(outbox: deque[tuple[str, bytes]]) -> Iterator[tuple[str, bytes]]:
    """Empties ``outbox`` of (peer, frame), and tells what to send to whom; each peer's frames keep their order."""
    frames_to: dict[str, list[bytes]] = {}
    while outbox:
        peer, frame = outbox.popleft()
        frames_to.setdefault(peer, []).append(frame)
    for peer, frames in frames_to.items():
        batch: list[bytes] = []
        nbytes = 0
        for frame in frames:
            nbytes += len(frame)
            if batch and (len(batch) == MOST_FRAMES or nbytes > MOST_BYTES):
                yield peer, _joined(batch)
                batch, nbytes = [], len(frame)
            batch.append(frame)
        yield peer, _joined(batch)


def _joined(batch: list[bytes]) -> bytes:
    return batch[0] if len(batch) == 1 else _MARK + _ENCODER.encode(batch)


def frames_in(batch: bytes) -> list[bytes]:
    """The frames that were sent as ``batch``. Raises ProtocolError where it has the mark and is none that ``batches``
    makes."""
    if not batch.startswith(_MARK):
        return [batch]
    try:
        return _DECODER.decode(memoryview(batch)[1:])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"malformed batch: {error}") from None
