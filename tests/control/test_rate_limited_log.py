"""Log lines about one peer: a few, however often it gives reason for one."""

from __future__ import annotations

import logging

import pytest

from sglang_mm_conn.control.rate_limited_log import LINES, SECONDS, RateLimitedLog


def test_a_peer_that_sends_nonsense_without_end_cannot_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    rate_limited_log = RateLimitedLog(logging.getLogger("rate_limited_log"), lambda: now[0])
    for _ in range(1000):
        rate_limited_log.log("mad", logging.WARNING, "nonsense from %s", "mad")
    assert [record.getMessage() for record in caplog.records] == ["nonsense from mad"] * LINES
    rate_limited_log.log("sane", logging.WARNING, "a line about another")
    assert caplog.messages[-1] == "a line about another"
    now[0] += SECONDS
    rate_limited_log.log("mad", logging.WARNING, "nonsense from %s", "mad")
    assert caplog.messages[-1] == f"nonsense from mad ({1000 - LINES} lines like it left out)"


def test_what_is_remembered_of_peers_is_bounded() -> None:
    rate_limited_log = RateLimitedLog(logging.getLogger("rate_limited_log"))
    for number in range(5000):
        rate_limited_log.log(str(number), logging.DEBUG, "nonsense")
    assert len(rate_limited_log._accounts) <= 1024
