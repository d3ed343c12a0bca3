"""An encoder of several processes: data parallel workers, each with its own embeddings, or tensor parallel ranks."""

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sglang_mm_conn.demo.chat import ask
from sglang_mm_conn.demo.images import Image
from sglang_mm_conn.demo.questions import QUESTIONS, Question
from sglang_mm_conn.demo.servers import Server, ServerGroup
from sglang_mm_conn.demo.timeline import received

TEXT, ONE_IMAGE, LARGE = QUESTIONS[0], QUESTIONS[1], QUESTIONS[-1]
ENV = {
    "CPU_BED_FORBID_BUILTIN_TRANSPORT": "1",
    "SGLANG_MM_CONN_CHECKSUM": "1",
    "SGLANG_EMBEDDING_CACHE_BLOCK_SIZE": "16",
    "SGLANG_EMBEDDING_DEFAULT_ALLOCATE_BUFFER_SIZE": "10",  # so every embedding is resumed
}
# Images that no other test asks about: the encoder has none of them in its cache.
CONCURRENT = tuple(
    Question(f"concurrent {seed}", "what is this?", (Image(seed, 168, 140), Image(seed + 1)))
    for seed in range(60, 72, 2)
)


def _spawned(server: Server) -> list[int]:
    """Process ids of the workers that the server's own process spawned, in the order of their ranks."""
    children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
    spawned = [pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return [int(pid) for pid in spawned]


def _gone(pids: list[int]) -> bool:
    def alive(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except (FileNotFoundError, ProcessLookupError):
            return False

    return not any(alive(pid) for pid in pids)


def _killed_with_its_server(server: Server, pids: list[int]) -> bool:
    """Whether the processes end when the server's own process is killed, and nothing else is done to them."""
    guard = server._guard
    assert guard is not None
    guard.send_signal(signal.SIGSTOP)  # it would kill them
    try:
        os.kill(server.pid, signal.SIGKILL)
        return _wait_until(lambda: _gone(pids), 20)
    finally:
        guard.send_signal(signal.SIGCONT)


def _wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _all_right(url: str, questions: tuple[Question, ...], reference: Any) -> None:
    expected = [reference.answer(question) for question in questions]
    with ThreadPoolExecutor(4) as clients:
        got = list(clients.map(lambda question: ask(url, question), questions))
    for question, one, right in zip(questions, got, expected, strict=True):
        assert one.same_as(right), (question.name, one, right)


def test_data_parallel_workers_all_serve_and_the_others_take_over_from_one_that_dies(
    reference: Callable[..., Any], new_group: Callable[..., ServerGroup]
) -> None:
    right = reference("qwen2_5_vl")
    for question in (*QUESTIONS, *CONCURRENT):
        right.answer(question)
    group = new_group("qwen2_5_vl", env=ENV, encoder_flags=("--dp-size", "2"))
    encoder, language = group.encoder, group.language
    _all_right(language.url, (*QUESTIONS, *CONCURRENT), right)
    for rank in (0, 1):
        mine = [line for line in encoder.log().splitlines() if f"encode_dp_worker[{rank}]" in line]
        assert any("Embedding sent" in line for line in mine), f"worker {rank} sent nothing"
    assert all(room.resumes for room in received(language.log()))
    assert encoder.log().count("forbidden in this process") == 3, "every encoder process has its plugins"

    workers = _spawned(encoder)
    assert len(workers) == 2
    with ThreadPoolExecutor(4) as clients:  # frozen with requests on their way to it, then killed
        os.kill(workers[1], signal.SIGSTOP)
        answers = [clients.submit(ask, language.url, question) for question in CONCURRENT]
        time.sleep(1)
        os.kill(workers[1], signal.SIGKILL)
        got = [answer.result() for answer in answers]
    for one, question in zip(got, CONCURRENT, strict=True):
        assert one.same_as(right.answer(question)), (question.name, one)
    assert "goes from" in language.log(), "the frozen worker had none of the requests"
    _all_right(language.url, (*QUESTIONS, *CONCURRENT), right)

    assert _killed_with_its_server(encoder, workers)


def test_tensor_parallel_ranks_encode_together_and_rank_0_sends(
    reference: Callable[..., Any], new_group: Callable[..., ServerGroup]
) -> None:
    group = new_group("qwen2_5_vl", env=ENV, encoder_flags=("--tp-size", "2"))
    encoder, language = group.encoder, group.language
    _all_right(language.url, QUESTIONS, reference("qwen2_5_vl"))
    assert all(room.resumes for room in received(language.log()))
    assert encoder.log().count("conn_multimodal encoder") == 1, "the rank that holds no embedding has a control port"
    assert encoder.log().count("forbidden in this process") == 2, "every encoder process has its plugins"
    followers = _spawned(encoder)
    assert len(followers) == 1
    assert _killed_with_its_server(encoder, followers)
