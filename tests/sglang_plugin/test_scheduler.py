"""The scheduler's side of the plugin, as far as it can be tested without a server."""

from __future__ import annotations

from types import SimpleNamespace

from sglang_mm_conn.core.dispatch.actions import GiveUp, Redispatched
from sglang_mm_conn.core.rooms import new_id, new_room_base, part_room
from sglang_mm_conn.sglang_plugin.dispatch import with_room
from sglang_mm_conn.sglang_plugin.redispatch import error_request, redispatch_request
from sglang_mm_conn.sglang_plugin.scheduler import SchedulerReceiver, ready_first


def test_an_abort_that_comes_in_the_tick_its_request_becomes_ready_finds_the_request() -> None:
    abort, text, ready, another = object(), object(), object(), object()
    assert ready_first([abort, text, ready, another], [abort, text]) == [ready, another, abort, text]


def test_an_error_of_an_earlier_request_with_the_same_id_is_dropped() -> None:
    receiver = SchedulerReceiver.__new__(SchedulerReceiver)
    old, waits, comes = (new_room_base(new_id()) for _ in range(3))
    receiver.waiting_by_rid = {"waits": SimpleNamespace(room_base=waits)}  # type: ignore[dict-item]
    request = SimpleNamespace(rid="comes", encoder_urls=[with_room("http://encoder:1", comes)])
    text = SimpleNamespace(rid="text")
    errors = [
        error_request(rid, GiveUp(base, 503, "why"))
        for rid, base in (("waits", old), ("waits", waits), ("comes", old), ("comes", comes), ("gone", old))
    ]
    news = Redispatched(waits, 0, "http://encoder:2", part_room(comes, 0))
    received, found = receiver._without_news([text, request, *errors, redispatch_request("waits", news)])
    assert received[:2] == [text, request] and [one.rid for one in received[2:]] == ["waits", "comes"]
    assert {one.error_msg for one in received[2:]} == {"why"}
    assert found == [("waits", news)] and receiver._without_news([text]) == ([text], [])
