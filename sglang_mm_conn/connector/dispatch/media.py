"""Owns what a dispatcher reads from an item of a request, for its choice of encoders: how large it is, and its key."""

from __future__ import annotations

import base64
import binascii
import hashlib
from typing import Any

from PIL import Image

from sglang_mm_conn.core.dispatch.choice import Item
from sglang_mm_conn.core.dispatch.load import work_of

# Enough for the header of every common format; a JPEG may have its size behind a long EXIF block, and then counts as
# one of unknown size. A multiple of four characters, so that the rest of the base64 text is not needed.
_HEADER_CHARACTERS = 8192
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
    width, height = _size(head)
    return width * height


def _size(head: bytes) -> tuple[int, int]:
    """Width and height of the image whose file begins with ``head``; zeros: unknown.

    Pillow is not asked: it wants all of a WebP file, warns of large images, and would read whatever a client sends with
    dozens of decoders.
    """
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return _big(head[16:20]), _big(head[20:24])
    if head.startswith((b"GIF87a", b"GIF89a")):
        return _little(head[6:8]), _little(head[8:10])
    if head.startswith(b"BM"):
        return _little(head[18:22]), abs(int.from_bytes(head[22:26], "little", signed=True))  # upside down: negative
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return _webp_size(head)
    return _jpeg_size(head) if head.startswith(b"\xff\xd8") else (0, 0)


def _webp_size(head: bytes) -> tuple[int, int]:
    kind = head[12:16]
    if kind == b"VP8X":
        return _little(head[24:27]) + 1, _little(head[27:30]) + 1
    if kind == b"VP8L":
        bits = _little(head[21:25])
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return (_little(head[26:28]) & 0x3FFF, _little(head[28:30]) & 0x3FFF) if kind == b"VP8 " else (0, 0)


def _jpeg_size(head: bytes) -> tuple[int, int]:
    """Walks over the segments to the frame header, which has the size."""
    at = 2
    while at + 9 <= len(head) and head[at] == 0xFF:
        marker = head[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return _big(head[at + 7 : at + 9]), _big(head[at + 5 : at + 7])
        else:
            at += 2 + _big(head[at + 2 : at + 4])
    return 0, 0


def _big(data: bytes) -> int:
    return int.from_bytes(data, "big")


def _little(data: bytes) -> int:
    return int.from_bytes(data, "little")
