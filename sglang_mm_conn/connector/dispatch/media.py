"""Owns what a dispatcher reads from an item of a request, for its choice of encoders: how large it is, and its key."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
from typing import Any

from PIL import Image, UnidentifiedImageError

from sglang_mm_conn.core.dispatch.choice import Item
from sglang_mm_conn.core.dispatch.load import work_of

# Enough for the header of every common format; a JPEG may have its size behind a long EXIF block, and then counts as
# one of unknown size. A multiple of four characters, so that the rest of the base64 text is not needed.
_HEADER_CHARACTERS = 8192
# Those whose size Pillow reads from the header. It wants all of a WebP file, which so counts as one of unknown size.
_FORMATS = ("PNG", "JPEG", "GIF", "BMP")
_NO_IMAGE = (
    UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)  # fmt: skip
_JPEG_TEXT = "/9j/"  # how every JPEG file begins in base64: no path


def item_of(modality: str, media: Any, content_hash: str | None, *, with_key: bool) -> Item:
    """What is known of ``media`` without fetching it.

    Args:
        modality: IMAGE, VIDEO or AUDIO.
        media: a URL, a data URI, base64 text, bytes, or an object.
        content_hash: a hash of the content that the client gave.
        with_key: whether the key is needed. It costs a hash over all of the data.
    """
    key = content_hash or (_key(media) if with_key else "")
    if modality != "IMAGE":
        return Item(modality, work_of(modality, nbytes=_bytes_of(media)), key)
    return Item(modality, work_of(modality, pixels=_pixels(media)), key)


def _key(media: Any) -> str:
    if isinstance(media, str):
        media = media.encode("utf-8", "surrogatepass")
    return hashlib.blake2b(media, digest_size=16).hexdigest() if isinstance(media, bytes) else ""


def _inline(media: str) -> tuple[str, int]:
    """The text that holds the data of a data URI or of base64 text, and where the data begins; ("", 0) for a URL."""
    if media.startswith("data:"):
        return media, media.find(",", 0, 256) + 1
    if "://" in media[:16] or (media[:1] in "/.~" and not media.startswith(_JPEG_TEXT)):
        return "", 0
    return media, 0


def _bytes_of(media: Any) -> int:
    if isinstance(media, bytes):
        return len(media)
    if isinstance(media, str):
        text, begin = _inline(media)
        return (len(text) - begin) * 3 // 4 if text else 0
    return 0


def _pixels(media: Any) -> int:
    """Pixels of an image whose header is at hand; 0: unknown."""
    if isinstance(media, Image.Image):
        return media.width * media.height
    if isinstance(media, bytes):
        head = media[:_HEADER_CHARACTERS]
    elif isinstance(media, str):
        text, begin = _inline(media)
        try:
            head = base64.b64decode(text[begin : begin + _HEADER_CHARACTERS])
        except (binascii.Error, ValueError):
            return 0
    else:
        return 0
    try:
        with Image.open(io.BytesIO(head), formats=_FORMATS) as image:  # reads the header only
            return image.width * image.height
    except _NO_IMAGE:
        return 0
