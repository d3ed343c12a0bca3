"""Owns the video clips and sounds of the demo and the tests: generated, and the same bytes for the same description.

Both are made with PyAV, which only their making needs: a question without them can be asked where it is missing.
"""

import base64
import io
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

SAMPLE_RATE = 16000  # what models for speech want
_TONE = 400  # samples that one tone of a sound lasts


@dataclass(frozen=True)
class Video:
    """A clip without sound in which every frame is another picture, named by what it is generated from."""

    seed: int
    frames: int = 8
    fps: int = 4
    width: int = 112
    height: int = 84

    def __post_init__(self) -> None:
        for name in ("frames", "fps"):
            _at_least_1("video", name, getattr(self, name))
        for name in ("width", "height"):
            if getattr(self, name) < 2 or getattr(self, name) % 2:
                raise ValueError(f"video {name} must be an even number of pixels, not {getattr(self, name)}")

    def mp4(self) -> bytes:
        return _mp4(self)

    def data_uri(self) -> str:
        return "data:video/mp4;base64," + base64.b64encode(self.mp4()).decode()


@dataclass(frozen=True)
class Sound:
    """A sequence of tones, named by what it is generated from."""

    seed: int
    milliseconds: int = 1000

    def __post_init__(self) -> None:
        _at_least_1("sound", "milliseconds", self.milliseconds)

    def m4a(self) -> bytes:
        return _m4a(self)

    def data_uri(self) -> str:
        # In a container of video: sglang decodes those with PyAV, and needs torchaudio for a plain WAV file.
        return "data:audio/mp4;base64," + base64.b64encode(self.m4a()).decode()


def _at_least_1(what: str, name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{what} {name} must be at least 1, not {value}")


@lru_cache(maxsize=64)
def _mp4(video: Video) -> bytes:
    import av

    from sglang_mm_conn.demo.images import pixels

    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=video.fps)
        stream.width, stream.height, stream.pix_fmt = video.width, video.height, "yuv420p"
        stream.codec_context.thread_count = 1  # several threads cut the stream differently from run to run
        for index in range(video.frames):
            picture = pixels([video.seed, index], video.width, video.height)
            _encode(container, stream, av.VideoFrame.from_ndarray(picture, format="rgb24"))
        _encode(container, stream, None)
    return out.getvalue()


@lru_cache(maxsize=64)
def _m4a(sound: Sound) -> bytes:
    import av
    import numpy as np

    count = SAMPLE_RATE * sound.milliseconds // 1000
    pitches = np.random.default_rng(sound.seed).uniform(200, 4000, -(-count // _TONE)).repeat(_TONE)[:count]
    wave = (np.sin(2 * np.pi * np.cumsum(pitches) / SAMPLE_RATE) * 12000).astype(np.int16)
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("flac", rate=SAMPLE_RATE, layout="mono", format="s16")  # nothing is lost
        frame = av.AudioFrame.from_ndarray(wave.reshape(1, -1), format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = SAMPLE_RATE, 0, Fraction(1, SAMPLE_RATE)
        _encode(container, stream, frame)
        _encode(container, stream, None)
    return out.getvalue()


def _encode(container: Any, stream: Any, frame: Any) -> None:
    for packet in stream.encode(frame):
        container.mux(packet)
