"""The main job: over this connector an unmodified sglang answers as a colocated server does.

sglang's own embedding transports raise in every process of these groups, so no fallback can hide.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from sglang_mm_conn.core.rooms import server_of
from sglang_mm_conn.demo.chat import ask
from sglang_mm_conn.demo.images import Image
from sglang_mm_conn.demo.questions import QUESTIONS, Question
from sglang_mm_conn.demo.servers import ServerGroup
from sglang_mm_conn.demo.timeline import received
from sglang_mm_conn.demo.tiny_models import SEEING

FORBID = {"CPU_BED_FORBID_BUILTIN_TRANSPORT": "1", "SGLANG_MM_CONN_CHECKSUM": "1"}
BLOCK_SIZE = 16
# A first offer far too small, on a pool with room enough for the rest.
SMALL_OFFER = {
    "SGLANG_EMBEDDING_CACHE_BLOCK_SIZE": str(BLOCK_SIZE),
    "SGLANG_EMBEDDING_DEFAULT_ALLOCATE_BUFFER_SIZE": "10",
}
# A pool smaller than one embedding: 64 rows, of which the first offer takes 20.
SMALL_POOL = {
    "SGLANG_EMBEDDING_CACHE_BLOCK_SIZE": str(BLOCK_SIZE),
    "SGLANG_EMBEDDING_CACHE_BUFFER_SIZE": "4",
    "SGLANG_EMBEDDING_DEFAULT_ALLOCATE_BUFFER_SIZE": "20",
}
PATHS = ("shm", "mooncake")


def _env(path: str, sizes: dict[str, str]) -> dict[str, str]:
    return {**FORBID, **sizes, "SGLANG_MM_CONN_DATA_PATH": path}


def _check_all(group: ServerGroup, reference: Any, questions: tuple[Question, ...] = QUESTIONS) -> None:
    for question in questions:
        expected = reference.answer(question)
        got = ask(group.language.url, question)
        assert got.same_as(expected), (question.name, got, expected)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", SEEING)
def test_answers_equal_colocated_though_every_embedding_needs_resumes(
    kind: str, path: str, reference: Callable[..., Any], shared_group: Callable[..., ServerGroup]
) -> None:
    sizes = SMALL_POOL if path == "mooncake" else SMALL_OFFER
    group = shared_group(kind, env=_env(path, sizes))
    _check_all(group, reference(kind))
    rooms = received(group.language.log())
    assert {room.path for room in rooms} == {path}
    assert max(room.resumes for room in rooms) >= (2 if path == "mooncake" else 1)
    assert "stock transport used" not in group.language.log() + group.encoder.log()


@pytest.mark.parametrize("path", PATHS)
def test_eight_clients_at_once_on_a_pool_smaller_than_one_embedding(
    path: str, reference: Callable[..., Any], shared_group: Callable[..., ServerGroup]
) -> None:
    group = shared_group("qwen2_5_vl", env=_env(path, SMALL_POOL))
    concurrent = [question for question in QUESTIONS if question.images] * 3
    expected = [reference("qwen2_5_vl").answer(question) for question in concurrent]
    with ThreadPoolExecutor(8) as clients:
        got = list(clients.map(lambda question: ask(group.language.url, question), concurrent))
    assert [one.same_as(other) for one, other in zip(got, expected, strict=True)] == [True] * len(concurrent)
    assert max(room.windows for room in received(group.language.log())) >= 3


@pytest.mark.parametrize("path", PATHS)
def test_two_encoders_serve_the_parts_of_one_request(
    path: str, reference: Callable[..., Any], shared_group: Callable[..., ServerGroup]
) -> None:
    group = shared_group("qwen2_5_vl", encoders=2, env=_env(path, SMALL_OFFER))
    _check_all(group, reference("qwen2_5_vl"))
    assert all("Embedding sent" in encoder.log() for encoder in group.encoders)


@pytest.mark.parametrize("path", PATHS)
def test_request_ids_are_not_the_identity_of_an_embedding(
    path: str, reference: Callable[..., Any], shared_group: Callable[..., ServerGroup]
) -> None:
    """Two language servers on one encoder use one id for different images at the same time; one server reuses an id."""
    group = shared_group("qwen2_5_vl", languages=2, env=_env(path, SMALL_OFFER))
    questions = [
        Question(f"image {seed}", "what is this?", (Image(seed=seed, width=224, height=168),)) for seed in range(20, 28)
    ]
    expected = [reference("qwen2_5_vl").answer(question) for question in questions]
    for index in range(0, len(questions), 2):
        pair = list(zip(group.languages, questions[index : index + 2], strict=True))
        with ThreadPoolExecutor(2) as clients:
            got = list(clients.map(lambda job: ask(job[0].url, job[1], rid="the-same-id"), pair))
        for answer, right in zip(got, expected[index : index + 2], strict=True):
            assert answer.same_as(right), (answer, right)
    servers = [{server_of(room.room) for room in received(language.log())} for language in group.languages]
    assert len(servers[0] | servers[1]) == 2, "each got its own embeddings, and only those"
    assert [len(received(language.log())) for language in group.languages] == [4, 4]
