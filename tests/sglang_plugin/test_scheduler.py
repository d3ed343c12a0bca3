"""The scheduler's side of the plugin, as far as it can be tested without a server."""

from __future__ import annotations

from sglang_mm_conn.sglang_plugin.scheduler import ready_first


def test_an_abort_that_comes_in_the_tick_its_request_becomes_ready_finds_the_request() -> None:
    abort, text, ready, another = object(), object(), object(), object()
    assert ready_first([abort, text, ready, another], [abort, text]) == [ready, another, abort, text]
