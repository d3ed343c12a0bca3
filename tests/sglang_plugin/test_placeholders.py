"""Placeholders and media of a prompt, matched as a colocated sglang matches them."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.multimodal.processors.base_processor import MultimodalSpecialTokens

from sglang_mm_conn.sglang_plugin.placeholders import match_media

IMAGE = "<s><p><e>"


class QwenVLImageProcessor:
    """What is used of sglang's processor of this name."""

    def __init__(self, *, artifacts: bool = False) -> None:
        self.mm_tokens = MultimodalSpecialTokens(
            image_token=IMAGE, image_token_id=ord("p"), video_token="<video>",
            image_token_regex=re.compile("<s>(?:<p>)+<e>|<image>"),
        )  # fmt: skip
        self.mm_tokens.parse_regex()
        self.uses_media_artifacts_without_cache = artifacts
        self.mm_preprocess_cache = SimpleNamespace(enabled=False)
        self._tokenizer = SimpleNamespace(decode=lambda ids: "".join(map(chr, ids)))


class OtherProcessor(QwenVLImageProcessor):
    """Of the same kind: sglang derives some."""


def prompt(text: Any, **media: Any) -> SimpleNamespace:
    empty = {"image_data": None, "video_data": None, "audio_data": None, "mm_hashes": None, "mm_content_hashes": None}
    return SimpleNamespace(**{"text": text, "input_ids": None, **empty, **media})


def matched(one: SimpleNamespace, *, artifacts: bool = False) -> SimpleNamespace:
    match_media(one, OtherProcessor(artifacts=artifacts))
    return one


def test_media_that_match_stay_as_they_are() -> None:
    images = ["a", "b"]
    assert matched(prompt("<image> and <image>", image_data=images)).image_data is images
    assert matched(prompt("hello")).image_data is None
    assert matched(prompt("<video><image>", image_data="a", video_data=["v"])).image_data == "a"


def test_media_of_an_empty_prompt_are_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        matched(prompt("", image_data=["a"]))


@pytest.mark.parametrize(("text", "kept"), [("hello", None), ("<image>", ["a"]), ("<image><image>", ["a", "b"])])
def test_media_without_a_placeholder_are_ignored(text: str, kept: list[str] | None) -> None:
    one = matched(prompt(text, image_data=["a", "b", "c"], mm_content_hashes=["1", "2", "3"]))
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


def test_nothing_is_matched_for_models_with_rules_of_their_own() -> None:
    one = prompt("hello", image_data=["a"])
    match_media(one, SimpleNamespace(mm_tokens=QwenVLImageProcessor().mm_tokens))
    match_media(one, None)
    assert one.image_data == ["a"]


@pytest.mark.parametrize("text", ["<image>what?", "<s><p><p><p><e>what?", "<s><p><e>what?"])
def test_each_way_to_write_a_placeholder_becomes_the_one_that_the_processor_takes(text: str) -> None:
    assert matched(prompt(text, image_data=["a", "b"])).text == f"{IMAGE}what?"
    both = prompt(f"{text}<video>", image_data=["a"], video_data=["v"])
    assert matched(both).text == f"{IMAGE}what?<video>"


def test_placeholders_among_token_ids_are_counted_as_the_processor_counts_them() -> None:
    bare = prompt(None, input_ids=[ord(one) for one in "what <p>?"], image_data=["a"])
    assert matched(bare, artifacts=True).image_data == ["a"]
    assert matched(bare).image_data is None
