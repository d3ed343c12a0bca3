"""Which media encoders take, and how they are posted."""

from __future__ import annotations

import base64
import io
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image, ImageChops
from sglang.srt.utils import ImageData

from sglang_mm_conn.demo.images import pixels
from sglang_mm_conn.sglang_plugin.media_items import as_posted, can_be_posted, check_media, check_preprocessed


def prompt(**media: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"image_data": None, "video_data": None, "audio_data": None, **media})


def picture(mode: str) -> Image.Image:
    return Image.fromarray(pixels([1], 30, 20)).convert(mode)


@pytest.mark.parametrize("media", ["http://127.0.0.1/a.png", b"bytes", picture("RGB"), ImageData("a")])
def test_encoders_take_what_can_be_sent_as_text(media: Any) -> None:
    assert can_be_posted(prompt()) and can_be_posted(prompt(image_data=media))
    assert can_be_posted(prompt(image_data=["a", media], audio_data="b"))


@pytest.mark.parametrize(
    "media",
    [
        {"format": "precomputed_embedding"},
        {"format": "processor_output"},
        {"url": "a"},
        5,
        pixels([1], 4, 4),
        ["a"],
        None,
    ],
)
def test_the_language_server_itself_takes_everything_else(media: Any) -> None:
    assert not can_be_posted(prompt(image_data=[media])) and not can_be_posted(prompt(video_data=["a", media]))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "I", "CMYK", "HSV"])
def test_an_image_is_posted_without_a_loss(mode: str) -> None:
    image = picture(mode)
    head, _, data = as_posted(image).partition(",")
    with Image.open(io.BytesIO(base64.b64decode(data))) as posted:
        assert head == "data:image/png;base64"
        assert ImageChops.difference(posted.convert("RGB"), image.convert("RGB")).getbbox() is None


def test_bytes_are_posted_as_a_data_uri_and_text_as_it_is() -> None:
    assert as_posted(b"abc") == "data:application/octet-stream;base64,YWJj"
    assert as_posted("a.png") == "a.png"


def test_an_image_that_cannot_be_read_is_refused_at_once() -> None:
    whole = io.BytesIO()
    picture("RGB").save(whole, "PNG")
    with Image.open(io.BytesIO(whole.getvalue()[:100])) as cut, pytest.raises(ValueError, match="loading"):
        check_media(prompt(image_data=[picture("RGB"), cut]))
    check_media(prompt(image_data=picture("RGB")))


def test_preprocessed_media_without_a_tensor_are_refused() -> None:
    check_preprocessed(prompt(image_data=[{"format": "precomputed_embedding", "feature": torch.zeros(1)}]))
    with pytest.raises(ValueError, match="tensors"):
        check_preprocessed(prompt(video_data=[{"format": "precomputed_embedding", "feature": [[0.0]], "hash": 1}]))
