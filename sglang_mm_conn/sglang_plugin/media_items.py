"""Owns which media of a prompt encoders can take, and how they are posted: in JSON, as text."""

from __future__ import annotations

import base64
import io
from typing import Any

import torch
from PIL import Image
from sglang.srt.utils import ImageData, VideoData

_FIELDS = ("image_data", "video_data", "audio_data")
_POSTED = (str, bytes, Image.Image, ImageData, VideoData)


def listed(data: Any) -> list[Any]:
    """The items of one modality."""
    if data is None:
        return []
    return list(data) if isinstance(data, list | tuple) else [data]


def can_be_posted(prompt: Any) -> bool:
    """Whether encoders can take all media of ``prompt``, sglang's GenerateReqInput. The language server itself takes
    embeddings, what the client has preprocessed, and frames as arrays, and refuses what is none of these."""
    return all(isinstance(item, _POSTED) for item in _items(prompt))


def check_preprocessed(prompt: Any) -> None:
    """Raise ValueError, which sglang answers with 400, for preprocessed media that hold no tensor: sglang would end the
    scheduler. They come from JSON, which has none."""
    for item in _items(prompt):
        if isinstance(item, dict) and not any(isinstance(value, torch.Tensor) for value in item.values()):
            raise ValueError("preprocessed images, videos and audio, and embeddings, must hold tensors")


def has_images_in_memory(prompt: Any) -> bool:
    """Whether ``as_posted`` has to encode images of ``prompt``."""
    return bool(_images_in_memory(prompt))


def _images_in_memory(prompt: Any) -> list[Image.Image]:
    return [item for item in listed(prompt.image_data) if isinstance(item, Image.Image)]


def _items(prompt: Any) -> list[Any]:
    return [item for field in _FIELDS for item in listed(getattr(prompt, field))]


def check_media(prompt: Any) -> None:
    """Raise ValueError, which sglang answers with 400, if Pillow cannot read an image of ``prompt``. Encoding it as PNG
    comes later, on another thread."""
    for image in _images_in_memory(prompt):
        try:
            image.load()
        except OSError as error:
            raise ValueError(f"Error while loading an image: {error}") from error


def as_posted(media: Any) -> Any:
    """``media`` as JSON can hold it: bytes and Pillow's images become data URIs, without a loss."""
    if isinstance(media, Image.Image):
        return _data_uri("image/png", _png(media))
    return _data_uri("application/octet-stream", media) if isinstance(media, bytes) else media


def _png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    try:
        image.save(out, "PNG", compress_level=1)
    except OSError:  # a mode that PNG does not have; sglang makes RGB of each
        out = io.BytesIO()
        image.convert("RGB").save(out, "PNG", compress_level=1)
    return out.getvalue()


def _data_uri(mime: str, content: bytes) -> str:
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"
