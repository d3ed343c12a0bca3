"""Owns the images of the demo and the tests: generated, and the same for the same seed and size on every machine."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

CELL = 14  # pixels; one colour per cell, so that neighbouring patches differ


@dataclass(frozen=True)
class Image:
    """An image, named by what it is generated from."""

    seed: int
    width: int = 112
    height: int = 84

    def __post_init__(self) -> None:
        for name, value in (("width", self.width), ("height", self.height)):
            if value < 1:
                raise ValueError(f"image {name} must be at least 1 pixel, not {value}")

    def png(self) -> bytes:
        return _png(self.seed, self.width, self.height)

    def data_uri(self) -> str:
        return "data:image/png;base64," + base64.b64encode(self.png()).decode()


def pixels(seed: Sequence[int], width: int, height: int) -> Any:
    """RGB cells of random colours, as an array of height x width x 3 bytes."""
    import numpy as np

    columns, rows = -(-width // CELL), -(-height // CELL)
    cells = np.random.default_rng([*seed, width, height]).integers(0, 256, (rows, columns, 3), dtype=np.uint8)
    return cells.repeat(CELL, axis=0).repeat(CELL, axis=1)[:height, :width]


@lru_cache(maxsize=64)
def _png(seed: int, width: int, height: int) -> bytes:
    from PIL import Image as Pillow

    out = io.BytesIO()
    Pillow.fromarray(pixels([seed], width, height)).save(out, "PNG")
    return out.getvalue()
