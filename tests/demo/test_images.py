"""The generated images."""

import base64
import io

import numpy as np
import PIL.Image
import pytest

from sglang_mm_conn.demo.images import Image


@pytest.mark.parametrize(("width", "height"), [(112, 84), (1, 1), (15, 560)])
def test_size_is_exact(width: int, height: int) -> None:
    assert PIL.Image.open(io.BytesIO(Image(1, width, height).png())).size == (width, height)


def test_same_seed_same_pixels_and_other_seed_others() -> None:
    first, again, other = (np.asarray(PIL.Image.open(io.BytesIO(Image(seed).png()))) for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()


def test_data_uri_holds_the_png() -> None:
    image = Image(3)
    head, _, body = image.data_uri().partition(",")
    assert head == "data:image/png;base64"
    assert base64.b64decode(body) == image.png()


def test_empty_image_is_refused() -> None:
    with pytest.raises(ValueError, match="height must be at least 1 pixel, not 0"):
        Image(1, 10, 0)
