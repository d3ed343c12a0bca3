"""Answers of the tokenizer process where encoders are used: errors of streams, token ids of prompts."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_mm_conn.sglang_plugin.answers import give_prompt_ids, keep_prompt_ids, raise_input_error


async def told(self: Any, out: Any, state: Any, is_stream: bool) -> bool:
    return is_stream


def out(code: int | None, tokens: int = 0, kind: str | None = None) -> dict[str, Any]:
    reason = {"type": "abort", "status_code": code, "err_type": kind}
    return {"meta_info": {"finish_reason": reason, "completion_tokens": tokens}}


@pytest.mark.parametrize(
    ("code", "tokens", "urls", "as_stream"),
    [
        (400, 0, ["a"], False),
        (400, 3, ["a"], True),
        (502, 0, ["a"], True),
        (400, 0, None, True),
        (None, 0, ["a"], True),
    ],
)
def test_a_stream_that_has_not_begun_ends_with_the_status_of_bad_input(
    code: int | None, tokens: int, urls: list[str] | None, as_stream: bool
) -> None:
    state = SimpleNamespace(obj=SimpleNamespace(encoder_urls=urls))
    assert asyncio.run(raise_input_error(told, None, out(code, tokens), state, True)) is as_stream
    assert asyncio.run(raise_input_error(told, None, out(code, tokens), state, False)) is False


def test_what_the_scheduler_refuses_later_stays_an_event_of_the_stream() -> None:
    state = SimpleNamespace(obj=SimpleNamespace(encoder_urls=["a"]))
    assert asyncio.run(raise_input_error(told, None, out(400, kind="BadRequestError"), state, True))


class Manager:
    """What the hooks use of sglang's tokenizer manager."""

    max_req_input_len = 100

    def __init__(self) -> None:
        self.mm_processor = self
        self.rid_to_state: dict[str, Any] = {"a": SimpleNamespace(prompt_token_ids=None)}
        self.processed = 0

    async def process_mm_data_async(self, **_: Any) -> Any:
        self.processed += 1
        return SimpleNamespace(input_ids=[1, 2, 3], mm_items=[])


async def tokenized(self: Any, obj: Any) -> str:
    assert not obj.return_prompt_token_ids or not obj.encoder_urls, "there are no ids to copy"
    return "tokenized"


@pytest.mark.parametrize(("wanted", "urls", "ids"), [
    (True, ["a"], [1, 2, 3]), (False, ["a"], None), (True, None, None),
])  # fmt: skip
def test_a_client_that_wants_the_ids_of_its_prompt_gets_them(
    wanted: bool, urls: list[str] | None, ids: list[int] | None
) -> None:
    manager = Manager()
    obj = SimpleNamespace(
        rid="a", return_prompt_token_ids=wanted, encoder_urls=urls, image_data=["b"], audio_data=None, text="c"
    )
    assert asyncio.run(keep_prompt_ids(tokenized, manager, obj)) == "tokenized"
    assert give_prompt_ids("result", manager, obj) == "result"
    assert manager.rid_to_state["a"].prompt_token_ids == ids
    assert manager.processed == (1 if ids else 0), "the media are read for those only who want the ids"
