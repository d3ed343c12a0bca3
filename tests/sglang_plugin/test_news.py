"""News of the tokenizer process in sglang's message of dispatch errors."""

from __future__ import annotations

import pickle

import pytest
from sglang.srt.managers.io_struct import EncoderDispatchErrorReq

from sglang_mm_conn.core.dispatch.actions import GiveUp, Redispatched
from sglang_mm_conn.core.rooms import new_id, new_room_base, part_room
from sglang_mm_conn.sglang_plugin.dispatch import _tell
from sglang_mm_conn.sglang_plugin.news import News, PromptComes, PromptOver, news_in, news_request

BASE = new_room_base(new_id())
MOVED = Redispatched(BASE, 3, "http://encoder:30000", part_room(new_room_base(new_id()), 3))


@pytest.mark.parametrize(
    "news",
    [
        MOVED,
        GiveUp(BASE, 503, "no encoder is available"),
        PromptComes(BASE, "rid", [("http://encoder:30000", f"{BASE}-0"), ("http://encoder:30001", f"{BASE}-1")], 3),
        PromptOver(BASE),
    ],
)
def test_news_arrive_as_they_were_sent_in_a_message_of_sglang(news: News) -> None:
    message = news_request("rid", news)
    assert message.rid == "rid" and news_in(message) == news
    assert news_in(pickle.loads(pickle.dumps(message))) == news


def test_a_dispatcher_tells_its_news_where_they_can_be_told() -> None:
    sent: list[EncoderDispatchErrorReq] = []
    _tell("rid", sent.append, MOVED)
    _tell("rid", None, MOVED)
    assert [news_in(message) for message in sent] == [MOVED]


@pytest.mark.parametrize("text", ["", "encoder 3 failed", " conn_multimodal {}", "conn_multimodal"])
def test_a_plain_error_is_no_news(text: str) -> None:
    assert news_in(EncoderDispatchErrorReq(rid="rid", error_msg=text, error_code=500)) is None


@pytest.mark.parametrize("body", ["", "{}", '{"given_up":1}', "[]", news_request("rid", MOVED).error_msg[16:]])
def test_an_error_whose_text_an_encoder_made_look_like_news_is_an_error(body: str) -> None:
    """It would end the scheduler, or move a part."""
    text = f"conn_multimodal {body}"
    assert news_in(EncoderDispatchErrorReq(rid="rid", error_msg=text, error_code=500)) is None
    told = GiveUp(BASE, 500, text)
    assert news_in(news_request("rid", told)) == told
