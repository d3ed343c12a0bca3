"""News of a dispatcher in sglang's message of dispatch errors."""

from __future__ import annotations

import pickle

import pytest
from sglang.srt.managers.io_struct import EncoderDispatchErrorReq

from sglang_mm_conn.core.dispatch.actions import GiveUp, Redispatched
from sglang_mm_conn.core.rooms import new_id, new_room_base, part_room
from sglang_mm_conn.sglang_plugin.dispatch import _tell
from sglang_mm_conn.sglang_plugin.redispatch import error_of, error_request, redispatch_request, redispatched


def news() -> Redispatched:
    server = new_id()
    return Redispatched(new_room_base(server), 3, "http://encoder:30000", part_room(new_room_base(server), 3))


def test_news_arrive_as_they_were_sent_in_a_message_of_sglang() -> None:
    sent = news()
    message = redispatch_request("rid", sent)
    assert message.rid == "rid" and redispatched(message) == sent
    assert redispatched(pickle.loads(pickle.dumps(message))) == sent


@pytest.mark.parametrize("text", ["", "encoder 3 failed", " conn_multimodal redispatch {}", "redispatch"])
def test_a_plain_error_is_no_news(text: str) -> None:
    assert redispatched(EncoderDispatchErrorReq(rid="rid", error_msg=text, error_code=500)) is None


@pytest.mark.parametrize("body", ["", "{}", '{"room_base":1}', "[]", '{"room_base":"a","part":0,"url":"b","room":"c"}'])
def test_an_error_whose_text_an_encoder_made_look_like_news_is_an_error(body: str) -> None:
    """It would end the scheduler, or move a part."""
    sent: list[EncoderDispatchErrorReq] = []
    _tell("rid", sent.append, GiveUp("base", 500, f"conn_multimodal redispatch {body}"))
    message = EncoderDispatchErrorReq(rid="rid", error_msg=f"conn_multimodal redispatch {body}", error_code=500)
    assert redispatched(sent[0]) is None and redispatched(message) is None


def test_each_kind_of_news_is_told_in_its_own_way() -> None:
    sent: list[EncoderDispatchErrorReq] = []
    moved = news()
    _tell("rid", sent.append, moved)
    _tell("rid", sent.append, GiveUp(moved.room_base, 499, "why"))
    _tell("rid", None, moved)
    assert [redispatched(message) for message in sent] == [moved, None]
    assert sent[1].error_code == 400


def test_an_error_reaches_its_own_request_in_the_dispatchers_words() -> None:
    base = new_room_base(new_id())
    message = error_request("rid", GiveUp(base, 503, "no encoder is available"))
    told = error_of(message, base)
    assert told is not None and (told.rid, told.error_code, told.error_msg) == ("rid", 503, "no encoder is available")
    assert error_of(message, new_room_base(new_id())) is None, "a later request may have the same id"
