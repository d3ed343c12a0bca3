"""A language server of two tensor-parallel ranks: one copy of each embedding crosses, both ranks have it or neither."""

import os
import re
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import requests

from sglang_mm_conn.demo.chat import Answer, ask
from sglang_mm_conn.demo.images import Image
from sglang_mm_conn.demo.questions import QUESTIONS, Question
from sglang_mm_conn.demo.servers import Server, ServerGroup, free_port
from sglang_mm_conn.demo.timeline import received
from sglang_mm_conn.memory.results import _name
from sglang_mm_conn.memory.segment import DIRECTORY
from tests.servers.clients import ConcurrentRequests
from tests.servers.conftest import SharedGroups

TEXT, ONE_IMAGE, LARGE = QUESTIONS[0], QUESTIONS[1], QUESTIONS[-1]
ENV = {
    "CPU_BED_FORBID_BUILTIN_TRANSPORT": "1",
    "SGLANG_MM_CONN_CHECKSUM": "1",
    "SGLANG_EMBEDDING_CACHE_BLOCK_SIZE": "16",
    "SGLANG_EMBEDDING_CACHE_BUFFER_SIZE": "4",  # smaller than one embedding
    "SGLANG_EMBEDDING_DEFAULT_ALLOCATE_BUFFER_SIZE": "20",
}
# sglang binds the ranks of a server on CPUs to cores.
LANGUAGE_ENV = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
# An idle rank must be woken by the end of a room, which only the first rank hears of: from the sleep that users ask for
# in one of the tests, from this connector's own in the others.
LANGUAGE_FLAGS = ("--tp-size", "2")
CONCURRENT = tuple(
    Question(f"concurrent {seed}", "what is this?", (Image(seed, 168, 140), Image(seed + 1)))
    for seed in range(80, 92, 2)
)
_SHARED = re.compile(r"TP1\] Embedding shared: room=(\S+) .*bytes=(\d+) rank=1")


@dataclass(frozen=True)
class NotAnImage(Image):
    """Bytes that no encoder can decode."""

    def data_uri(self) -> str:
        return "data:image/png;base64,bm90IGFuIGltYWdl"


def _ask_all(url: str, questions: tuple[Question, ...], clients: int = 1) -> list[Answer]:
    with ThreadPoolExecutor(clients) as pool:
        return list(pool.map(lambda question: ask(url, question), questions))


def _check_all(url: str, reference: Any, questions: tuple[Question, ...], clients: int = 1) -> None:
    expected = [reference.answer(question) for question in questions]
    for question, got, right in zip(questions, _ask_all(url, questions, clients), expected, strict=True):
        assert got.same_as(right), (question.name, got, right)


def _check_one_copy(group: ServerGroup) -> None:
    """Every row that an encoder sent was received by one rank, and read by the other from the same memory."""
    log = group.language.log()
    rooms = received(log)
    assert rooms and "TP1] Embedding received" not in log
    assert {room.room: room.bytes for room in rooms} == {room: int(nbytes) for room, nbytes in _SHARED.findall(log)}
    sent = re.findall(r"Embedding sent: room=(\S+) tokens=(\d+)", "".join(one.log() for one in group.encoders))
    assert sorted((room, int(tokens)) for room, tokens in sent) == sorted((room.room, room.tokens) for room in rooms)
    assert {size for one in group.encoders for size in re.findall(r"Language rank 0 of (\d+)", one.log())} == {"1"}
    assert log.count("Embedding pool:") == 1, "the second rank has no pool"
    _check_no_names(group)


def _check_no_names(group: ServerGroup) -> None:
    """Soon, that is: a request whose client is gone may wait for the next tick."""
    rooms = [room.room for room in received(group.language.log())]

    def with_names() -> list[str]:
        return [room for room in rooms if os.path.exists(os.path.join(DIRECTORY, _name(room, 0)))]

    assert _wait_until(lambda: not with_names(), 20), with_names()


def _wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _second_rank(server: Server) -> int:
    """Process id of rank 1."""
    for pid in Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split():
        if b"scheduler_TP1" in Path(f"/proc/{pid}/cmdline").read_bytes():
            return int(pid)
    raise AssertionError("rank 1 is not there")


@contextmanager
def _no_descriptor_left(pid: int) -> Iterator[None]:
    """The process can open nothing meanwhile."""
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, hard))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))


def test_two_ranks_on_shared_memory_answer_like_one_and_fail_together(
    reference: Callable[..., Any], new_group: Callable[..., ServerGroup]
) -> None:
    right = reference("qwen2_5_vl")
    for question in (*QUESTIONS, *CONCURRENT):
        right.answer(question)
    group = new_group(
        "qwen2_5_vl", env={**ENV, "SGLANG_MM_CONN_DATA_PATH": "shm"}, encoder_flags=("--dp-size", "2"),
        language_env=LANGUAGE_ENV, language_flags=LANGUAGE_FLAGS,
    )  # fmt: skip
    language = group.language
    _check_all(language.url, right, QUESTIONS)
    _check_all(language.url, right, CONCURRENT, clients=4)
    assert all(room.path == "shm" for room in received(language.log()))
    assert max(room.resumes for room in received(language.log())) >= 2
    _check_one_copy(group)

    second = _second_rank(language)
    with _no_descriptor_left(second):  # the embedding is there, and one rank cannot map it
        answer = ask(language.url, ONE_IMAGE)
    assert answer.status == 500 and "could not take the embeddings" in answer.error, answer
    assert "rank 1 cannot read its leader's result" in language.log() and "rank" not in answer.error
    broken = ask(language.url, Question("broken", "what is this?", (NotAnImage(1),)))
    assert broken.status >= 400, broken
    _check_all(language.url, right, (TEXT, ONE_IMAGE))

    # Slow: stopped with the request on its way.
    answers: list[Answer] = []
    thread = threading.Thread(target=lambda: answers.append(ask(language.url, LARGE)))
    thread.start()
    os.kill(second, signal.SIGSTOP)
    time.sleep(2)
    os.kill(second, signal.SIGCONT)
    thread.join(120)
    assert answers and answers[0].same_as(right.answer(LARGE)), answers

    # Gone: clients that do not wait for their answers.
    for seconds in (0.02, 0.1, 0.3):
        with suppress(requests.Timeout):
            ask(language.url, LARGE, timeout=seconds)
    _check_all(language.url, right, (ONE_IMAGE,))
    _check_no_names(group)

    # Dead: sglang ends a server that has lost a rank, and nobody waits for ever.
    def ask_in_vain() -> None:
        with suppress(requests.RequestException):
            ask(language.url, LARGE)

    thread = threading.Thread(target=ask_in_vain, daemon=True)
    thread.start()
    os.kill(second, signal.SIGKILL)
    assert _wait_until(lambda: not language.alive, 60)
    thread.join(30)
    assert not thread.is_alive()


def test_two_ranks_over_mooncake_register_once(
    reference: Callable[..., Any], new_group: Callable[..., ServerGroup]
) -> None:
    right = reference("qwen3_vl")
    for question in QUESTIONS:
        right.answer(question)
    group = new_group(
        "qwen3_vl", env={**ENV, "SGLANG_MM_CONN_DATA_PATH": "mooncake"},
        language_env=LANGUAGE_ENV, language_flags=(*LANGUAGE_FLAGS, "--sleep-on-idle"),
    )  # fmt: skip
    _check_all(group.language.url, right, QUESTIONS)
    assert {room.path for room in received(group.language.log())} == {"mooncake"}
    assert max(room.resumes for room in received(group.language.log())) >= 2
    assert group.language.log().count("regions registered") == 1
    _check_one_copy(group)


def test_two_hosts_get_a_copy_each(
    reference: Callable[..., Any], tiny_model: Callable[[str], Path], tmp_path: Path, shared_group: SharedGroups
) -> None:
    """Two nodes of one server, here on one machine: each has a leader, and an embedding is there when both have it."""
    shared_group.stop()
    right = reference("qwen2_5_vl")
    for question in (*QUESTIONS, *CONCURRENT):
        right.answer(question)
    nodes = (*LANGUAGE_FLAGS, "--nnodes", "2", "--dist-init-addr", f"127.0.0.1:{free_port()}", "--node-rank")
    group = ServerGroup(
        tiny_model("qwen2_5_vl"), tmp_path, env=ENV, encoders=2, languages=2, language_env=LANGUAGE_ENV,
        language_flags=(*nodes, "0"),
    )  # fmt: skip
    first, second = group.languages
    second.launch = replace(second.launch, flags=(*nodes, "1"))
    with group:
        _check_all(first.url, right, QUESTIONS)
        rooms = [{room.room: room.bytes for room in received(node.log())} for node in group.languages]
        assert rooms[0] == rooms[1] and rooms[0], "both hosts have every embedding"
        assert sorted(re.findall(r"Language rank (\d of \d)", group.encoder.log())) == ["0 of 2", "1 of 2"]

        # A killed encoder's parts go to the other one, in rooms that both hosts change to.
        with ConcurrentRequests(first.url, (TEXT, *CONCURRENT), clients=4, timeout=60) as concurrent:
            concurrent.wait_for_more(8)
            group.encoders[0].signal(signal.SIGSTOP)
            time.sleep(1.0)  # meanwhile it gets parts that it does not answer
            group.encoders[0].signal(signal.SIGKILL)
            concurrent.wait_for_more(24)
        for one in concurrent.asked:
            assert one.answer is not None and one.answer.same_as(right.answer(one.question)), one
        assert "goes from" in first.log()
