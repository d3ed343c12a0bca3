"""The test bed itself, without the connector: both ways of serving agree, and sglang's transports can be banned."""

from collections.abc import Callable

import pytest

from sglang_mm_conn.bench.transports import BUILTIN_CANNOT_PICKLE
from sglang_mm_conn.demo.chat import ask
from sglang_mm_conn.demo.questions import QUESTIONS
from sglang_mm_conn.demo.servers import ServerGroup
from sglang_mm_conn.demo.tiny_models import SEEING

STOCK = "zmq_to_scheduler"


@pytest.mark.skipif(BUILTIN_CANNOT_PICKLE, reason="sglang's own transport drops every embedding on this Python")
@pytest.mark.parametrize("kind", SEEING)
def test_sglang_alone_answers_alike(
    kind: str, reference: Callable[..., object], shared_group: Callable[..., ServerGroup]
) -> None:
    group = shared_group(kind, backend=STOCK)
    for question in QUESTIONS:
        expected = reference(kind).answer(question)  # type: ignore[attr-defined]
        got = ask(group.language.url, question)
        assert got.same_as(expected), (question.name, got, expected)


def test_forbidden_builtin_transport_raises(new_group: Callable[..., ServerGroup]) -> None:
    group = new_group("qwen2_5_vl", backend=STOCK, env={"CPU_BED_FORBID_BUILTIN_TRANSPORT": "1"})
    assert ask(group.language.url, QUESTIONS[0]).ok, "a text needs no transport"
    assert "forbidden in this process" in group.encoder.log()
    assert "forbidden in this process" in group.language.log()
    try:
        answer = ask(group.language.url, QUESTIONS[1], timeout=20)
        assert not answer.ok, answer
    except OSError:
        pass  # the language server's scheduler died of it
    assert "stock transport used" in group.language.log() + group.encoder.log()
