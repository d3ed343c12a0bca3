"""Whether an encoder takes new work, and when it may end."""

from __future__ import annotations

import pytest

from sglang_mm_conn.core.encoder.draining import Draining
from sglang_mm_conn.core.errors import ConnError
from sglang_mm_conn.core.states import DrainState


def test_an_encoder_serves_until_it_is_told_otherwise() -> None:
    draining = Draining()
    assert draining.state is DrainState.SERVING and not draining.refuses and draining.held == 0
    assert not draining.is_over(1e9), "it does not end by itself"


def test_an_order_is_undone_and_a_repeated_one_changes_nothing() -> None:
    draining = Draining()
    assert [draining.order(drain=drain) for drain in (True, True, False, False)] == [True, False, True, False]
    assert draining.state is DrainState.SERVING


def test_an_order_alone_ends_nothing() -> None:
    draining = Draining()
    draining.order(drain=True)
    assert draining.refuses and not draining.is_over(1e9)


def test_an_encoder_that_holds_nothing_ends_at_once() -> None:
    draining = Draining()
    assert draining.end(10.0, 30.0), "it took new work until now"
    assert draining.refuses and draining.is_over(10.0) and draining.state is DrainState.OVER


def test_an_encoder_ends_when_it_has_finished_or_its_time_is_up() -> None:
    for held, times in ((0, (10.0,)), (3, (40.0,))):
        draining = Draining()
        draining.held = 3
        draining.end(10.0, 30.0)
        assert not draining.is_over(39.9)
        draining.held = held
        assert all(draining.is_over(now) for now in times)


def test_a_second_request_to_end_is_one_to_end_now() -> None:
    draining = Draining()
    draining.held = 1
    draining.end(10.0, 30.0)
    assert not draining.is_over(11.0)
    assert not draining.end(11.0, 30.0)
    assert draining.is_over(11.0)
    assert not draining.end(12.0, 30.0), "one too many does no harm"


def test_an_encoder_that_ends_does_not_take_new_work_again() -> None:
    draining = Draining()
    assert draining.order(drain=True)
    assert not draining.end(0.0, 1.0), "it refused new work before"
    draining.held = 1
    assert not draining.order(drain=True)
    with pytest.raises(ConnError, match="SIGTERM"):
        draining.order(drain=False)
    assert draining.refuses
