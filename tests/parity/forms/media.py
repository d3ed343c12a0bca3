"""Media: every way to name them, every encoding, sizes, and what a request says of their processing."""

from __future__ import annotations

import base64
from functools import partial
from typing import Any

from tests.parity.client import Client
from tests.parity.form import (
    AUDIO,
    CHAT,
    GENERATE,
    ONE,
    VIDEO,
    Forms,
    audio,
    chat,
    generate,
    image,
    picture,
    prompt,
    video,
)
from tests.parity.pictures import NO_PICTURES, PICTURES

FORMS = Forms("Media")
_MP4, _M4A = "video/mp4", "audio/mp4"
SEEING_TIME = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_omni_moe")


# -- ways to name an image -----------------------------------------------------------------------------------------


def _by(way: str, client: Client) -> str:
    files = client.files
    ways = {
        "a data URI": files.uri("photo.png"),
        "a data URI with another type": files.uri("photo.png", "image/jpeg"),
        "a data URI with parameters": files.uri("photo.png", "image/png;charset=utf-8"),
        "a data URI in capitals": f"DATA:IMAGE/PNG;BASE64,{files.base64('photo.png')}",
        "a data URI with line breaks": f"data:image/png;base64,{base64.encodebytes(files.data('photo.png')).decode()}",
        "a data URI without padding": files.uri("photo.png").rstrip("="),
        "raw base64": files.base64("photo.png"),
        "http": files.url("photo.png"),
        "http, after a redirect": files.url("photo.png", "redirect/"),
        "http, slowly": files.url("photo.png", "slow/"),
        "http, with a query": files.url("photo.png") + "?size=1#part",
        "a path": str(files.path("photo.png")),
        "file://": f"file://{files.path('photo.png')}",
    }
    return ways[way]


_WAYS = (
    "a data URI", "a data URI with another type", "a data URI with parameters", "a data URI in capitals",
    "a data URI with line breaks", "a data URI without padding", "raw base64", "http", "http, after a redirect",
    "http, slowly", "a path", "file://",
)  # fmt: skip


def _asked_by(way: str, client: Client) -> dict[str, Any]:
    return chat(image(_by(way, client)), "what?")


def _generated_by(way: str, client: Client) -> dict[str, Any]:
    return generate(ONE, _by(way, client))


for way in _WAYS:
    FORMS.post(f"an image by {way}", CHAT, partial(_asked_by, way))
for way in ("raw base64", "http", "a path", "file://", "a data URI in capitals"):
    FORMS.post(f"an image by {way}, /generate", GENERATE, partial(_generated_by, way))

# -- encodings -----------------------------------------------------------------------------------------------------


def _picture(name: str, client: Client) -> dict[str, Any]:
    return chat(image(client.files.uri(name, "image/" + name.rpartition(".")[2])), "what?")


for name in PICTURES:
    FORMS.post(f"image: {name}", CHAT, partial(_picture, name))
for name in NO_PICTURES:
    FORMS.post(f"no image: {name}", CHAT, partial(_picture, name))

# -- what a request says of the processing -------------------------------------------------------------------------

for detail in ("auto", "low", "high", "default"):
    FORMS.post(f"detail: {detail}", CHAT, chat(image(picture(1, 280, 280), detail=detail), "what?"))
FORMS.post("max_dynamic_patch", CHAT, chat(image(picture(1), max_dynamic_patch=2), "what?"))
FORMS.post("min_dynamic_patch", CHAT, chat(image(picture(1), min_dynamic_patch=1), "what?"))
FORMS.post("max_long_side_pixel", CHAT, chat(image(picture(1, 280, 280), max_long_side_pixel=112), "what?"))
FORMS.post("max_dynamic_patch of /generate", GENERATE, generate(ONE, picture(1), max_dynamic_patch=2))
FORMS.post("image_max_dynamic_patch of /generate", GENERATE, generate(ONE, picture(1), image_max_dynamic_patch=2))
for name, kwargs in {
    "max_pixels": {"max_pixels": 28 * 28 * 4},
    "min_pixels": {"min_pixels": 28 * 28 * 64},
    "images_kwargs": {"images_kwargs": {"max_pixels": 28 * 28 * 4}},
    "an unknown one": {"no_such_thing": 1},
    "none": {},
}.items():
    asked = chat(image(picture(1, 280, 280)), "what?", mm_processor_kwargs=kwargs)
    FORMS.post(f"mm_processor_kwargs: {name}", CHAT, asked)
    sent = generate(ONE, picture(1, 280, 280), mm_processor_kwargs=kwargs)
    FORMS.post(f"mm_processor_kwargs of /generate: {name}", GENERATE, sent)
FORMS.post(
    "content_hash",
    CHAT,
    chat(image(picture(1), content_hash="sha256:" + "ab" * 32), "what?"),
    differs="sglang's encoder checks the hash; a colocated sglang does with some models only",
)
FORMS.post("a bad content_hash", CHAT, chat(image(picture(1), content_hash="12"), "what?"))
# A colocated Qwen3-VL ends at these.
HASHES = Forms("Media", kinds=("qwen2_vl", "qwen2_5_vl"))
HASHES.post("mm_hashes", GENERATE, generate(ONE, picture(1), mm_hashes=["ab12"]))
HASHES.post("mm_hashes, one too many", GENERATE, generate(ONE, picture(1), mm_hashes=["ab12", "cd34"]))
HASHES.post("mm_hashes that are none", GENERATE, generate(ONE, picture(1), mm_hashes=["not hex"]))

# -- videos and sound ----------------------------------------------------------------------------------------------

VIDEOS = Forms("Videos", kinds=SEEING_TIME)


def _video(name: str, client: Client, **options: Any) -> dict[str, Any]:
    return chat(video(client.files.uri(name, _MP4), **options), "what happens?")


for name in ("video.mp4", "long.mp4", "odd.mp4", "cut.mp4"):
    VIDEOS.post(f"video: {name}", CHAT, partial(_video, name))
VIDEOS.post("a video by http", CHAT, lambda c: chat(video(c.files.url("video.mp4")), "what?"))
VIDEOS.post("a video by a path", CHAT, lambda c: chat(video(str(c.files.path("video.mp4"))), "what?"))
VIDEOS.post("a video by file://", CHAT, lambda c: chat(video(f"file://{c.files.path('video.mp4')}"), "what?"))
VIDEOS.post("a video, raw base64", CHAT, lambda c: chat(video(c.files.base64("video.mp4")), "what?"))
VIDEOS.post("an image as a video", CHAT, lambda c: chat(video(c.files.uri("photo.png")), "what?"))
VIDEOS.post("a video as an image", CHAT, lambda c: chat(image(c.files.uri("video.mp4", _MP4)), "what?"))
VIDEOS.post("a video, /generate", GENERATE, lambda c: generate(
    prompt("what?", media=VIDEO), video_data=c.files.uri("video.mp4", _MP4)))  # fmt: skip
VIDEOS.post("two videos", CHAT, lambda c: chat(
    video(c.files.uri("video.mp4", _MP4)), video(c.files.uri("odd.mp4", _MP4)), "which?"))  # fmt: skip
VIDEOS.post("two videos and two images", CHAT, lambda c: chat(
    video(c.files.uri("video.mp4", _MP4)), image(picture(2)), video(c.files.uri("odd.mp4", _MP4)), image(picture(3)),
    "which?"))  # fmt: skip
VIDEOS.post("a video more than placeholders", GENERATE, lambda c: generate(
    prompt("what?", media=VIDEO), video_data=[c.files.uri("video.mp4", _MP4)] * 2))  # fmt: skip
VIDEOS.post("a placeholder more than videos", GENERATE, lambda c: generate(
    prompt("what?", media=VIDEO * 2), video_data=c.files.uri("video.mp4", _MP4)))  # fmt: skip
VIDEOS.post("a batch of videos", GENERATE, lambda c: generate(
    [prompt("what?", media=VIDEO)] * 2, video_data=[c.files.uri("video.mp4", _MP4), c.files.uri("odd.mp4", _MP4)],
))  # fmt: skip
VIDEOS.post("two samples of a video", CHAT, lambda c: {**_video("video.mp4", c), "n": 2})
for options in ({"fps": 1.0}, {"max_frames": 4}, {"max_long_side_pixel": 56}, {"fps": 0.0}):
    name = ", ".join(f"{key} {value}" for key, value in options.items())
    VIDEOS.post(f"a video with {name}", CHAT, partial(_video, "long.mp4", **options))
for kwargs in ({"fps": 1.0}, {"videos_kwargs": {"fps": 1}}, {"max_pixels": 28 * 28 * 4}):
    VIDEOS.post(
        f"a video with mm_processor_kwargs {kwargs}", CHAT, lambda c, k=kwargs: {  # type: ignore[misc]
            **_video("long.mp4", c), "mm_processor_kwargs": k},
    )  # fmt: skip
VIDEOS.post("video_config", GENERATE, lambda c: generate(
    prompt("what?", media=VIDEO), video_data=c.files.uri("long.mp4", _MP4), video_config={"fps": 1.0}))  # fmt: skip

SOUND = Forms("Sound", kinds=("qwen3_omni_moe",))
for name in ("sound.m4a", "long.m4a", "cut.m4a"):
    SOUND.post(f"sound: {name}", CHAT, lambda c, n=name: chat(audio(c.files.uri(n, _M4A)), "what?"))  # type: ignore[misc]
SOUND.post("sound by http", CHAT, lambda c: chat(audio(c.files.url("sound.m4a")), "what?"))
SOUND.post("sound by a path", CHAT, lambda c: chat(audio(str(c.files.path("sound.m4a"))), "what?"))
SOUND.post("two sounds", CHAT, lambda c: chat(*[audio(c.files.uri("sound.m4a", _M4A))] * 2, "same?"))
SOUND.post("an image, a video and sound", CHAT, lambda c: chat(
    image(picture(3)), video(c.files.uri("video.mp4", _MP4)), audio(c.files.uri("sound.m4a", _M4A)), "what?",
))  # fmt: skip
SOUND.post("sound, /generate", GENERATE, lambda c: generate(
    prompt("what?", media=AUDIO), audio_data=c.files.uri("sound.m4a", _M4A)))  # fmt: skip
SOUND.post("two samples of a sound", CHAT, lambda c: chat(audio(c.files.uri("sound.m4a", _M4A)), "what?", n=2))

NO_SOUND = Forms("Sound", kinds=("qwen2_vl", "qwen2_5_vl", "qwen3_vl"))
NO_SOUND.post("sound for a model without", CHAT, lambda c: chat(audio(c.files.uri("sound.m4a", _M4A)), "what?"))
NO_SOUND.post("sound for a model without, /generate", GENERATE, lambda c: generate(
    ONE, picture(1), audio_data=c.files.uri("sound.m4a", _M4A)))  # fmt: skip

ALL = [*FORMS, *HASHES, *VIDEOS, *SOUND, *NO_SOUND]
