"""News of a dispatcher to the scheduler, in the only message of sglang that goes that way: EncoderDispatchErrorReq.

sglang sends it, in order, to every rank of the server, also on other hosts. So all ranks change to another room in the
same tick.
"""

from __future__ import annotations

import msgspec
from sglang.srt.managers.io_struct import EncoderDispatchErrorReq

from sglang_mm_conn.core.dispatch.actions import GiveUp, Redispatched

_PREFIX = "conn_multimodal "


class _News(msgspec.Struct, frozen=True):
    """One of the two."""

    redispatched: Redispatched | None = None
    given_up: GiveUp | None = None


# Made at import: see the hazard in control.bootstrap.
_DECODER = msgspec.json.Decoder(_News)


def news_request(rid: str, news: Redispatched | GiveUp) -> EncoderDispatchErrorReq:
    """``news`` of the request ``rid`` as a message of sglang."""
    found = _News(redispatched=news) if isinstance(news, Redispatched) else _News(given_up=news)
    return EncoderDispatchErrorReq(rid=rid, error_msg=_PREFIX + msgspec.json.encode(found).decode(), error_code=0)


def news_in(message: EncoderDispatchErrorReq) -> Redispatched | GiveUp | None:
    """The news in ``message``; None if it is an error, as sglang meant it."""
    # No error has the code 0. So what an encoder's words look like, with which an error may begin, does not matter.
    if message.error_code != 0 or not message.error_msg.startswith(_PREFIX):
        return None
    found = _DECODER.decode(message.error_msg[len(_PREFIX) :])
    return found.redispatched or found.given_up
