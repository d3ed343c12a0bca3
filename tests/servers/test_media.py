"""Video and audio over this connector: answers equal to a colocated server's, however little memory there is.

Qwen2.5-VL and Qwen3-Omni are compared with a colocated server that is given the metadata which sglang's encoder
computes: sglang itself computes others where it is colocated (ci/cpu_bed, media_metadata.py says where).
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from sglang_mm_conn.demo.chat import ask
from sglang_mm_conn.demo.images import Image
from sglang_mm_conn.demo.media import Audio, Video
from sglang_mm_conn.demo.questions import Question
from sglang_mm_conn.demo.servers import ServerGroup
from sglang_mm_conn.demo.timeline import received
from sglang_mm_conn.demo.tiny_models import KINDS

# 64 rows of the widest kind, of which the first offer takes 20: every video is larger.
ENV = {
    "CPU_BED_FORBID_BUILTIN_TRANSPORT": "1",
    "SGLANG_MM_CONN_CHECKSUM": "1",
    "SGLANG_EMBEDDING_CACHE_BLOCK_SIZE": "16",
    "SGLANG_EMBEDDING_CACHE_BUFFER_SIZE": "4",
    "SGLANG_EMBEDDING_DEFAULT_ALLOCATE_BUFFER_SIZE": "20",
}
ENCODERS_METADATA = {"CPU_BED_MEDIA_METADATA": "1"}
ONE_VIDEO = Question("one video", "what happens?", videos=(Video(1),))
VIDEOS = (
    ONE_VIDEO,
    Question("odd number of frames", "what happens?", videos=(Video(2, frames=9, fps=3, width=140),)),
    Question("one second", "what happens?", videos=(Video(3, frames=6, fps=6),)),
    Question("long video", "what happens?", videos=(Video(4, frames=20),)),
    Question("videos of different lengths", "compare", videos=(Video(5), Video(6, frames=12, fps=5))),
    Question("images and a video", "compare", (Image(1), Image(2, 140, 112)), (Video(7),)),
)
# The audio items of one request have the same length. Where they are preprocessed together (colocated, or on one
# encoder), the shorter one is padded, and its last frame differs from the one without padding.
AUDIOS = (
    Question("one audio", "what is it?", audios=(Audio(1),)),
    Question("long audio", "what is it?", audios=(Audio(2, 9000),)),
    Question("two audios", "compare", audios=(Audio(3), Audio(4))),
    Question("image and audio", "compare", (Image(3),), (), (Audio(5),)),
    Question("two of each", "compare", (Image(4), Image(5, 140)), (Video(8), Video(9, 6)), (Audio(6), Audio(7))),
)


def _check(group: ServerGroup, reference: Any, questions: tuple[Question, ...]) -> None:
    """One after the other, then those without audio concurrently: an encoder makes one batch of concurrent audio and
    pads the shorter items."""
    expected = [reference.answer(question) for question in questions]
    for question, right in zip(questions, expected, strict=True):
        got = ask(group.language.url, question)
        assert got.same_as(right), (question.name, got, right)
    concurrent = [(question, right) for question, right in zip(questions, expected, strict=True) if not question.audios]
    with ThreadPoolExecutor(4) as clients:
        answers = list(clients.map(lambda job: ask(group.language.url, job[0]), concurrent))
    for (question, right), got in zip(concurrent, answers, strict=True):
        assert got.same_as(right), (question.name, got, right)


def _check_transfers(group: ServerGroup, path: str) -> None:
    rooms = received(group.language.log())
    assert {room.path for room in rooms} == {path}
    assert max(room.resumes for room in rooms) >= 2
    logs = [server.log() for server in group.servers]
    assert all("forbidden in this process" in log and "stock transport used" not in log for log in logs)


@pytest.mark.parametrize(("kind", "path"), [("qwen3_vl", "mooncake"), ("qwen2_5_vl", "shm")])
def test_videos_answer_as_colocated_though_they_are_larger_than_the_pool(
    kind: str, path: str, reference: Callable[..., Any], shared_group: Callable[..., ServerGroup]
) -> None:
    """Qwen3-VL: time stamps in the prompt, rows three times as wide as a token (deepstack). Qwen2.5-VL: seconds per
    frame. An answer depends on both."""
    right = reference(kind) if kind == "qwen3_vl" else reference(kind, **ENCODERS_METADATA)
    group = shared_group(kind, env={**ENV, "SGLANG_MM_CONN_DATA_PATH": path})
    _check(group, right, VIDEOS)
    _check_transfers(group, path)


@pytest.mark.parametrize("path", ["shm", "mooncake"])
def test_images_videos_and_audio_of_one_request_come_from_two_encoders(
    path: str, reference: Callable[..., Any], shared_group: Callable[..., ServerGroup]
) -> None:
    """Rows of two widths, several parts of one request, each in windows."""
    right = reference("qwen3_omni_moe", **ENCODERS_METADATA)
    env = {**ENV, "SGLANG_MM_CONN_DATA_PATH": path}
    flags = KINDS["qwen3_omni_moe"].encoder_flags
    group = shared_group("qwen3_omni_moe", encoders=2, env=env, encoder_flags=flags)
    _check(group, right, (*AUDIOS, *VIDEOS))
    _check_transfers(group, path)
    widths = {room.bytes // room.tokens for room in received(group.language.log())}
    assert len(widths) == 2, widths
    assert all("Embedding sent" in encoder.log() for encoder in group.encoders)


def test_the_video_that_sglang_places_differently_in_time_where_it_is_colocated(reference: Callable[..., Any]) -> None:
    """Why the comparison above needs CPU_BED_MEDIA_METADATA. When this fails, sglang has mended it: take that away."""
    alone = reference("qwen2_5_vl").answer(ONE_VIDEO)
    as_the_encoder = reference("qwen2_5_vl", **ENCODERS_METADATA).answer(ONE_VIDEO)
    assert not alone.same_as(as_the_encoder)
