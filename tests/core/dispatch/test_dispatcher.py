"""Dispatch of requests: which part is at which encoder, and what becomes of a part whose try failed."""

from __future__ import annotations

import itertools

import pytest

from sglang_mm_conn.core.dispatch import dispatcher
from sglang_mm_conn.core.dispatch.actions import (
    WARNING,
    CancelPost,
    Forget,
    GiveUp,
    LogLine,
    Post,
    Probe,
    Redispatched,
)
from sglang_mm_conn.core.dispatch.choice import Item
from sglang_mm_conn.core.dispatch.dispatcher import LOOK_SECONDS, NO_ENCODER
from sglang_mm_conn.core.dispatch.encoders import FAILURES_IN_A_ROW, EncoderStatus
from sglang_mm_conn.core.dispatch.requests import ABORTED_SECONDS, DELIVERED_SECONDS
from sglang_mm_conn.core.dispatch.verdicts import Verdict
from sglang_mm_conn.core.states import EncoderState
from tests.core.dispatch.driver import A, B, C, D, Driver

LOSSES = [Verdict.LOST, Verdict.REFUSED, Verdict.CUT_OFF, Verdict.DRAINS, Verdict.STRANGER]


def arrives(driver: Driver, base: str) -> bool:
    """Whether all parts have arrived, so that the request is forgotten, but not yet: the encoder may still be lost."""
    early = driver.tick(DELIVERED_SECONDS - driver.now + (driver.core.requests[base].delivered_at or -1e9))
    return Forget(base) not in early and Forget(base) in driver.tick(0.01)


# -- a request -----------------------------------------------------------------------------------------------------


def test_a_request_is_posted_to_encoders_that_are_up_and_then_forgotten() -> None:
    driver = Driver(A, B)
    base = driver.dispatch(1.0, 1.0)
    assert [(url, part.number, part.of, part.first, part.count) for url, part in driver.placed] == [
        (A, 0, 2, 0, 1), (B, 1, 2, 1, 1)
    ]  # fmt: skip
    assert [(post.url, post.room) for post in driver.posts] == [
        (A, f"{base}_local_part_0"), (B, f"{base}_local_part_1")
    ]  # fmt: skip
    assert driver.loads() == {A: (1, 1.0), B: (1, 1.0)}
    driver.answer(driver.at(base, 1).room, Verdict.DELIVERED)
    assert driver.forgotten == [] and driver.loads() == {A: (1, 1.0), B: (0, 0.0)}
    driver.answer(driver.at(base, 0).room, Verdict.DELIVERED)
    assert driver.core.report(driver.now)["requests"] == 0
    assert arrives(driver, base) and driver.news == [] and not driver.core.requests


def test_items_of_each_modality_are_parts_of_their_own_in_their_order() -> None:
    driver = Driver(A, B)
    driver.dispatch_items([Item("VIDEO", 9.0), Item("IMAGE", 0.1), Item("IMAGE", 0.1)])
    assert [(part.modality, part.number, part.of, part.first, part.count) for _, part in driver.placed] == [
        ("VIDEO", 0, 2, 0, 1), ("IMAGE", 1, 2, 0, 2)
    ]  # fmt: skip
    assert driver.placed[0][0] != driver.placed[1][0]  # the video is work for the one, so the images go to the other
    assert driver.placed[1][1].work == pytest.approx(0.2)


def test_a_faster_encoder_gets_more() -> None:
    driver = Driver(A, B)
    for _ in range(60):
        base = driver.dispatch(1.0)
        driver.now += 0.1 if driver.at(base).url == A else 0.4
        driver.answer(driver.at(base).room, Verdict.DELIVERED)
    driver.posts.clear()
    for _ in range(12):
        driver.dispatch(1.0)
    urls = [post.url for post in driver.posts]
    assert urls.count(A) >= 8


def test_encoders_with_caches_get_the_same_item_again() -> None:
    driver = Driver(A, B, C, D, up=False)
    for url in (A, B, C, D):
        driver.well(url, prefix_cache=True)
    for key in "abcdefgh":
        urls = set()
        for _ in range(3):
            base = driver.dispatch_items([Item("IMAGE", 1.0, key)])
            urls.add(driver.at(base).url)
            driver.answer(driver.at(base).room, Verdict.DELIVERED)
        assert len(urls) == 1


# -- another encoder -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verdict", [*LOSSES, Verdict.ERROR])
def test_a_part_whose_try_failed_goes_to_another_encoder_in_another_room(verdict: Verdict) -> None:
    driver = Driver(A, B)
    base = driver.dispatch()
    old = driver.at(base)
    actions = driver.answer(old.room, verdict)
    new = driver.at(base)
    assert (old.url, new.url) == (A, B) and new.room != old.room and new.part == old.part == 0
    told = Redispatched(base, 0, B, new.room)
    assert actions[0] == CancelPost(old.room) and list(actions).index(told) < list(actions).index(new)
    assert driver.news == [told] and driver.core.redispatched == 1
    assert driver.loads() == {A: (0, 0.0), B: (1, 1.0)}
    assert any(A in line and old.room in line and B in line and new.room in line for line in driver.log)
    driver.answer(new.room, Verdict.DELIVERED)
    assert arrives(driver, base)


def test_a_failed_room_counts_as_a_failed_try_and_its_post_is_cancelled() -> None:
    driver = Driver(A, B)
    base = driver.dispatch()
    old = driver.at(base)
    assert CancelPost(old.room) in driver.room_failed(old.room)
    assert driver.at(base).url == B


@pytest.mark.parametrize(
    ("verdict", "state"),
    [
        (Verdict.REFUSED, EncoderState.DOWN),
        (Verdict.STRANGER, EncoderState.SUSPECT),
        (Verdict.CUT_OFF, EncoderState.SUSPECT),
        (Verdict.DRAINS, EncoderState.DRAINING),
        (Verdict.LOST, EncoderState.UP),
    ],
)
def test_a_lost_part_says_something_of_its_encoder_and_a_probe_follows(verdict: Verdict, state: EncoderState) -> None:
    driver = Driver(A, B)
    assert Probe(A) in driver.answer(driver.at(driver.dispatch()).room, verdict)
    assert driver.state(A) is state


def test_an_error_says_nothing_until_there_are_several_in_a_row() -> None:
    driver = Driver(A, B)
    for number in range(FAILURES_IN_A_ROW):
        assert driver.state(A) is EncoderState.UP
        base = driver.dispatch(0.1 + number)
        while driver.at(base).url != A:  # occupied with healthy work, B is not chosen
            base = driver.dispatch(5.0)
        driver.answer(driver.at(base).room, Verdict.ERROR)
    assert driver.state(A) is EncoderState.SUSPECT


def test_rooms_of_all_tries_differ_and_numbers_of_parts_stay() -> None:
    driver = Driver(A, B, C, D)
    base = driver.dispatch(5.0, 5.0, 5.0)
    assert len(driver.open) == 3
    for _ in range(2):
        for part in range(3):
            driver.answer(driver.at(base, part).room, Verdict.LOST)
    assert sorted(post.part for post in driver.posts) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert len({post.room for post in driver.posts}) == 9
    assert all(post.room.endswith(f"_local_part_{post.part}") for post in driver.posts)
    assert {part.of for _, part in driver.placed} == {3}


@pytest.mark.parametrize("tries", [1, 2, 3])
def test_a_part_has_a_limited_number_of_tries(tries: int) -> None:
    driver = Driver(A, B, C, D, tries=tries)
    base = driver.dispatch()
    for _ in range(tries):
        assert driver.news_of(base)[-1:] == [] or isinstance(driver.news_of(base)[-1], Redispatched)
        driver.answer(driver.at(base).room, Verdict.CUT_OFF, "Cannot connect to host 10.0.0.7:30000")
    give_up = driver.news_of(base)[-1]
    assert isinstance(give_up, GiveUp) and give_up.code == 502 and "10.0.0.7" not in give_up.reason
    assert len(driver.posts) == tries and driver.forgotten == [base] and driver.core.given_up == 1
    assert (f"{tries} encoders failed on the same part" in give_up.reason) == (tries > 1)


@pytest.mark.parametrize("verdict", [Verdict.DRAINS, Verdict.REFUSED])
def test_encoders_that_do_not_take_a_part_use_up_no_try(verdict: Verdict) -> None:
    """Six of eight encoders drain or end at the same time, and no probe has told the dispatcher yet."""
    driver = Driver(*(f"http://{number}:1" for number in range(8)), tries=2)
    base = driver.dispatch()
    for _ in range(6):
        driver.answer(driver.at(base).room, verdict)
    assert driver.open and len(driver.posts) == 7
    driver.answer(driver.at(base).room, Verdict.DELIVERED)
    assert arrives(driver, base) and not any(isinstance(news, GiveUp) for news in driver.news)


def test_an_encoder_that_answers_probes_and_takes_nothing_is_not_tried_without_end() -> None:
    driver = Driver(A, tries=3, wait=30.0)
    base = driver.dispatch()
    for _ in range(10):
        if driver.open:
            driver.answer(driver.at(base).room, Verdict.REFUSED)
            driver.tick(0.1)
            driver.well(A)
    assert len(driver.posts) == 4 and isinstance(driver.news_of(base)[-1], GiveUp)


def test_an_encoder_that_loses_every_part_gets_few_and_others_get_the_rest() -> None:
    driver = Driver(A, B)
    for _ in range(300):
        base = driver.dispatch()
        while (post := driver.at(base)).url == A:
            driver.answer(post.room, Verdict.CUT_OFF)
            driver.well(A)
        driver.answer(post.room, Verdict.DELIVERED)
        driver.tick(0.1)
    urls = [post.url for post in driver.posts]
    assert urls.count(B) == 300 and 5 <= urls.count(A) <= 8 and driver.state(A) is EncoderState.SUSPECT


def test_a_part_that_no_other_can_have_goes_to_an_encoder_that_loses_parts() -> None:
    driver = Driver(A, B, tries=5)
    for _ in range(FAILURES_IN_A_ROW):
        base = driver.dispatch()
        while driver.at(base).url != A:
            base = driver.dispatch()
        driver.answer(driver.at(base).room, Verdict.LOST)
        driver.well(A)
    assert driver.state(A) is EncoderState.SUSPECT
    base = driver.dispatch()
    assert driver.at(base).url == B
    driver.answer(driver.at(base).room, Verdict.ERROR)
    assert driver.at(base).url == A


def test_the_client_is_told_the_encoders_error_after_the_last_try() -> None:
    driver = Driver(A, B, tries=2)
    base = driver.dispatch()
    driver.answer(driver.at(base).room, Verdict.LOST)
    driver.answer(driver.at(base).room, Verdict.ERROR, "out of memory")
    assert driver.news_of(base)[-1] == GiveUp(base, 500, "2 encoders failed on the same part of this request: "
                                              "out of memory")  # fmt: skip


def test_the_only_try_that_may_be_made_tells_the_client_its_error() -> None:
    driver = Driver(A, B, tries=1)
    base = driver.dispatch()
    driver.answer(driver.at(base).room, Verdict.ERROR, "out of memory", 507)
    assert driver.news_of(base) == [GiveUp(base, 507, "out of memory")]


@pytest.mark.parametrize("verdict", LOSSES)
def test_no_code_of_a_transfer_is_told_the_client_as_its_own_fault(verdict: Verdict) -> None:
    for tries in (1, 2):
        driver = Driver(A, B, tries=tries)
        base = driver.dispatch()
        for _ in range(tries):
            driver.answer(driver.at(base).room, verdict, code=404 if verdict is Verdict.LOST else 0)
        for url in (A, B):
            driver.absent(url)
        (give_up,) = [one for one in driver.news_of(base) if isinstance(one, GiveUp)]
        assert give_up.code in (502, 503)


def test_an_encoder_that_failed_to_encode_a_part_never_gets_it_again() -> None:
    driver = Driver(A, B)
    base = driver.dispatch()
    driver.answer(driver.at(base).room, Verdict.ERROR)
    driver.well(A)
    driver.answer(driver.at(base).room, Verdict.LOST)
    driver.well(B)
    assert [post.url for post in driver.posts] == [A, B, B]


def test_an_error_that_every_encoder_makes_is_told_as_soon_as_none_is_left() -> None:
    driver = Driver(A, B, tries=9, wait=30.0)
    base = driver.dispatch()
    driver.answer(driver.at(base).room, Verdict.ERROR, "cannot decode")
    driver.answer(driver.at(base).room, Verdict.ERROR, "cannot decode this")
    assert driver.news_of(base)[-1] == GiveUp(base, 500, "cannot decode this")


@pytest.mark.parametrize("verdict", [Verdict.LOST, Verdict.CUT_OFF, Verdict.REFUSED])
def test_the_same_encoder_gets_a_part_again_only_after_a_later_sign_of_life(verdict: Verdict) -> None:
    driver = Driver(A, wait=30.0)
    base = driver.dispatch()
    driver.answer(driver.at(base).room, verdict)
    for _ in range(5):
        driver.tick(0.1)
    assert len(driver.posts) == 1 and driver.news == []
    driver.well(A)
    assert driver.at(base).url == A and len(driver.posts) == 2


def test_an_encoder_that_lost_a_part_gets_it_again_only_where_no_other_is_left() -> None:
    driver = Driver(A, B, C)
    base = driver.dispatch()
    driver.answer(driver.at(base).room, Verdict.LOST)
    driver.well(A)
    driver.dispatch(50.0)  # the third one is busy
    driver.answer(driver.at(base).room, Verdict.LOST)
    assert [post.url for post in driver.posts if post.room_base == base] == [A, B, C]


def test_two_lost_parts_do_not_share_an_encoder() -> None:
    """One of them may have killed the encoder that they shared."""
    driver = Driver(A, B, C)
    first = driver.dispatch(1.0)
    others = [driver.dispatch(5.0), driver.dispatch(4.0)]
    second = driver.dispatch(1.0)
    assert driver.at(first).url == driver.at(second).url == A and {driver.at(one).url for one in others} == {B, C}
    driver.answer(driver.at(first).room, Verdict.CUT_OFF)
    driver.answer(driver.at(second).room, Verdict.CUT_OFF)
    assert {driver.at(first).url, driver.at(second).url} == {B, C}


# -- faults of the input, and aborts -------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [400, 413, 422])
def test_a_fault_of_the_input_is_told_the_client_and_never_repeated(code: int) -> None:
    driver = Driver(A, B)
    base = driver.dispatch(5.0, 5.0)
    driver.answer(driver.at(base, 0).room, Verdict.INPUT, "bad image", code)
    assert driver.news == [GiveUp(base, code, "bad image")] and driver.forgotten == [base]
    assert len(driver.posts) == 2 and driver.open == {} and driver.loads() == {A: (0, 0.0), B: (0, 0.0)}
    assert driver.state(A) is driver.state(B) is EncoderState.UP


def test_a_room_that_fails_for_the_input_cancels_its_post() -> None:
    driver = Driver(A, B)
    base = driver.dispatch()
    room = driver.at(base).room
    driver.room_failed(room, 413, "too large")
    assert driver.news == [GiveUp(base, 413, "too large")] and driver.cancelled == [room]


def test_an_aborted_request_ends_quietly_a_little_later() -> None:
    driver = Driver(A, B)
    base = driver.dispatch(5.0, 5.0)
    other = driver.at(base, 1).room
    assert driver.answer(driver.at(base, 0).room, Verdict.ABORTED) == []
    driver.tick(ABORTED_SECONDS)
    assert driver.forgotten == []
    driver.tick(0.01)
    assert driver.news == [] and driver.forgotten == [base] and other in driver.cancelled
    assert driver.core.given_up == 0 and driver.loads() == {A: (0, 0.0), B: (0, 0.0)}
    assert driver.state(A) is EncoderState.UP and driver.core.fleet.encoders[A].failed == 0


def test_an_aborted_part_whose_request_still_waits_is_tried_again() -> None:
    """Another rank has given the room up, or the encoder has cancelled the encode: the scheduler says so in time."""
    driver = Driver(A, B)
    base = driver.dispatch()
    room = driver.at(base).room
    driver.answer(room, Verdict.ABORTED)
    driver.tick(ABORTED_SECONDS - 0.1)
    driver.room_failed(room, 499, "aborted")
    assert driver.at(base).url == B and room in driver.cancelled
    driver.tick(ABORTED_SECONDS + 1.0)  # the new try is not aborted
    assert driver.forgotten == [] and driver.at(base).url == B


def test_an_abort_that_only_the_scheduler_reports_is_a_lost_try() -> None:
    driver = Driver(A, B, tries=1)
    base = driver.dispatch()
    driver.room_failed(driver.at(base).room, 499, "aborted by a rank")
    (give_up,) = driver.news
    assert isinstance(give_up, GiveUp) and (give_up.room_base, give_up.code) == (base, 502)


# -- late events ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verdict", Verdict)
def test_a_late_answer_or_failure_of_an_older_try_changes_nothing(verdict: Verdict) -> None:
    driver = Driver(A, B)
    base = driver.dispatch()
    old = driver.at(base).room
    driver.answer(old, Verdict.LOST)
    before = (driver.at(base), driver.loads(), driver.state(A), driver.state(B))
    assert driver.answer(old, verdict) == []
    assert driver.room_failed(old) == [] and driver.room_failed(old, 499) == []
    assert (driver.at(base), driver.loads(), driver.state(A), driver.state(B)) == before


def test_events_of_rooms_that_nobody_knows_change_nothing() -> None:
    driver = Driver(A)
    assert driver.answer("another server's", Verdict.CUT_OFF) == [] and driver.room_failed("another server's") == []


def test_answers_that_come_twice_count_once() -> None:
    driver = Driver(A, B)
    base = driver.dispatch(5.0, 5.0)
    room = driver.at(base, 0).room
    driver.answer(room, Verdict.DELIVERED)
    assert driver.answer(room, Verdict.DELIVERED) == [] and driver.answer(room, Verdict.CUT_OFF) == []
    assert driver.forgotten == [] and driver.loads()[B] == (1, 5.0)


def test_a_part_lost_after_its_delivery_is_tried_again() -> None:
    """The encoder said that it had arrived, and was lost before the language side knew."""
    driver = Driver(A, B)
    base = driver.dispatch()
    room = driver.at(base).room
    driver.answer(room, Verdict.DELIVERED)
    driver.tick(DELIVERED_SECONDS)
    driver.room_failed(room, 502)
    assert driver.at(base).url == B and driver.loads() == {A: (0, 0.0), B: (1, 1.0)}
    assert driver.core.report(driver.now)["requests"] == 1
    driver.tick(30.0)
    assert driver.forgotten == [] and driver.room_failed(room, 502) == []  # the report is repeated
    driver.answer(driver.at(base).room, Verdict.DELIVERED)
    assert arrives(driver, base) and driver.core._delivered == {}


def test_a_part_lost_after_its_delivery_is_tried_again_while_another_is_under_way() -> None:
    driver = Driver(A, B)
    base = driver.dispatch(5.0, 5.0)
    delivered, other = driver.at(base, 0).room, driver.at(base, 1).room
    driver.answer(delivered, Verdict.DELIVERED)
    driver.room_failed(delivered, 404)
    assert driver.at(base, 0).url == B and driver.at(base, 1).room == other
    driver.answer(other, Verdict.DELIVERED)
    driver.tick(30.0)
    assert driver.forgotten == []
    driver.answer(driver.at(base, 0).room, Verdict.DELIVERED)
    assert arrives(driver, base)


def test_a_fault_of_the_input_that_is_found_after_the_delivery_is_told_the_client() -> None:
    driver = Driver(A, B)
    base = driver.dispatch()
    room = driver.at(base).room
    driver.answer(room, Verdict.DELIVERED)
    driver.room_failed(room, 413, "too large")
    assert driver.news == [GiveUp(base, 413, "too large")] and driver.forgotten == [base]
    assert driver.core._delivered == {} and driver.core.requests == {}


def test_a_room_that_fails_long_after_its_request_has_arrived_fails_the_request() -> None:
    """Its items are gone."""
    driver = Driver(A, B)
    base = driver.dispatch()
    room = driver.at(base).room
    driver.answer(room, Verdict.DELIVERED)
    driver.tick(DELIVERED_SECONDS + 0.1)
    for _ in range(2):  # the report is repeated
        *_, give_up = driver.room_failed(room, 404, "http://a:1 does not know it")
        assert isinstance(give_up, GiveUp) and (give_up.room_base, give_up.code) == (base, 502)
        assert A not in give_up.reason
    assert driver.forgotten == [base]


def test_a_room_of_an_earlier_try_says_nothing_of_a_request_that_has_arrived() -> None:
    driver = Driver(A, B)
    base = driver.dispatch()
    first = driver.at(base).room
    driver.answer(first, Verdict.LOST)
    last = driver.at(base).room
    driver.answer(last, Verdict.DELIVERED)
    driver.tick(DELIVERED_SECONDS + 0.1)
    assert driver.room_failed(first) == [] and driver.room_failed(last) != []


def test_rooms_of_old_requests_are_forgotten_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher, "_FINISHED_ROOMS", 3)
    driver = Driver(A)
    rooms = []
    for _ in range(4):
        rooms.append(driver.at(driver.dispatch()).room)
        driver.answer(rooms[-1], Verdict.DELIVERED)
        driver.tick(DELIVERED_SECONDS + 0.1)
    assert driver.room_failed(rooms[0]) == [] and driver.room_failed(rooms[1]) != []


# -- encoders that end ---------------------------------------------------------------------------------------------


def test_all_parts_of_an_encoder_that_is_down_move() -> None:
    driver = Driver(A, B, C)
    bases = [driver.dispatch() for _ in range(9)]
    mine = [base for base in bases if driver.at(base).url == A]
    assert len(mine) == 3
    driver.status(A)
    rooms = [driver.at(base).room for base in mine]
    driver.status(A, connected=False, silences=1)  # it fell silent
    assert driver.state(A) is EncoderState.DOWN and driver.loads()[A] == (0, 0.0)
    assert all(driver.at(base).url in (B, C) for base in bases) and set(rooms) <= set(driver.cancelled)
    assert len(driver.news) == 3


def test_parts_stay_with_an_encoder_that_drains_until_it_ends() -> None:
    driver = Driver(A, B)
    base = driver.dispatch()
    driver.well(A, draining=True)
    assert driver.state(A) is EncoderState.DRAINING and driver.at(base).url == A
    assert driver.at(driver.dispatch(100.0)).url == driver.at(driver.dispatch(100.0)).url == B
    driver.answer(driver.at(base).room, Verdict.DELIVERED)
    assert arrives(driver, base) and driver.state(A) is EncoderState.DRAINING


def test_parts_of_a_suspect_encoder_wait_for_the_probe() -> None:
    driver = Driver(A, B)
    driver.status(A)
    base = driver.dispatch()
    driver.status(A, connected=False)
    assert driver.state(A) is EncoderState.SUSPECT and driver.at(base).url == A
    driver.absent(A)
    assert driver.at(base).url == B


def test_parts_of_a_busy_encoder_stay_while_its_control_connection_lives() -> None:
    driver = Driver(A, B)
    driver.status(A)
    base = driver.dispatch()
    for _ in range(10):
        driver.core.fleet.probe_now(A)
        driver.tick(1.0)
        driver.absent(A, silent=True)
        driver.status(A)
    assert driver.state(A) is EncoderState.UP and driver.at(base).url == A and len(driver.posts) == 1


def test_parts_of_a_suspect_encoder_that_answers_no_probe_move_in_the_end() -> None:
    driver = Driver(A, peer_timeout=6.0, wait=0.0)
    driver.status(A)
    driver.well(A)
    first, second = driver.dispatch(), driver.dispatch()
    driver.answer(driver.at(first).room, Verdict.CUT_OFF)
    kept = driver.at(second).room
    for _ in range(4):
        driver.tick(1.0)
        driver.absent(A, silent=True)
        driver.status(A)
    assert driver.state(A) is EncoderState.SUSPECT and driver.at(second).room == kept and driver.news == []
    for _ in range(4):
        driver.tick(1.0)
        driver.absent(A, silent=True)
        driver.status(A)
    assert driver.state(A) is EncoderState.DOWN and kept in driver.cancelled
    assert {news.room_base for news in driver.news if isinstance(news, GiveUp)} == {first, second}


def test_parts_of_an_encoder_that_is_known_no_more_go_on() -> None:
    driver = Driver(A, B)
    base = driver.dispatch()
    driver.know(B)
    assert driver.at(base).url == A
    driver.answer(driver.at(base).room, Verdict.DELIVERED)
    assert arrives(driver, base)
    lost = driver.dispatch(1.0)
    driver.know(A)
    driver.well(A)
    driver.answer(driver.at(lost).room, Verdict.CUT_OFF)
    assert driver.at(lost).url == A


def test_an_encoder_that_comes_back_has_the_parts_that_went_on() -> None:
    driver = Driver(A, B)
    base = driver.dispatch(3.0)
    driver.know(B)
    driver.know(A, B)
    assert driver.loads()[A] == (1, 3.0)
    driver.well(A)
    another = driver.dispatch(9.0, 9.0)
    assert driver.loads()[A] == (2, 12.0)
    driver.answer(driver.at(base).room, Verdict.DELIVERED)
    assert driver.loads()[A] == (1, 9.0) and another


# -- no encoder ----------------------------------------------------------------------------------------------------


def down(*urls: str, wait: float = 0.0) -> Driver:
    driver = Driver(*urls, wait=wait, up=False)
    for url in urls:
        driver.absent(url)
    return driver


def test_with_no_encoder_left_the_client_is_told_at_once_to_come_again() -> None:
    driver = down(A, B)
    base = driver.dispatch()
    assert driver.news == [GiveUp(base, 503, NO_ENCODER)] and driver.forgotten == [base] and driver.posts == []
    assert [(url, part.number, part.of) for url, part in driver.placed] == [(A, 0, 1)]
    driver = Driver(A)
    base = driver.dispatch()
    driver.answer(driver.at(base).room, Verdict.REFUSED)
    driver.absent(A)  # it may have come back in this moment
    assert driver.news == [GiveUp(base, 503, NO_ENCODER)]


def test_an_encoder_that_is_back_is_noticed_before_a_request_is_given_up() -> None:
    driver = down(A, B)
    driver.tick(0.1)
    base = driver.dispatch()
    assert driver.news == [] and sorted(driver.probes) == [A, B]
    driver.absent(B)
    driver.well(A)
    assert driver.at(base).url == A and driver.core.given_up == 0


def test_a_look_at_encoders_that_do_not_answer_takes_no_longer_than_half_a_second() -> None:
    driver = down(A, B)
    driver.tick(0.1)
    base = driver.dispatch()
    driver.absent(A)
    driver.tick(LOOK_SECONDS - 0.01)
    assert driver.news == []
    driver.tick(0.02)
    assert driver.news == [GiveUp(base, 503, NO_ENCODER)]
    assert len(driver.probes) == 0 or driver.probes.count(B) == 1, "one look is enough"


def hold(driver: Driver, seconds: float, *, leaves: bool, delivers: bool = False) -> None:
    """A part is at A until its client leaves, or until its deadline has passed."""
    driver.core.fleet.encoders[B].load.add(9.0, driver.now)  # so that A is chosen
    base = driver.dispatch(seconds=60.0 if leaves else seconds)
    other = driver.dispatch() if delivers else ""
    driver.core.fleet.encoders[B].load.remove(9.0)
    driver.now += seconds
    if delivers:
        driver.answer(driver.at(other).room, Verdict.DELIVERED)
    if leaves:
        driver.carry_out(driver.core.clients_gone([base], driver.now))
    driver.tick(6.0)
    assert base in driver.forgotten
    for url in (B, A):
        driver.well(url)


@pytest.mark.parametrize("leaves", [False, True])
def test_an_encoder_that_holds_parts_and_delivers_nothing_is_blamed(leaves: bool) -> None:
    driver = Driver(A, B)
    for _ in range(FAILURES_IN_A_ROW):
        hold(driver, 30.0, leaves=leaves)
    assert driver.state(A) is EncoderState.SUSPECT and "delivered nothing for" in driver.core.fleet.encoders[A].reason


def test_an_encoder_that_delivers_or_had_little_time_is_not_blamed() -> None:
    driver = Driver(A, B)
    for _ in range(FAILURES_IN_A_ROW):
        hold(driver, 30.0, leaves=True, delivers=True)
        hold(driver, 9.0, leaves=True)
    assert driver.state(A) is EncoderState.UP and driver.core.fleet.encoders[A].failed == 0


def test_a_client_that_leaves_takes_no_other_request_of_its_id_along() -> None:
    driver = Driver(A)
    first, second = driver.dispatch(rid="same"), driver.dispatch(rid="same")
    driver.carry_out(driver.core.clients_gone([first], driver.now))
    assert driver.forgotten == [first] and driver.at(second)
    assert driver.core.clients_gone([first, "another"], driver.now) == []


def test_a_part_leaves_an_encoder_that_was_taken_off_the_list_and_falls_silent() -> None:
    driver = Driver(A)
    base = driver.dispatch()
    driver.status(A)
    driver.know(B)
    driver.well(B)
    assert driver.at(driver.dispatch()).url == B
    driver.status(A, connected=False, silences=1)
    assert driver.at(base).url == B and A not in driver.core.fleet.encoders


def test_parts_whose_batch_failed_do_not_share_their_last_encoder() -> None:
    driver = Driver(A, B)
    driver.core.fleet.encoders[B].load.add(99.0, driver.now)  # so that A is chosen
    bases = [driver.dispatch() for _ in range(3)]
    assert {driver.at(base).url for base in bases} == {A}
    driver.core.fleet.encoders[B].load.remove(99.0)
    driver.tick(0.1)
    for base in bases:  # one image makes the whole batch fail
        driver.answer(driver.at(base).room, Verdict.ERROR)
    assert driver.core.fleet.encoders[A].errors == 1
    assert [bool(driver.news_of(base)) for base in bases] == [True, False, False]
    driver.answer(driver.at(bases[0]).room, Verdict.ERROR)
    assert isinstance(driver.news_of(bases[0])[-1], GiveUp) and driver.at(bases[1]).url == B
    driver.answer(driver.at(bases[1]).room, Verdict.DELIVERED)
    assert driver.at(bases[2]).url == B


def test_without_any_encoder_a_request_is_answered_too() -> None:
    driver = Driver()
    base = driver.dispatch_items([Item("IMAGE", 1.0), Item("AUDIO", 1.0)])
    assert driver.news == [GiveUp(base, 503, NO_ENCODER)] and [url for url, _ in driver.placed] == ["", ""]


def test_a_request_waits_for_the_first_probe_of_an_encoder_and_is_then_posted() -> None:
    driver = Driver(A, up=False)
    base = driver.dispatch_items([Item("IMAGE", 1.0), Item("IMAGE", 1.0), Item("AUDIO", 1.0)])
    driver.tick(1.0)
    assert driver.posts == [] and driver.news == [] and driver.core.report(driver.now)["waiting_parts"] == 2
    driver.well(A)
    assert [(post.url, post.part) for post in driver.posts] == [(A, 0), (A, 1)]
    # Its rooms are others than those that the scheduler was first told.
    assert driver.news == [Redispatched(base, post.part, A, post.room) for post in driver.posts]
    assert driver.core.redispatched == 0
    for post in list(driver.open.values()):
        driver.answer(post.room, Verdict.DELIVERED)
    assert arrives(driver, base)


def test_a_request_waits_as_long_as_it_may_and_is_served_when_an_encoder_returns() -> None:
    driver = down(A, wait=10.0)
    base = driver.dispatch()
    driver.tick(9.0)
    assert driver.news == []
    driver.well(A)
    assert driver.at(base).url == A


def test_a_request_that_has_waited_too_long_is_given_up() -> None:
    driver = down(A, wait=10.0)
    base = driver.dispatch()
    driver.tick(9.9)
    driver.absent(A)
    assert driver.news == []
    driver.tick(0.2)
    assert driver.news == [GiveUp(base, 503, NO_ENCODER)]


def test_a_part_that_lost_its_encoder_waits_anew() -> None:
    driver = Driver(A, wait=10.0)
    base = driver.dispatch(seconds=200.0)
    driver.now += 50.0
    driver.answer(driver.at(base).room, Verdict.REFUSED)
    driver.absent(A)
    driver.tick(9.0)
    assert driver.news == []
    driver.tick(2.0)
    assert driver.news == [GiveUp(base, 503, NO_ENCODER)]


def test_a_request_given_up_for_one_part_leaves_no_other_part_waiting() -> None:
    driver = down(A)
    base = driver.dispatch_items([Item("IMAGE", 1.0), Item("AUDIO", 1.0)])
    assert driver.news == [GiveUp(base, 503, NO_ENCODER)] and driver.forgotten == [base]
    assert driver.core.report(driver.now)["waiting_parts"] == 0


# -- time ----------------------------------------------------------------------------------------------------------


def test_a_request_whose_deadline_has_passed_is_forgotten_a_little_later() -> None:
    driver = Driver(A, B)
    base = driver.dispatch(5.0, 5.0, seconds=60.0)
    driver.tick(64.0)
    assert driver.forgotten == []
    driver.tick(1.5)
    assert driver.forgotten == [base] and driver.open == {} and driver.news == []
    assert driver.loads() == {A: (0, 0.0), B: (0, 0.0)}


def test_a_part_is_not_posted_after_its_deadline() -> None:
    driver = Driver(A, B)
    base = driver.dispatch(seconds=10.0)
    driver.now += 10.1
    driver.answer(driver.at(base).room, Verdict.LOST)
    assert len(driver.posts) == 1 and driver.news == []
    driver.tick(5.0)
    assert driver.forgotten == [base]


def test_ticks_probe_what_is_due_and_every_event_does_so_too() -> None:
    driver = Driver(A, up=False)
    assert driver.probes == [A]
    driver.absent(A)
    gaps = []
    for _ in range(1000):
        if Probe(A) in driver.tick(0.05):
            gaps.append(driver.now)
            driver.absent(A)
    assert len(gaps) > 10 and max(after - before for before, after in itertools.pairwise(gaps)) <= 3.06


# -- what operators see --------------------------------------------------------------------------------------------


def test_changes_of_states_are_logged_with_their_reasons() -> None:
    driver = Driver(A)
    driver.answer(driver.at(driver.dispatch()).room, Verdict.CUT_OFF, "the connection broke")
    assert f"Encoder {A}: suspect -> up: it answers" in driver.log
    assert f"Encoder {A}: up -> suspect: the connection broke" in driver.log


def test_the_report_names_each_encoder_with_its_state_and_work() -> None:
    driver = Driver(A, B)
    base = driver.dispatch(4.0)
    driver.answer(driver.at(base).room, Verdict.LOST)
    report = driver.core.report(driver.now)
    assert {key: report[key] for key in ("requests", "waiting_parts", "redispatched", "given_up")} == {
        "requests": 1, "waiting_parts": 0, "redispatched": 1, "given_up": 0
    }  # fmt: skip
    assert report["encoders"] == {
        A: {"state": "up", "reason": "it answers", "parts": 0, "work": 0.0, "tried": 1, "failed": 1},
        B: {"state": "up", "reason": "it answers", "parts": 1, "work": 4.0, "tried": 1, "failed": 0},
    }


def test_a_standing_of_another_kind_of_loss_moves_parts_too() -> None:
    driver = Driver(A, B)
    base = driver.dispatch()
    driver.reported(EncoderStatus(A, False, refusal="another model"))
    assert driver.at(base).url == B


def test_actions_are_of_the_kinds_that_were_asked_for() -> None:
    driver = Driver(A)
    base = driver.dispatch()
    room = driver.at(base).room
    assert driver.answer(room, Verdict.CUT_OFF) == [
        CancelPost(room), LogLine(WARNING, f"Encoder {A}: up -> suspect: why"), Probe(A)
    ]  # fmt: skip
    assert [type(action) for action in driver.well(A)] == [LogLine, Redispatched, LogLine, Post]
    driver.answer(driver.at(base).room, Verdict.DELIVERED)
    assert driver.tick(DELIVERED_SECONDS + 0.1) == [Forget(base)]
