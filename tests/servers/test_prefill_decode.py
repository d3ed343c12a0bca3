"""Encode, prefill and decode as three servers under the one flag: embeddings over this connector, KV over Mooncake."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sglang_mm_conn.demo.launch import Launch
from sglang_mm_conn.demo.questions import QUESTIONS
from sglang_mm_conn.demo.servers import Server, ServerGroup, free_port, wait_ready
from sglang_mm_conn.demo.timeline import received
from tests.servers.clients import ask_both

ENV = {
    "CPU_BED_PREFILL_DECODE": "1",
    "CPU_BED_FORBID_BUILTIN_TRANSPORT": "1",
    "SGLANG_MM_CONN_CHECKSUM": "1",
    "SGLANG_MM_CONN_DATA_PATH": "mooncake",
    "SGLANG_EMBEDDING_CACHE_BLOCK_SIZE": "16",
    "SGLANG_EMBEDDING_DEFAULT_ALLOCATE_BUFFER_SIZE": "10",
}


def test_three_servers_answer_as_one(
    reference: Callable[..., Any], new_group: Callable[..., ServerGroup], tiny_model: Any, tmp_path: Path
) -> None:
    """With the connector's own Mooncake engine beside sglang's in the prefill server."""
    right = [reference("qwen2_5_vl").answer(question) for question in QUESTIONS]
    kv_port = free_port()
    with Server(Launch("decode", tiny_model("qwen2_5_vl"), env=ENV), tmp_path) as decode:
        flags = ("--disaggregation-mode", "prefill", "--disaggregation-bootstrap-port", str(kv_port))
        group = new_group("qwen2_5_vl", env=ENV, language_flags=flags)
        wait_ready([decode])
        prefill = group.language
        for question, expected in zip(QUESTIONS, right, strict=True):
            answer = ask_both(prefill.url, decode.url, kv_port, question)
            assert answer.same_as(expected), (question.name, answer, expected)
        rooms = received(prefill.log())
        assert {room.path for room in rooms} == {"mooncake"}
        assert len(rooms) == sum(bool(question.images) for question in QUESTIONS)
        assert all(room.resumes for room in rooms)
        # The decode server never computes a prompt: what it knows of one has come as KV cache.
        assert "Decode batch" in decode.log() and "Prefill batch" not in decode.log()
