"""Owns the videos and audio of the demo and the tests: generated, and the same bytes for the same description.

Generating them needs PyAV. Questions without them can be asked where it is missing.
"""

import base64
import io
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

SAMPLE_RATE = 16000  # what models for speech want
_TONE = 400  # samples of one tone


@dataclass(frozen=True)
class Video:
    """A video without audio, named by what it is generated from. No two frames are equal."""

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
class Audio:
    """A sequence of tones, named by what it is generated from."""

    seed: int
    milliseconds: int = 1000

    def __post_init__(self) -> None:
        _at_least_1("audio", "milliseconds", self.milliseconds)

    def m4a(self) -> bytes:
        return _m4a(self)

    def data_uri(self) -> str:
        # MP4, which sglang decodes with PyAV: for a WAV file it needs torchaudio.
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
            image = pixels([video.seed, index], video.width, video.height)
            _encode(container, stream, av.VideoFrame.from_ndarray(image, format="rgb24"))
        _encode(container, stream, None)
    return out.getvalue()


@lru_cache(maxsize=64)
def _m4a(audio: Audio) -> bytes:
    import av
    import numpy as np

    count = SAMPLE_RATE * audio.milliseconds // 1000
    pitches = np.random.default_rng(audio.seed).uniform(200, 4000, -(-count // _TONE)).repeat(_TONE)[:count]
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
