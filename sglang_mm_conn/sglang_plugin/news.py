"""News of the tokenizer process to the scheduler, in sglang's only message that goes that way: EncoderDispatchErrorReq.

sglang sends it, in order, to every rank of the server, also on other hosts. So all ranks do the same in the same tick.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec
from sglang.srt.managers.io_struct import EncoderDispatchErrorReq

from sglang_mm_conn.core.dispatch.actions import GiveUp, Redispatched

_PREFIX = "conn_multimodal "


class PromptComes(msgspec.Struct, frozen=True):
    """Several requests will have one prompt. Its embeddings are expected from now on.

    Attributes:
        room_base: of the prompt.
        label: its name in logs.
        rooms: (encoder URL, room) of each part.
        requests: how many.
    """

    room_base: str
    label: str
    rooms: list[tuple[str, str]]
    requests: int


class PromptOver(msgspec.Struct, frozen=True):
    """No further request will have the prompt of ``room_base``."""

    room_base: str


News: TypeAlias = Redispatched | GiveUp | PromptComes | PromptOver


class _OneOf(msgspec.Struct, frozen=True, omit_defaults=True):
    redispatched: Redispatched | None = None
    given_up: GiveUp | None = None
    comes: PromptComes | None = None
    over: PromptOver | None = None


# Made at import: see the hazard in control.bootstrap.
_DECODER = msgspec.json.Decoder(_OneOf)


def news_request(rid: str, news: News) -> EncoderDispatchErrorReq:
    """``news`` of the request ``rid`` as a message of sglang."""
    match news:
        case Redispatched():
            found = _OneOf(redispatched=news)
        case GiveUp():
            found = _OneOf(given_up=news)
        case PromptComes():
            found = _OneOf(comes=news)
        case PromptOver():
            found = _OneOf(over=news)
    return EncoderDispatchErrorReq(rid=rid, error_msg=_PREFIX + msgspec.json.encode(found).decode(), error_code=0)


def news_in(message: EncoderDispatchErrorReq) -> News | None:
    """The news in ``message``; None if it is an error, as sglang meant it."""
    # No error has the code 0. So what an encoder's words look like, with which an error may begin, does not matter.
    if message.error_code != 0 or not message.error_msg.startswith(_PREFIX):
        return None
    found = _DECODER.decode(message.error_msg[len(_PREFIX) :])
    return found.redispatched or found.given_up or found.comes or found.over
