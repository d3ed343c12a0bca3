"""What a dispatcher reads from an item without fetching it: how large it is, and its key."""

from __future__ import annotations

import base64
import io
import random
from typing import Any

import pytest
from PIL import Image

from sglang_mm_conn.connector.dispatch.media import item_of
from sglang_mm_conn.core.dispatch.choice import Item
from sglang_mm_conn.core.dispatch.load import IMAGE_WORK

FORMATS = ["PNG", "JPEG", "GIF", "BMP"]
SIZE = (1200, 900)
WORK = 1.08


def encoded(kind: str, size: tuple[int, int] = SIZE, **options: Any) -> bytes:
    """A picture that does not compress well: its file is far longer than its header."""
    noise = Image.frombytes("L", (size[0] // 4, size[1] // 4), random.Random(1).randbytes(size[0] * size[1] // 16))
    file = io.BytesIO()
    noise.convert("RGB").resize(size).save(file, kind, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def pictures() -> dict[str, bytes]:
    return {kind: encoded(kind) for kind in FORMATS}


def work(media: object, modality: str = "IMAGE") -> float:
    return item_of(modality, media, None, with_key=False).work


@pytest.mark.parametrize("kind", FORMATS)
def test_an_image_counts_by_its_pixels_however_it_is_given(kind: str, pictures: dict[str, bytes]) -> None:
    data = pictures[kind]
    assert len(data) > 10_000
    text = base64.b64encode(data).decode()
    for media in (data, text, f"data:image/{kind.lower()};base64,{text}", Image.open(io.BytesIO(data))):
        assert work(media) == pytest.approx(WORK)


def test_a_webp_file_counts_as_one_of_unknown_size() -> None:
    assert work(encoded("WEBP")) == IMAGE_WORK


@pytest.mark.parametrize("kind", FORMATS)
def test_a_small_image_is_little_work(kind: str) -> None:
    data = encoded(kind, (100, 200))
    assert work(data) == work("data:;base64," + base64.b64encode(data).decode()) == pytest.approx(0.02)


@pytest.mark.parametrize(
    "media",
    [
        "http://host/picture.jpg",
        "https://host/a/b?c=d",
        "file:///tmp/picture.jpg",
        "/tmp/picture.jpg",
        "./picture.png",
        "~/picture.png",
        "",
        "data:",
        "data:image/png;base64",
        "data:image/png;base64,",
        "data:image/svg+xml,<svg/>",
        "data:image/png;base64,AAAA",
        "not base64 at all \u00e4",
        "AAAAA",
        b"",
        b"no image",
        None,
        {"url": "http://host/picture.jpg"},
        3,
    ],
)
def test_an_image_of_unknown_size_is_work_of_one_unit(media: object) -> None:
    assert item_of("IMAGE", media, None, with_key=True).work == IMAGE_WORK


def test_a_jpeg_with_its_size_behind_a_long_block_has_an_unknown_one() -> None:
    assert work(encoded("JPEG", exif=b"Exif\0\0" + bytes(30_000))) == IMAGE_WORK


def test_a_picture_that_claims_to_be_huge_is_work_and_no_error() -> None:
    """Pillow warns of such a file, or refuses it: nothing of that may reach the client."""
    for side in (12_000, 60_000):
        data = bytearray(encoded("PNG"))
        data[16:24] = side.to_bytes(4, "big") * 2
        assert work(bytes(data)) > 0
        head = bytearray(encoded("GIF"))
        head[6:10] = min(side, 65535).to_bytes(2, "little") * 2
        assert work(bytes(head)) > 0


def test_broken_pictures_are_work_and_no_error(pictures: dict[str, bytes]) -> None:
    chance = random.Random(4)
    for kind in FORMATS:
        for _ in range(300):
            data = bytearray(pictures[kind][: chance.choice((10, 30, 100, 1000, 10_000))])
            for _ in range(chance.randrange(5)):
                data[chance.randrange(len(data))] = chance.randrange(256)
            assert work(bytes(data)) > 0
            text = base64.b64encode(data).decode()
            assert work("data:image/png;base64," + text[: chance.randrange(len(text))]) > 0


def test_video_and_sound_count_by_their_bytes() -> None:
    data = bytes(1_000_000)
    text = base64.b64encode(data).decode()
    for media in (data, text, "data:video/mp4;base64," + text):
        assert work(media, "VIDEO") == pytest.approx(4.0, rel=0.01)
        assert work(media, "AUDIO") == pytest.approx(3.125, rel=0.01)
    assert work("http://host/film.mp4", "VIDEO") == 8 * IMAGE_WORK
    assert work("http://host/song.mp3", "AUDIO") == IMAGE_WORK
    assert work(object(), "VIDEO") == 8 * IMAGE_WORK


def test_the_same_content_has_the_same_key_and_other_content_another() -> None:
    def key(media: object) -> str:
        return item_of("IMAGE", media, None, with_key=True).key

    assert key("http://host/a.png") == key("http://host/a.png") != key("http://host/b.png")
    assert key(b"bytes") == key(b"bytes") != key(b"other bytes")
    assert key("\ud800") and key(Image.new("RGB", (1, 1))) == key(None) == ""


def test_the_clients_hash_is_the_key_and_without_need_none_is_made() -> None:
    assert item_of("IMAGE", "http://host/a.png", "hash", with_key=True).key == "hash"
    assert item_of("AUDIO", "http://host/a.png", "hash", with_key=False).key == "hash"
    assert item_of("VIDEO", "http://host/a.mp4", None, with_key=False) == Item("VIDEO", 8 * IMAGE_WORK, "")
