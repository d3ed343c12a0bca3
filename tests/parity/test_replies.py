"""The comparison of two replies notices what differs, and nothing else."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.parity.replies import Reply, cause_of, difference, joined, lasting, unfit_cause


def lines(*events: Any) -> list[bytes]:
    return [b"data: " + json.dumps(event).encode() for event in events] + [b"", b"data: [DONE]"]


@pytest.mark.parametrize(("here", "there", "told"), [
    (Reply(200, {"a": 1.0}), Reply(200, {"a": 1.0005}), ""),
    (Reply(200, {"a": 1.0}), Reply(200, {"a": 1.1}), ".a"),
    (Reply(400, cause="a"), Reply(400, cause="b"), ""),
    (Reply(500, cause="a"), Reply(400, cause="b"), "status 500, not 400"),
    ([Reply(200, "a")], [Reply(200, "b")], "[0]"),
    (Reply(200, {"a": 1}), Reply(200, {"b": 1}), "one side only"),
    (Reply(200, [1, 2]), Reply(200, [1]), "2 entries"),
    (Reply(200, {"a": 1}), Reply(200, {"a": "1"}), ".a"),
    (Reply(200, {"a": float("-inf")}), Reply(200, {"a": float("-inf")}), ""),
])  # fmt: skip
def test_a_difference_is_told_and_rounding_is_none(here: Any, there: Any, told: str) -> None:
    found = difference(here, there)
    assert told in found and bool(told) == bool(found)


def test_times_and_ids_that_the_server_draws_do_not_count_and_given_ids_do() -> None:
    answer = {"id": "x1", "created": 5, "e2e_latency": 0.1, "choices": [{"text": "a", "id": "parity-1"}]}
    assert lasting(answer) == {"choices": [{"text": "a", "id": "parity-1"}]}


def test_the_chunks_of_a_stream_are_joined() -> None:
    chunks = [{"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": end}]}
              for text, end in (("a", None), ("b", "stop"))]  # fmt: skip
    found = joined(lines(*chunks, {"choices": [], "usage": {"total_tokens": 2}}))
    assert found == {"0": {"index": 0, "delta": {"content": "ab"}, "finish_reason": "stop"},
                     "usage": {"total_tokens": 2}}  # fmt: skip
    assert joined(lines({"text": "a", "meta_info": {}}, {"text": "ab", "meta_info": {}})) == {
        "0": {"text": "ab", "meta_info": {}}
    }
    words = [{"type": "delta", "delta": text} for text in "ab"]
    assert joined(lines(*words)) == {"delta": {"delta": "ab"}}


@pytest.mark.parametrize(("cause", "told"), [
    ("no such image", ""), ("failed in room 5", "room"), ("", "0 bytes"), ("x" * 2000, "2000 bytes"),
    ("at 127.0.0.1:30001", "127.0.0.1:30001"), ("at 127.0.0.1:9", ""), ("Unknown error", "Unknown error"),
])  # fmt: skip
def test_a_cause_is_short_and_names_nothing_of_the_servers_inside(cause: str, told: str) -> None:
    found = unfit_cause([Reply(400, cause=cause)], None, ["127.0.0.1:30001"])
    assert told in found and bool(told) == bool(found)
    assert unfit_cause([Reply(400, cause=cause)], Reply(400, cause=cause)) == "", "a colocated server says the same"


def test_the_cause_is_the_message_of_an_error_in_any_body() -> None:
    assert cause_of('{"error": {"message": "a", "code": 5}}') == "a"
    assert cause_of('{"detail": "b"}') == "b" and cause_of("Internal Server Error") == "Internal Server Error"
    assert cause_of('{"object": "error", "message": "c"}') == "c"
