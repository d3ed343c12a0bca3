"""The scheduler's side of the plugin, as far as it can be tested without a server."""

from __future__ import annotations

from types import SimpleNamespace

from sglang.srt.managers.io_struct import EncoderDispatchErrorReq

from sglang_mm_conn.core.dispatch.actions import GiveUp, Redispatched
from sglang_mm_conn.core.rooms import new_id, new_room_base, part_room
from sglang_mm_conn.sglang_plugin.redispatch import news_request
from sglang_mm_conn.sglang_plugin.scheduler import SchedulerReceiver, ready_first, split_news


def test_an_abort_that_comes_in_the_tick_its_request_becomes_ready_finds_the_request() -> None:
    abort, text, ready, another = object(), object(), object(), object()
    assert ready_first([abort, text, ready, another], [abort, text]) == [ready, another, abort, text]


class Waiting(SimpleNamespace):
    """A request that waits."""

    def __init__(self, rid: str, room_base: str) -> None:
        super().__init__(rid=rid, room_base=room_base, heard=[])
        self.redispatch = self.give_up = self.heard.append


def test_news_reach_the_request_of_their_room_base_whatever_other_has_the_same_id() -> None:
    old, first, second = (new_room_base(new_id()) for _ in range(3))
    one, other = Waiting("same", first), Waiting("same", second)
    receiver = SchedulerReceiver.__new__(SchedulerReceiver)
    receiver.waiting_list = [one, other]  # type: ignore[list-item]
    moved = Redispatched(first, 0, "http://encoder:2", part_room(second, 0))
    news: list[Redispatched | GiveUp] = [moved, GiveUp(old, 503, "why"), GiveUp(second, 503, "why")]
    for each in news:
        receiver._heed(each)
    assert (one.heard, other.heard) == ([moved], [news[2]])


def test_only_news_are_kept_from_sglang() -> None:
    base = new_room_base(new_id())
    news: list[Redispatched | GiveUp] = [
        Redispatched(base, 0, "http://encoder:2", part_room(base, 0)),
        GiveUp(base, 503, "why"),
    ]
    text, error = SimpleNamespace(rid="text"), EncoderDispatchErrorReq(rid="x", error_msg="sglang's", error_code=500)
    messages = [news_request("rid", one) for one in news]
    assert split_news([text, *messages, error]) == ([text, error], news)
    assert split_news([]) == ([], [])
