"""Owns the bytes of images in every encoding that a client may send, and of what is none."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from functools import partial
from typing import Any

from sglang_mm_conn.demo.images import Image, pixels
from sglang_mm_conn.demo.media import Audio, Video


def encoded(
    mode: str, encoding: str, *, seed: int = 1, width: int = 112, height: int = 84, **how: Any
) -> bytes:  # fmt: skip
    """A picture in Pillow's ``mode``, in ``encoding``."""
    from PIL import Image as Pillow

    out = io.BytesIO()
    Pillow.fromarray(pixels([seed], width, height)).convert(mode).save(out, encoding, **how)
    return out.getvalue()


def turned() -> bytes:
    """A JPEG that its EXIF data turns by 90 degrees."""
    from PIL import Image as Pillow

    exif = Pillow.Exif()
    exif[0x0112] = 6
    return encoded("RGB", "JPEG", exif=exif.tobytes())


def sixteen_bits() -> bytes:
    from PIL import Image as Pillow

    out = io.BytesIO()
    Pillow.fromarray(pixels([3], 112, 84)[:, :, 0].astype("uint16") * 257).save(out, "PNG")
    return out.getvalue()


def animated(encoding: str) -> bytes:
    from PIL import Image as Pillow

    frames = [Pillow.fromarray(pixels([seed], 112, 84)) for seed in (4, 5, 6)]
    out = io.BytesIO()
    frames[0].save(out, encoding, save_all=True, append_images=frames[1:], duration=100)
    return out.getvalue()


def transparent_palette() -> bytes:
    from PIL import Image as Pillow

    out = io.BytesIO()
    Pillow.fromarray(pixels([7], 112, 84)).quantize(16).save(out, "PNG", transparency=3)
    return out.getvalue()


PICTURES: dict[str, Callable[[], bytes]] = {
    "photo.png": lambda: Image(1).png(),
    "rgb.jpeg": partial(encoded, "RGB", "JPEG"),
    "progressive.jpeg": partial(encoded, "RGB", "JPEG", progressive=True, quality=60),
    "grey.jpeg": partial(encoded, "L", "JPEG"),
    "cmyk.jpeg": partial(encoded, "CMYK", "JPEG"),
    "turned.jpeg": turned,
    "grey.png": partial(encoded, "L", "PNG"),
    "black-white.png": partial(encoded, "1", "PNG"),
    "grey-alpha.png": partial(encoded, "LA", "PNG"),
    "alpha.png": partial(encoded, "RGBA", "PNG"),
    "palette.png": partial(encoded, "P", "PNG"),
    "transparent-palette.png": transparent_palette,
    "16-bit.png": sixteen_bits,
    "still.gif": partial(encoded, "P", "GIF"),
    "animated.gif": partial(animated, "GIF"),
    "lossy.webp": partial(encoded, "RGB", "WEBP"),
    "lossless-alpha.webp": partial(encoded, "RGBA", "WEBP", lossless=True),
    "animated.webp": partial(animated, "WEBP"),
    "animated.png": partial(animated, "PNG"),
    "image.bmp": partial(encoded, "RGB", "BMP"),
    "image.tiff": partial(encoded, "RGB", "TIFF"),
    "image.ico": partial(encoded, "RGBA", "ICO"),
    "image.ppm": partial(encoded, "RGB", "PPM"),
    "one-pixel.png": partial(encoded, "RGB", "PNG", width=1, height=1),
    "two-pixels.png": partial(encoded, "RGB", "PNG", width=2, height=1),
    "thin.png": partial(encoded, "RGB", "PNG", width=8, height=800),
    "flat.png": partial(encoded, "RGB", "PNG", width=800, height=8),
    "too-thin.png": partial(encoded, "RGB", "PNG", width=2, height=1000),
    "odd.png": partial(encoded, "RGB", "PNG", width=123, height=77),
    "large.png": partial(encoded, "RGB", "PNG", width=1000, height=700),
    "huge.png": partial(encoded, "RGB", "PNG", width=3000, height=3000),
}

NO_PICTURES: dict[str, Callable[[], bytes]] = {
    "empty.png": lambda: b"",
    "text.png": lambda: b"this is a text, and no picture at all",
    "noise.png": lambda: random.Random(1).randbytes(4096),
    "cut.png": lambda: Image(1).png()[:200],
    "cut-late.png": lambda: Image(1, 280, 280).png()[:-40],
    "cut.jpeg": lambda: encoded("RGB", "JPEG")[:300],
    "broken-sum.png": lambda: _changed(Image(1).png(), 60),
    "header-only.png": lambda: Image(1).png()[:33],
    "picture.svg": lambda: b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
    "document.pdf": lambda: b"%PDF-1.4\n1 0 obj\n<<>>\nendobj\ntrailer\n<<>>\n%%EOF\n",
}

MOVING: dict[str, Callable[[], bytes]] = {
    "video.mp4": lambda: Video(1).mp4(),
    "long.mp4": lambda: Video(2, frames=20).mp4(),
    "odd.mp4": lambda: Video(3, frames=9, fps=3, width=140).mp4(),
    "cut.mp4": lambda: Video(1).mp4()[:600],
    "sound.m4a": lambda: Audio(1).m4a(),
    "long.m4a": lambda: Audio(2, 9000).m4a(),
    "cut.m4a": lambda: Audio(1).m4a()[:300],
}

ALL = {**PICTURES, **NO_PICTURES, **MOVING}


def _changed(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :]
