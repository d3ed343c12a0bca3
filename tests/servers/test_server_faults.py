"""The only encoder dies: the client hears of it, the language server lives on, and uses the next one."""

import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from sglang_mm_conn.demo.chat import Answer, ask
from sglang_mm_conn.demo.questions import QUESTIONS, Question
from sglang_mm_conn.demo.servers import Server, ServerGroup

TEXT, ONE_IMAGE = QUESTIONS[0], QUESTIONS[1]
LARGE = QUESTIONS[-1]
DEADLINE_SECONDS = 25
PEER_TIMEOUT_SECONDS = 10  # the setting's default
FOUND_SECONDS = 5  # an encoder that is back is used so soon
ENV = {
    "CPU_BED_FORBID_BUILTIN_TRANSPORT": "1",
    "SGLANG_MM_CONN_CHECKSUM": "1",
    "SGLANG_EMBEDDING_CACHE_BLOCK_SIZE": "16",
    "SGLANG_EMBEDDING_CACHE_BUFFER_SIZE": "4",
    "SGLANG_ENCODER_RECV_TIMEOUT": str(DEADLINE_SECONDS),
}


def _restart(dead: Server, log_dir: Any) -> Server:
    """A new encoder on the port of a dead one; the language server is not told."""
    dead.stop()
    server = Server(dead.launch, log_dir, name=f"{dead.name}-again", port=dead.port)
    server.start()
    server.wait_ready()
    return server


def _ask_when_up(url: str, question: Question) -> Answer:
    """The answer as soon as the language server has found that an encoder is up."""
    until = time.monotonic() + FOUND_SECONDS
    while (answer := ask(url, question)).status == 503 and time.monotonic() < until:
        time.sleep(0.1)
    return answer


def _ask_in_background(url: str, question: Any) -> tuple[threading.Thread, list[Answer]]:
    answers: list[Answer] = []
    thread = threading.Thread(target=lambda: answers.append(ask(url, question, timeout=DEADLINE_SECONDS + 20)))
    thread.start()
    return thread, answers


@pytest.mark.parametrize("path", ["shm", "mooncake"])
def test_encoder_dead_frozen_and_killed_midway_then_restarted_on_the_same_port(
    path: str, reference: Callable[..., Any], new_group: Callable[..., ServerGroup], tmp_path: Any
) -> None:
    group = new_group("qwen2_5_vl", env={**ENV, "SGLANG_MM_CONN_DATA_PATH": path})
    language = group.language
    right = {question.name: reference("qwen2_5_vl").answer(question) for question in (TEXT, ONE_IMAGE, LARGE)}
    assert ask(language.url, LARGE).same_as(right[LARGE.name])

    # Frozen while a request is on its way to it, then killed: the request is in the middle for certain.
    group.encoder.signal(signal.SIGSTOP)
    thread, answers = _ask_in_background(language.url, LARGE)
    time.sleep(1)
    group.encoder.signal(signal.SIGKILL)
    thread.join(DEADLINE_SECONDS + 20)
    assert answers and answers[0].status >= 500, answers

    # Dead: an error at once.
    began = time.monotonic()
    assert ask(language.url, ONE_IMAGE).status == 503
    assert time.monotonic() - began < 2
    assert ask(language.url, TEXT).same_as(right[TEXT.name]), "the language server lives on"

    encoder = _restart(group.encoder, tmp_path)
    try:
        assert _ask_when_up(language.url, LARGE).same_as(right[LARGE.name]), "the restarted encoder serves"
        # Killed at moments that fall anywhere in preprocessing, model and transfer.
        for delay in (0.0, 0.02, 0.05):
            thread, answers = _ask_in_background(language.url, LARGE)
            time.sleep(delay)
            encoder.signal(signal.SIGKILL)
            thread.join(DEADLINE_SECONDS + 20)
            assert answers, "no answer within the deadline"
            assert answers[0].status >= 500 or answers[0].same_as(right[LARGE.name]), answers
            encoder = _restart(encoder, tmp_path)
            assert _ask_when_up(language.url, LARGE).same_as(right[LARGE.name])
        for question in (TEXT, ONE_IMAGE, LARGE):
            assert ask(language.url, question).same_as(right[question.name])
    finally:
        encoder.stop()


def test_the_only_encoder_frozen_costs_a_request_the_peer_timeout_and_no_more(
    reference: Callable[..., Any], new_group: Callable[..., ServerGroup]
) -> None:
    group = new_group("qwen2_5_vl", env=ENV)
    right = reference("qwen2_5_vl").answer(LARGE)
    group.encoder.signal(signal.SIGSTOP)
    began = time.monotonic()
    answer = ask(group.language.url, LARGE, timeout=DEADLINE_SECONDS + 20)
    took = time.monotonic() - began
    group.encoder.signal(signal.SIGCONT)
    assert answer.status == 503 and took < PEER_TIMEOUT_SECONDS + 8, (answer, took)
    assert _ask_when_up(group.language.url, LARGE).same_as(right), "it serves again without a restart"
