"""Encoders that a language server is not told of at its start: they register, leave, die and come back."""

import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import requests

from sglang_mm_conn.demo.chat import Answer, ask
from sglang_mm_conn.demo.images import Image
from sglang_mm_conn.demo.launch import Launch
from sglang_mm_conn.demo.questions import QUESTIONS, Question
from sglang_mm_conn.demo.servers import Server, ServerGroup, wait_ready

ENV = {
    "CPU_BED_FORBID_BUILTIN_TRANSPORT": "1",
    "SGLANG_MM_CONN_CHECKSUM": "1",
    "SGLANG_EMBEDDING_CACHE_BLOCK_SIZE": "16",
    # sglang takes an encoder off its list after three failed health checks.
    "SGLANG_ENCODER_BOOTSTRAP_HEALTH_CHECK_INTERVAL": "1",
}
ONE_IMAGE = QUESTIONS[1]
# Each has enough images for every encoder on the list to get one.
CONCURRENT = tuple(
    Question(f"concurrent {seed}", "compare", (Image(seed), Image(seed + 1, 140, 112))) for seed in range(80, 96, 2)
)


def _ask_all(url: str) -> list[Answer]:
    with ThreadPoolExecutor(4) as clients:
        return list(clients.map(lambda question: ask(url, question), CONCURRENT))


def _wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.2)


def test_encoders_join_leave_die_and_return_while_the_others_serve(
    reference: Callable[..., Any], new_group: Callable[..., ServerGroup], tiny_model: Any, tmp_path: Path
) -> None:
    model = tiny_model("qwen2_5_vl")
    right = {question.name: reference("qwen2_5_vl").answer(question) for question in (ONE_IMAGE, *CONCURRENT)}
    language = Server(Launch("language", model, env=ENV), tmp_path)
    flags = ("--encoder-register-urls", f"http://127.0.0.1:{language.bootstrap_port}")
    first, second = (Server(Launch("encoder", model, flags=flags, env=ENV), tmp_path, name) for name in ("a", "b"))

    def all_right() -> bool:
        return all(
            one.same_as(right[asked.name]) for one, asked in zip(_ask_all(language.url), CONCURRENT, strict=True)
        )

    def sent(server: Server) -> int:
        return server.log().count("Embedding sent")

    with ExitStack() as stack:
        stack.enter_context(language)
        language.wait_ready()
        assert ask(language.url, ONE_IMAGE).same_as(right[ONE_IMAGE.name]), "without an encoder, sglang encodes itself"

        for server in (first, second):
            stack.enter_context(server)
        wait_ready([first, second])
        _wait_until(lambda: language.log().count("Registered encoder URL") == 2)
        assert all_right()
        assert sent(first) and sent(second)

        second.signal(signal.SIGKILL)
        for asked, one in zip(CONCURRENT, _ask_all(language.url), strict=True):
            assert one.same_as(right[asked.name]), one
        _wait_until(lambda: "Health check evicted" in language.log())
        assert all_right(), "one encoder is dead, the other serves"

        second.stop()
        again = stack.enter_context(Server(second.launch, tmp_path, "b-again", port=second.port))
        again.wait_ready()
        _wait_until(lambda: language.log().count("Registered encoder URL") == 3)
        assert all_right()
        assert sent(again)

        # In good order: off the list first, then stopped. (On SIGTERM alone sglang 0.5.23 does not sign off.)
        route = f"http://127.0.0.1:{language.bootstrap_port}/unregister_encoder_url"
        assert requests.delete(route, json={"url": first.url}, timeout=10).ok
        before = sent(first)
        assert all_right() and sent(first) == before
        first.stop()
        assert all_right(), "the one that left is missed by nobody"
