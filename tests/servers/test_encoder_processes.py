"""An encoder of several processes: data parallel workers, each with embeddings of its own, and tensor parallel ranks."""

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from sglang_mm_conn.demo.chat import ask
from sglang_mm_conn.demo.images import Image
from sglang_mm_conn.demo.questions import QUESTIONS, Question
from sglang_mm_conn.demo.servers import Server, ServerGroup
from sglang_mm_conn.demo.timeline import received

TEXT, ONE_IMAGE, LARGE = QUESTIONS[0], QUESTIONS[1], QUESTIONS[-1]
ENV = {
    "CPU_BED_FORBID_STOCK_TRANSPORT": "1",
    "SGLANG_MM_CONN_CHECKSUM": "1",
    "SGLANG_EMBEDDING_CACHE_BLOCK_SIZE": "16",
    "SGLANG_EMBEDDING_DEFAULT_ALLOCATE_BUFFER_SIZE": "10",  # so every embedding is resumed
}
# Images that no other test asks about: the encoder has none of them in its cache.
CROWD = tuple(
    Question(f"crowd {seed}", "what is this?", (Image(seed, 168, 140), Image(seed + 1))) for seed in range(60, 72, 2)
)


def _children(pid: int) -> list[int]:
    return [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in task.joinpath("children").read_text().split()]


def _processes_named(server: Server, function: str) -> list[int]:
    """Process ids of the server's children whose command line shows a spawned Python; oldest first."""
    found = []
    for pid in _children(server.pid):
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if any(b"spawn_main" in word for word in command):
            found.append(pid)
    return sorted(found)


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


def test_two_data_parallel_workers_both_serve_and_one_serves_on_when_the_other_dies(
    reference: Callable[..., Any], new_group: Callable[..., ServerGroup], tmp_path: Path
) -> None:
    for question in (*QUESTIONS, *CROWD):
        reference("qwen2_5_vl").answer(question)
    group = new_group("qwen2_5_vl", env=ENV, encoder_flags=("--dp-size", "2"))
    encoder, language = group.encoder, group.language
    _all_right(language.url, (*QUESTIONS, *CROWD), reference("qwen2_5_vl"))
    for rank in (0, 1):
        mine = [line for line in encoder.log().splitlines() if f"encode_dp_worker[{rank}]" in line]
        assert any("Embedding sent" in line for line in mine), f"worker {rank} sent nothing"
        assert any("forbidden in this process" in line for line in encoder.log().splitlines())
    assert all(room.resumes for room in received(language.log()))
