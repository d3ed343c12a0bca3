"""News of a dispatcher to the scheduler, in the only message of sglang that goes that way: EncoderDispatchErrorReq.

sglang sends it, in order, to every rank of the server, also on other hosts. So all ranks change to another room in the
same tick.
"""

from __future__ import annotations

import msgspec
from sglang.srt.managers.io_struct import EncoderDispatchErrorReq

from sglang_mm_conn.core.dispatch.actions import GiveUp, Redispatched
from sglang_mm_conn.core.outcomes import known_http_status

_PREFIX = "conn_multimodal redispatch "
# Made at import: see the hazard in control.bootstrap.
_DECODER = msgspec.json.Decoder(Redispatched)


def redispatch_request(rid: str, news: Redispatched) -> EncoderDispatchErrorReq:
    """``news`` of the request ``rid`` as a message of sglang."""
    text = _PREFIX + msgspec.json.encode(news).decode()
    return EncoderDispatchErrorReq(rid=rid, error_msg=text, error_code=0)


def error_request(rid: str, news: GiveUp) -> EncoderDispatchErrorReq:
    """``news`` of the request ``rid`` as a message of sglang. Its text begins with the room base: a later request may
    have the same id. The scheduler takes it off again."""
    return EncoderDispatchErrorReq(
        rid=rid, error_msg=f"{news.room_base} {news.reason}", error_code=known_http_status(news.code)
    )


def error_of(message: EncoderDispatchErrorReq, room_base: str) -> EncoderDispatchErrorReq | None:
    """``message`` as the client gets it; None if it is about another request than that of ``room_base``."""
    about, _, reason = message.error_msg.partition(" ")
    if about != room_base:
        return None
    return EncoderDispatchErrorReq(rid=message.rid, error_msg=reason, error_code=message.error_code)


def redispatched(message: EncoderDispatchErrorReq) -> Redispatched | None:
    """The news in ``message``; None if it is an error, as sglang meant it."""
    # No error has the code 0. So what an encoder's words look like, with which an error may begin, does not matter.
    if message.error_code != 0 or not message.error_msg.startswith(_PREFIX):
        return None
    return _DECODER.decode(message.error_msg[len(_PREFIX) :])
