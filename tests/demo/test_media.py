"""The generated videos and audio."""

import base64
import io
import itertools
from collections.abc import Callable

import pytest

from sglang_mm_conn.demo import media
from sglang_mm_conn.demo.media import SAMPLE_RATE, Audio, Video

av = pytest.importorskip("av")


def test_video_has_the_size_length_and_rate_that_it_says_and_no_two_equal_frames() -> None:
    with av.open(io.BytesIO(Video(1, frames=9, fps=3, width=140, height=84).mp4())) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert (stream.width, stream.height, stream.average_rate) == (140, 84, 3)
    assert len(frames) == 9
    assert all((one != other).any() for one, other in itertools.pairwise(frames))


def test_audio_has_the_length_that_it_says() -> None:
    with av.open(io.BytesIO(Audio(1, 700).m4a())) as container:
        stream = container.streams.audio[0]
        assert stream.rate == SAMPLE_RATE
        assert sum(frame.samples for frame in container.decode(stream)) == SAMPLE_RATE * 7 // 10


@pytest.mark.parametrize("make", [lambda seed: Video(seed).mp4(), lambda seed: Audio(seed).m4a()])
def test_same_seed_same_bytes_and_other_seed_others(make: Callable[[int], bytes]) -> None:
    first, other = make(1), make(2)
    media._mp4.cache_clear()
    media._m4a.cache_clear()
    assert make(1) == first != other


def test_data_uris_hold_the_bytes() -> None:
    for kind, uri, content in (
        ("video/mp4", Video(3).data_uri(), Video(3).mp4()),
        ("audio/mp4", Audio(3).data_uri(), Audio(3).m4a()),
    ):
        head, _, body = uri.partition(",")
        assert head == f"data:{kind};base64"
        assert base64.b64decode(body) == content


def test_what_cannot_be_made_is_refused_naming_it() -> None:
    with pytest.raises(ValueError, match="video frames must be at least 1, not 0"):
        Video(1, frames=0)
    with pytest.raises(ValueError, match="video width must be an even number of pixels, not 85"):
        Video(1, width=85)
    with pytest.raises(ValueError, match="audio milliseconds must be at least 1, not 0"):
        Audio(1, 0)
