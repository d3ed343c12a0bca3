"""Whole servers under faults: clients that leave, requests that are refused, encoders and language servers that die,
freeze and come back while clients ask. What docs/reliability.md says of whole servers is shown here.

All tests of one data path use the same servers; each leaves them idle, and a server that it killed is started again.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import requests

from sglang_mm_conn.demo.chat import Answer, ask
from sglang_mm_conn.demo.images import Image
from sglang_mm_conn.demo.questions import QUESTIONS, Question
from sglang_mm_conn.demo.servers import ServerGroup
from tests.faults.baseline import Segments
from tests.servers.clients import BackgroundAsk, ConcurrentRequests, LeavingClient
from tests.servers.observe import (
    Holdings,
    encodes_begun,
    encodes_held,
    is_idle,
    report,
    rooms_ended,
    segments_of,
    wait_until,
)

TEXT, ONE_IMAGE, LARGE = QUESTIONS[0], QUESTIONS[1], QUESTIONS[-1]
# Its 380 rows go through a pool of 2: the transfer takes 190 windows, long enough to be caught in the middle.
LONG = Question("190 windows", "describe", (Image(seed=20, width=560, height=532),))
UNDER_WAY = {"queued", "offered", "copying"}
CONCURRENT = (TEXT, ONE_IMAGE, QUESTIONS[2], TEXT, LARGE, QUESTIONS[5])
DEADLINE, PEER_TIMEOUT, CLAIM_TIMEOUT = 20, 6, 4
# Idle connections to an encoder are closed after this time (uvicorn's limit; the dispatcher's is shorter).
HTTP_KEPT = 6
# For whatever a busy machine adds to a time that is promised.
SLACK = 20
ENV = {
    "CPU_BED_FORBID_BUILTIN_TRANSPORT": "1",
    "SGLANG_MM_CONN_CHECKSUM": "1",
    "SGLANG_EMBEDDING_CACHE_BLOCK_SIZE": "1",
    "SGLANG_EMBEDDING_CACHE_BUFFER_SIZE": "2",
    "SGLANG_ENCODER_RECV_TIMEOUT": str(DEADLINE),
    "SGLANG_MM_CONN_HEARTBEAT_SECONDS": "0.5",
    "SGLANG_MM_CONN_PEER_TIMEOUT_SECONDS": str(PEER_TIMEOUT),
    "SGLANG_MM_CONN_CLAIM_TIMEOUT_SECONDS": str(CLAIM_TIMEOUT),
    "SGLANG_MM_CONN_DOUBT_SECONDS": "1",
    "SGLANG_REQUEST_STATE_WAIT_TIMEOUT": "1",  # how often sglang looks whether a client is still there
    # What the model frees goes back to the kernel, so that what a process holds is what is seen of it. Otherwise an
    # encoder's heap comes and goes by 150 MB with the batches that sglang happens to make (and keeps,
    # memory/malloc.py).
    "MALLOC_MMAP_THRESHOLD_": "262144",
}


@pytest.fixture(scope="module", params=("shm", "mooncake"))
def group(request: pytest.FixtureRequest, shared_group: Callable[..., ServerGroup]) -> ServerGroup:
    # An idle scheduler spins otherwise, and takes a core from the encoder.
    flags = ("--sleep-on-idle",)
    return shared_group("qwen2_5_vl", env={**ENV, "SGLANG_MM_CONN_DATA_PATH": request.param}, language_flags=flags)


@pytest.fixture
def right(reference: Callable[..., Any]) -> Callable[[Question], Answer]:
    """What a colocated server answers."""
    return lambda question: reference("qwen2_5_vl").answer(question)


@contextmanager
def frozen(group: ServerGroup) -> Iterator[None]:
    group.encoder.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        group.encoder.signal(signal.SIGCONT)


@contextmanager
def frozen_in_transfer(group: ServerGroup) -> Iterator[None]:
    """The encoder frozen while blocks are offered to it. A request must be on its way."""
    until = time.monotonic() + DEADLINE  # of the request, which a busy machine encodes slowly
    while time.monotonic() < until:
        if UNDER_WAY & report(group.language)["rooms"].keys():
            with frozen(group):
                time.sleep(0.2)  # what was confirmed before is copied out by now
                if report(group.language)["rooms"].get("offered"):
                    yield
                    return
    raise AssertionError("no transfer was seen")


def wait_settled(group: ServerGroup, seconds: float = SLACK) -> None:
    """Nothing is left of any request: on the language server, and on the encoder, which holds no /encode any more."""
    wait_until(lambda: is_idle(group.language), f"idle: {report(group.language)}", seconds)
    wait_until(lambda: encodes_held(group.encoder) == 0, "every /encode has ended", seconds)


def wait_encoder_is_used(group: ServerGroup) -> None:
    """The dispatcher finds by a probe that the encoder is back."""

    def is_used() -> bool:
        before = encodes_begun(group.encoder)
        answer = ask(group.language.url, ONE_IMAGE)
        assert answer.ok or answer.status == 503, answer
        return encodes_begun(group.encoder) > before

    wait_until(is_used, "the encoder is asked again", DEADLINE + SLACK)


def check_serves(group: ServerGroup, right: Callable[[Question], Answer]) -> None:
    for question in (TEXT, ONE_IMAGE, LARGE):
        got = ask(group.language.url, question)
        assert got.same_as(right(question)), (question.name, got)


def abort(group: ServerGroup, rid: str) -> None:
    requests.post(f"{group.language.url}/abort_request", json={"rid": rid}, timeout=10).raise_for_status()


# -- clients that leave, requests that are aborted or refused ---------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True], ids=("waiting", "streaming"))
def test_a_client_that_leaves_at_any_moment_leaves_nothing_behind(
    stream: bool, group: ServerGroup, right: Callable[[Question], Answer]
) -> None:
    ask_long = partial(LeavingClient, group.language.url, LONG, stream=stream)
    with frozen(group):  # the encode has not begun
        client = ask_long()
        wait_until(lambda: report(group.language)["rooms"] == {"expected": 1}, "the room is expected", SLACK)
        client.leave()
        wait_until(lambda: not report(group.language)["rooms"], "the room is given up", SLACK)
    wait_settled(group)

    client = ask_long()
    with frozen_in_transfer(group):
        client.leave()
        wait_until(lambda: not report(group.language)["rooms"], "the room is given up", SLACK)
        assert report(group.language)["quarantined"], "the frozen encoder may still write its blocks"
    wait_settled(group)

    client = LeavingClient(group.language.url, replace(LONG, max_tokens=1500), stream=stream)
    if stream:
        client.wait_first_chunk()
    else:
        received = group.language.log().count("Embedding received")
        wait_until(
            lambda: group.language.log().count("Embedding received") > received, "it is generated", DEADLINE + SLACK
        )
    client.leave()
    wait_settled(group)
    check_serves(group, right)


def test_request_aborted_at_any_moment_is_answered_at_once_and_leaves_nothing_behind(
    group: ServerGroup, right: Callable[[Question], Answer]
) -> None:
    language = group.language
    with frozen(group):
        waiting = BackgroundAsk(language.url, LONG, rid="aborted-early")
        wait_until(lambda: report(language)["rooms"] == {"expected": 1}, "the room is expected", SLACK)
        abort(group, "aborted-early")
        answer = waiting.answer()
        assert answer.ok and answer.finish == "abort" and not answer.text
    wait_settled(group)

    waiting = BackgroundAsk(language.url, LONG, rid="aborted-in-transfer")
    with frozen_in_transfer(group):
        abort(group, "aborted-in-transfer")
        answer = waiting.answer()
        assert answer.ok and answer.finish == "abort" and not answer.text
    wait_settled(group)

    received = language.log().count("Embedding received")
    waiting = BackgroundAsk(language.url, replace(LONG, max_tokens=1500), rid="aborted-late")
    wait_until(lambda: language.log().count("Embedding received") > received, "it is generated", DEADLINE + SLACK)
    abort(group, "aborted-late")
    answer = waiting.answer()
    assert answer.ok and answer.finish == "abort"
    wait_settled(group)
    check_serves(group, right)


def test_request_refused_after_dispatch_leaves_nothing_behind(
    group: ServerGroup, right: Callable[[Question], Answer]
) -> None:
    refused = ask(group.language.url, LARGE, more={"temperature": -1})
    assert refused.status == 400 and "temperature" in refused.error
    wait_settled(group, CLAIM_TIMEOUT + SLACK)  # the encoder may have got it before its dispatcher gave it up

    too_long = ask(group.language.url, replace(LARGE, text="word " * 3000))
    assert too_long.status == 400 and "is longer than the model's context" in too_long.error
    no_image = ask(group.language.url, TEXT, more={"messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,bm90IGFuIGltYWdl"}},
    ]}]})  # fmt: skip
    assert no_image.status == 400, no_image
    wait_settled(group)
    check_serves(group, right)


def test_every_room_that_fails_is_one_line_in_the_encoders_log_and_no_traceback(group: ServerGroup) -> None:
    lines = [line for line in group.encoder.log().splitlines() if "Embedding not sent" in line]
    rooms = [line.split("room=")[1].split()[0] for line in lines]
    assert len(rooms) >= 2 and len(rooms) == len(set(rooms)), "\n".join(lines)
    for server in group.servers:
        assert "/sglang_mm_conn/" not in server.log(), "a traceback of ours: sglang writes some of its own"


def test_rounds_of_requests_that_come_and_go_hold_nothing_in_the_end(
    group: ServerGroup, right: Callable[[Question], Answer]
) -> None:
    def rounds(count: int) -> list[Holdings]:
        for number in range(count):
            leaving = [LeavingClient(group.language.url, LARGE, stream=stream) for stream in (False, True)]
            asking = [
                BackgroundAsk(group.language.url, question, rid=f"round-{number}-{index}")
                for index, question in enumerate((LARGE, ONE_IMAGE, TEXT, LARGE))
            ]
            assert ask(group.language.url, ONE_IMAGE, more={"temperature": -1}).status == 400
            abort(group, f"round-{number}-3")
            for client in leaving:
                client.leave()
            for waiting, question in zip(asking, (LARGE, ONE_IMAGE, TEXT), strict=False):
                assert waiting.answer().same_as(right(question)), (question.name, waiting.answer())
            asking[3].answer()
        wait_settled(group, CLAIM_TIMEOUT + SLACK)
        time.sleep(HTTP_KEPT)
        return [Holdings.of(server) for server in group.servers]

    for was, now in zip(rounds(2), rounds(6), strict=True):
        # 48 requests: one descriptor, socket or thread kept of each kind of them would be 6 more.
        assert now.descriptors < was.descriptors + 6 and now.sockets < was.sockets + 6, (was, now)
        assert now.threads < was.threads + 6, (was, now)
        assert now.rss_mb < was.rss_mb + 64, (was, now)


# -- encoders that die and freeze while clients ask -------------------------------------------------------------------


def check_concurrent(concurrent: ConcurrentRequests, right: Callable[[Question], Answer]) -> set[int]:
    """Every answer is right, or an error that says why, in time; a text is always answered. Returns the errors."""
    statuses = set()
    for one in concurrent.asked:
        assert one.answer is not None, f"{one.question.name}: no answer within {one.seconds:.1f} s"
        if one.answer.same_as(right(one.question)):
            continue
        assert one.question.images, one
        assert one.answer.status == 503 and one.answer.error, one
        assert one.seconds < DEADLINE + SLACK, one
        statuses.add(one.answer.status)
    return statuses


def test_clients_get_answers_or_clear_errors_while_the_encoder_freezes_and_dies(
    group: ServerGroup, right: Callable[[Question], Answer]
) -> None:
    for question in CONCURRENT:
        right(question)
    ask_all = partial(ConcurrentRequests, group.language.url, CONCURRENT, clients=3, timeout=DEADLINE + 3 * SLACK)
    with ask_all() as concurrent:
        concurrent.wait_for_more(6)
        with frozen(group):
            time.sleep(PEER_TIMEOUT / 2)
        concurrent.wait_for_more(6)
    assert check_concurrent(concurrent, right) == set(), "a freeze shorter than the peer timeout costs nobody an answer"

    with ask_all() as concurrent:
        concurrent.wait_for_more(3)
        group.encoder.signal(signal.SIGKILL)
        concurrent.wait_for_more(12)
        group.encoder.stop()
        group.encoder.start()
        group.encoder.wait_ready()
        concurrent.wait_for_more(12)
    wait_encoder_is_used(group)
    assert check_concurrent(concurrent, right), "no encoder was left"
    wait_settled(group)
    check_serves(group, right)

    with ask_all() as concurrent:
        concurrent.wait_for_more(3)
        with frozen(group):
            time.sleep(DEADLINE + 2)
        concurrent.wait_for_more(12)
    wait_encoder_is_used(group)
    assert check_concurrent(concurrent, right)
    wait_settled(group, CLAIM_TIMEOUT + SLACK)
    check_serves(group, right)


# -- language servers that die ----------------------------------------------------------------------------------------


def test_language_server_that_dies_costs_the_encoder_nothing_and_the_next_is_served(
    group: ServerGroup, right: Callable[[Question], Answer], request: pytest.FixtureRequest
) -> None:
    encoder, language = group.encoder, group.language
    shared = "mooncake" not in request.node.name
    others = Segments()
    try:
        wait_encoder_is_used(group)
        before = encodes_begun(encoder)
        asking = [BackgroundAsk(language.url, LONG) for _ in range(3)]
        with frozen_in_transfer(group):
            wait_until(lambda: sum(report(language)["rooms"].values()) == 3, "all are on their way", SLACK)
            left = segments_of(encoder)  # where it has a name: its owner made it before it had one
            assert len(left) == (1 if shared else 0)
            language.signal(signal.SIGKILL)
        assert [waiting.answer().status for waiting in asking] == [0, 0, 0]
        language.stop()
        assert not others.problems(living=left, dead=[]), "what a killed server leaves is there until the next start"
        wait_until(
            lambda: rooms_ended(encoder) == encodes_begun(encoder) >= before + 3,
            "the encoder gave every room of it up",
            PEER_TIMEOUT + CLAIM_TIMEOUT + SLACK,
        )  # fmt: skip
        assert encoder.alive and not segments_of(encoder), "the dead one's memory is not kept"

        language.start()
        language.wait_ready()
        check_serves(group, right)
        living = segments_of(encoder)
        assert len(living) == len(left) and not others.problems(living=living, dead=left)

        last = BackgroundAsk(language.url, LONG)
        wait_until(lambda: bool(report(language)["rooms"]), "it is on its way", SLACK)
        os.kill(language.pid, signal.SIGTERM)
        assert last.answer().same_as(right(LONG)), "what was asked before is answered"
        wait_until(lambda: not language.alive, "sglang ends by itself", 60)
        assert not others.problems(living=[], dead=[])
        assert encoder.alive and rooms_ended(encoder) == encodes_begun(encoder)
    finally:
        others.close()
