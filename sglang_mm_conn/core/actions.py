"""What a core asks its surroundings to do, in this order. Cores never act themselves."""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from sglang_mm_conn.core.messages import Message


class Send(msgspec.Struct, frozen=True):
    """Send ``message`` to the control peer ``peer``."""

    peer: str
    message: Message


class CopyOut(msgspec.Struct, frozen=True):
    """Copy the first ``tokens`` rows of window ``window`` out of ``blocks``, to row ``first_token`` of the result."""

    room: str
    window: int
    blocks: tuple[int, ...]
    first_token: int
    tokens: int
    row_bytes: int
    total_tokens: int
    dtype: str
    last: bool
    checksum: int | None
    view: bool = False  # or leave them in the blocks, which are contiguous, and make the result a view of them


class TransferEmbeddingChunk(msgspec.Struct, frozen=True):
    """Work for a transfer queue: serve the offered windows of ``room`` (the seed's name and fields)."""

    room: str
    queue_idx: int
    embedding_indices: tuple[int, ...]
    is_last: bool
    total_tokens: int


class Ended(msgspec.Struct, frozen=True):
    """``room`` reached its final state. ``code`` is an HTTP status, ``reason`` says why a failed one failed, ``peer``
    with whom."""

    room: str
    success: bool
    reason: str = ""
    code: int = 0
    peer: str = ""


class Release(msgspec.Struct, frozen=True):
    """No write of ``room`` is under way or will come: its source may be freed."""

    room: str


Action: TypeAlias = Send | CopyOut | TransferEmbeddingChunk | Ended | Release
