"""Placeholders and media of a prompt, matched as a colocated sglang matches them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.multimodal.processors.base_processor import MultimodalSpecialTokens

from sglang_mm_conn.sglang_plugin.placeholders import match_media

TOKENS = MultimodalSpecialTokens(image_token="<image>", video_token="<video>")
TOKENS.parse_regex()
PROCESSOR = SimpleNamespace(mm_tokens=TOKENS)


def prompt(text: Any, **media: Any) -> SimpleNamespace:
    empty = {"image_data": None, "video_data": None, "audio_data": None, "mm_hashes": None, "mm_content_hashes": None}
    return SimpleNamespace(**{"text": text, "input_ids": None, **empty, **media})


def matched(one: SimpleNamespace) -> SimpleNamespace:
    match_media(one, PROCESSOR, lambda ids: "".join(map(chr, ids)))
    return one


def test_media_that_match_stay_as_they_are() -> None:
    images = ["a", ["b"]]
    assert matched(prompt("<image> and <image>", image_data=images)).image_data is images
    assert matched(prompt("hello")).image_data is None
    assert matched(prompt("<video><image>", image_data="a", video_data=["v"])).image_data == "a"


@pytest.mark.parametrize(("text", "kept"), [("hello", None), ("<image>", ["a"]), ("<image><image>", ["a", "b"])])
def test_media_without_a_placeholder_are_ignored(text: str, kept: list[str] | None) -> None:
    one = matched(prompt(text, image_data=[["a", "b"], "c"], mm_content_hashes=["1", "2", "3"]))
    assert one.image_data == kept and one.mm_content_hashes == (kept and ["1", "2", "3"][: len(kept)])


@pytest.mark.parametrize(
    ("text", "media", "said"),
    [
        ("<image><image>", {"image_data": ["a"]}, "2 image placeholders but 1 image inputs"),
        ("<video>", {"image_data": ["a"]}, "1 video placeholders but 0 video inputs"),
    ],
)
def test_a_placeholder_without_media_is_refused_naming_both_numbers(
    text: str, media: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        matched(prompt(text, **media))


def test_a_prompt_of_token_ids_is_read() -> None:
    one = prompt(None, input_ids=[ord(letter) for letter in "<image>"], image_data=["a", "b"])
    assert matched(one).image_data == ["a"]


def test_what_is_preprocessed_or_unknown_is_left_alone() -> None:
    ready = [{"format": "precomputed_embedding"}]
    assert matched(prompt("hello", image_data=ready)).image_data is ready
    one = prompt("hello", image_data=["a"])
    match_media(one, SimpleNamespace(), str)
    match_media(one, None, str)
    assert one.image_data == ["a"]
