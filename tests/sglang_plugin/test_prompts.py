"""Prompts that several requests have: their embeddings are expected, joined and given up once."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers.schedule_batch import Modality

from sglang_mm_conn.core.dispatch.actions import GiveUp, Redispatched
from sglang_mm_conn.core.errors import ConnError, TransferFailed
from sglang_mm_conn.core.outcomes import SUCCEEDED, Outcome
from sglang_mm_conn.core.rooms import new_id, new_room_base, part_room
from sglang_mm_conn.core.settings import Settings
from sglang_mm_conn.core.states import Poll
from sglang_mm_conn.sglang_plugin.news import PromptComes, PromptOver
from sglang_mm_conn.sglang_plugin.prompts import Prompts, RequestGivenUp
from sglang_mm_conn.sglang_plugin.scheduler import SchedulerReceiver

BASE = new_room_base(new_id())
ROOMS = [("http://encoder:1", part_room(BASE, 0)), ("http://encoder:2", part_room(BASE, 1))]


class Endpoint:
    """The language endpoint, whose rooms tests end. Joins run at once."""

    def __init__(self) -> None:
        self.states: dict[str, Poll] = {}
        self.expected: list[str] = []
        self.outcomes: dict[str, Outcome] = {}
        self.joins = 0

    def expect(self, room: str, encoder: str, timeout: float, label: str) -> None:
        if room in self.expected:
            raise ConnError(f"room {room} was expected before")
        assert timeout > 0
        self.expected.append(room)
        self.states[room] = Poll.Bootstrapping

    def poll(self, room: str) -> Poll:
        return self.states[room]

    def outcome(self, room: str) -> Outcome:
        return self.outcomes.get(room, SUCCEEDED)

    def take(self, room: str) -> tuple[torch.Tensor, bytes]:
        raise AssertionError("replaced by join")

    def abort(self, room: str, reason: str, code: int = 499) -> None:
        pass

    def forget(self, room: str) -> None:
        del self.states[room]

    def submit(self, work: Callable[[], Any]) -> Future[Any]:
        self.joins += 1
        future: Future[Any] = Future()
        future.set_result(("record", {Modality.IMAGE: torch.zeros(1)}))
        return future

    def fail(self, room: str, code: int) -> None:
        self.states[room], self.outcomes[room] = Poll.Failed, Outcome("the encoder is lost", code)


@pytest.fixture
def endpoint() -> Endpoint:
    return Endpoint()


@pytest.fixture
def prompts(endpoint: Endpoint) -> Prompts:
    manager: Any = SimpleNamespace(
        language_endpoint=endpoint, args=SimpleNamespace(timeout=60.0, settings=Settings(), leads=True)
    )
    return Prompts(manager, "qwen2_5_vl", report=lambda report: None)


def arrive(endpoint: Endpoint) -> None:
    for room in endpoint.states:
        endpoint.states[room] = Poll.Success


def test_the_embeddings_of_a_request_are_kept_until_it_has_left(prompts: Prompts, endpoint: Endpoint) -> None:
    prompt = prompts.use(BASE, "rid", lambda: ROOMS)
    assert prompt.poll(0.0) is None and endpoint.joins == 0
    arrive(endpoint)
    assert prompt.poll(0.0) == ("record", {Modality.IMAGE: torch.zeros(1)})
    prompts.leave(BASE)
    assert len(prompts) == 0 and endpoint.states == {}


def test_all_requests_of_a_prompt_have_one_transfer(prompts: Prompts, endpoint: Endpoint) -> None:
    prompts.expect(BASE, "rid", ROOMS, requests=3)
    first = prompts.use(BASE, "copy", lambda: [])
    arrive(endpoint)
    assert first.poll(0.0) is not None
    prompts.leave(BASE)
    others = [prompts.use(BASE, "copy", lambda: []) for _ in range(2)]
    assert all(other.poll(0.0) == first.poll(0.0) for other in others)
    prompts.leave(BASE)
    assert len(prompts) == 1 and endpoint.states
    prompts.leave(BASE)
    assert len(prompts) == 0 and endpoint.states == {}
    assert (endpoint.joins, endpoint.expected) == (1, [room for _, room in ROOMS])


def test_what_fails_a_prompt_fails_each_of_its_requests(prompts: Prompts, endpoint: Endpoint) -> None:
    prompts.expect(BASE, "rid", ROOMS, requests=2)
    first = prompts.use(BASE, "copy", lambda: [])
    prompts.heed(GiveUp(BASE, 503, "no encoder is available"))
    second = prompts.use(BASE, "copy", lambda: [])
    for one in (first, second):
        with pytest.raises(RequestGivenUp, match="no encoder") as error:
            one.poll(0.0)
        assert (error.value.code, error.value.reason) == (503, "no encoder is available")
        prompts.leave(BASE)
    assert endpoint.states == {}


def test_a_part_from_another_encoder_is_waited_for_and_all_are_joined_again(
    prompts: Prompts, endpoint: Endpoint
) -> None:
    prompt = prompts.use(BASE, "rid", lambda: ROOMS)
    arrive(endpoint)
    assert prompt.poll(0.0) is not None
    new = part_room(new_room_base(new_id()), 1)
    prompts.heed(Redispatched(BASE, 1, "http://encoder:3", new))
    assert prompt.poll(0.0) is None and new in endpoint.states and ROOMS[1][1] not in endpoint.states
    arrive(endpoint)
    assert prompt.poll(0.0) is not None and endpoint.joins == 2


def test_a_part_that_cannot_be_expected_fails_the_prompt_and_not_the_scheduler(
    prompts: Prompts, endpoint: Endpoint
) -> None:
    prompt = prompts.use(BASE, "rid", lambda: ROOMS)
    prompts.heed(Redispatched(BASE, 1, "http://encoder:3", ROOMS[0][1]))
    with pytest.raises(ConnError, match="before"):
        prompt.poll(0.0)
    with pytest.raises(ConnError, match="before"):
        prompts.expect(new_room_base(new_id()), "rid", ROOMS, requests=1)
    assert len(prompts) == 1


def test_a_room_that_fails_before_its_request_has_come_is_asked_about_at_once(endpoint: Endpoint) -> None:
    asked: list[Any] = []
    manager: Any = SimpleNamespace(language_endpoint=endpoint, args=SimpleNamespace(timeout=60.0, settings=Settings()))
    prompts = Prompts(manager, "qwen2_5_vl", report=asked.append)
    prompts.expect(BASE, "rid", ROOMS, requests=1)
    endpoint.fail(ROOMS[0][1], 502)
    prompts.sweep(0.0)
    assert [one.room for one in asked] == [ROOMS[0][1]]
    endpoint.fail(ROOMS[1][1], 413)
    prompts.sweep(0.1)
    with pytest.raises(TransferFailed):
        prompts.use(BASE, "rid", lambda: []).poll(0.2)


def test_requests_that_never_come_keep_nothing(prompts: Prompts, endpoint: Endpoint) -> None:
    prompts.expect(BASE, "rid", ROOMS, requests=3)
    prompts.expect_no_more(BASE)  # its client has gone
    assert len(prompts) == 0 and endpoint.states == {}
    other = new_room_base(new_id())
    prompts.expect(other, "rid", [("http://encoder:1", part_room(other, 0))], requests=3)
    prompts.sweep(time.monotonic() + 3590)
    assert len(prompts) == 1
    prompts.sweep(time.monotonic() + 3610)
    assert len(prompts) == 0 and endpoint.states == {}
    prompts.expect_no_more(BASE)
    prompts.heed(GiveUp(BASE, 503, "late"))


def test_news_reach_the_requests_of_their_room_base_whatever_others_have_the_same_id(prompts: Prompts) -> None:
    other = new_room_base(new_id())
    receiver = SchedulerReceiver.__new__(SchedulerReceiver)
    receiver.prompts = prompts
    again: list[str] = []
    receiver.waiting_list = [
        SimpleNamespace(rid="same", room_base=base, wait_again=lambda base=base: again.append(base))  # type: ignore[misc]
        for base in (BASE, other)
    ]
    receiver._heed(PromptComes(BASE, "rid", ROOMS, 2))
    receiver._heed(PromptComes(other, "rid", ROOMS, 2))  # cannot be expected, which its requests are told
    receiver._heed(Redispatched(BASE, 0, "http://encoder:3", part_room(other, 0)))
    assert len(prompts) == 1 and again == [BASE]
    receiver._heed(PromptOver(BASE))
    assert len(prompts) == 0
