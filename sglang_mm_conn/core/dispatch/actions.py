"""Owns the actions of the dispatcher's core: what its caller carries out, in order."""

from __future__ import annotations

from typing import TypeAlias

import msgspec


class Post(msgspec.Struct, frozen=True):
    """Post a part to an encoder's ``/encode``, then call ``answered``.

    Attributes:
        room: the room of this try.
        url: the encoder.
        room_base: of the request.
        part: number of the part.
    """

    room: str
    url: str
    room_base: str
    part: int


class CancelPost(msgspec.Struct, frozen=True):
    """Nobody waits for the answer of ``room``'s post any more."""

    room: str


class Probe(msgspec.Struct, frozen=True):
    """Look ``url`` up by its bootstrap route, then call ``probed`` or ``probe_failed``."""

    url: str


class Redispatched(msgspec.Struct, frozen=True):
    """Tell the scheduler that a part comes from another encoder, in another room.

    Attributes:
        room_base: of the request.
        part: number of the part.
        url: the encoder.
        room: the new room.
    """

    room_base: str
    part: int
    url: str
    room: str


class GiveUp(msgspec.Struct, frozen=True):
    """Tell the scheduler that the request has failed.

    Attributes:
        room_base: of the request.
        code: HTTP status.
        reason: for the client. It names no server.
    """

    room_base: str
    code: int
    reason: str


class Forget(msgspec.Struct, frozen=True):
    """No part of the request will be posted again: its items may be freed."""

    room_base: str


INFO, WARNING = 20, 30  # the levels of the module logging


class LogLine(msgspec.Struct, frozen=True):
    """A line for the operator; ``level`` is INFO or WARNING."""

    level: int
    text: str


DispatchAction: TypeAlias = Post | CancelPost | Probe | Redispatched | GiveUp | Forget | LogLine
