"""The scheduler's side of the plugin, as far as it can be tested without a server."""

from __future__ import annotations

from types import SimpleNamespace

from sglang.srt.managers.io_struct import EncoderDispatchErrorReq

from sglang_mm_conn.core.dispatch.actions import GiveUp, Redispatched
from sglang_mm_conn.core.rooms import new_id, new_room_base, part_room
from sglang_mm_conn.sglang_plugin.news import News, PromptOver, news_request
from sglang_mm_conn.sglang_plugin.scheduler import ready_first, split_news


def test_an_abort_that_comes_in_the_tick_its_request_becomes_ready_finds_the_request() -> None:
    abort, text, ready, another = object(), object(), object(), object()
    assert ready_first([abort, text, ready, another], [abort, text]) == [ready, another, abort, text]


def test_only_news_are_kept_from_sglang() -> None:
    base = new_room_base(new_id())
    news: list[News] = [
        PromptOver(base),
        Redispatched(base, 0, "http://encoder:2", part_room(base, 0)),
        GiveUp(base, 503, "why"),
    ]
    text, error = SimpleNamespace(rid="text"), EncoderDispatchErrorReq(rid="x", error_msg="sglang's", error_code=500)
    messages = [news_request("rid", one) for one in news]
    assert split_news([text, *messages, error]) == ([text, error], news)
    assert split_news([]) == ([], [])
