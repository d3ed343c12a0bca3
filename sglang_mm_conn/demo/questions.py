"""Owns the questions of the demo and of the server tests. Each has a different number or shape of images."""

from dataclasses import dataclass

from sglang_mm_conn.demo.images import Image
from sglang_mm_conn.demo.media import Audio, Video


@dataclass(frozen=True)
class Question:
    """One chat request: a text and its media."""

    name: str
    text: str
    images: tuple[Image, ...] = ()
    videos: tuple[Video, ...] = ()
    audios: tuple[Audio, ...] = ()
    max_tokens: int = 24


_FIRST = Image(seed=1)

QUESTIONS = (
    Question("text only", "hello"),
    Question("one image", "what is this?", (_FIRST,)),
    Question("two images", "compare", (Image(seed=1), Image(seed=2, width=140, height=112))),
    Question("five images", "which one is odd?", tuple(Image(seed, 84 + 28 * seed, 112) for seed in range(3, 8))),
    Question("same image again", "what is this?", (_FIRST,)),
    Question("wide image", "what is at the right end?", (Image(seed=8, width=560, height=56),)),
    Question("tall image", "what is at the bottom?", (Image(seed=9, width=56, height=560),)),
    Question("large image", "describe", (Image(seed=10, width=392, height=336),)),
)
