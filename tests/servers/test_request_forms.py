"""What a request with several prompts, samples or images costs: one encode and one transfer an image, nothing left
behind, few words in the logs. That the answers are right is compared in test_parity.py.
"""

from __future__ import annotations

import base64
import contextlib
import random
from collections.abc import Callable
from typing import Any

import pytest
import requests

from sglang_mm_conn.demo.servers import Server, ServerGroup
from tests.parity.form import CHAT, GENERATE, NONE, ONE, TWO, chat, generate, image, picture
from tests.servers.observe import encodes_begun, is_idle, rooms_ended, wait_until

KIND = "qwen2_5_vl"
P = [picture(seed) for seed in range(400, 420)]
# form: (path, body, images of it)
COUNTED: dict[str, tuple[str, dict[str, Any], int]] = {
    "two samples": (CHAT, chat(image(P[0]), "what?", n=2), 1),
    "three samples, as a stream": (CHAT, chat(image(P[1]), "what?", n=3, stream=True), 1),
    "a list of prompts, one without an image": (GENERATE, generate([ONE, NONE, ONE], [[P[3]], None, [P[4]]]), 2),
    "two samples of each prompt of a list": (
        GENERATE, generate([ONE, NONE, TWO], [[P[5]], None, [P[6], P[7]]], sampling={"n": 2}), 3),
    "an image without a placeholder": (GENERATE, generate(NONE, [P[8]]), 0),
    "an image more than placeholders in a list": (GENERATE, generate([ONE, NONE], [[P[9], P[10]], [P[11]]]), 1),
    "an image fewer than placeholders": (GENERATE, generate(TWO, [P[12]]), 0),
    "what the client has preprocessed": (GENERATE, generate(ONE, [{"format": "precomputed_embedding"}]), 0),
}  # fmt: skip


def status(server: Server, path: str, body: dict[str, Any]) -> int:
    response = requests.post(server.url + path, json=body, timeout=120)
    return response.status_code


@pytest.fixture(scope="module")
def colocated(reference: Callable[..., Any]) -> Server:
    running: Server = reference(KIND)._running()
    return running


@pytest.fixture
def group(shared_group: Callable[..., ServerGroup]) -> ServerGroup:
    return shared_group(KIND, encoders=2, env={"CPU_BED_FORBID_BUILTIN_TRANSPORT": "1", "SGLANG_MM_CONN_CHECKSUM": "1"})


@pytest.mark.parametrize("form", COUNTED)
def test_each_image_is_encoded_and_sent_once_however_many_samples(form: str, group: ServerGroup) -> None:
    path, body, images = COUNTED[form]
    begun, ended = sum(map(encodes_begun, group.encoders)), sum(map(rooms_ended, group.encoders))
    status(group.language, path, body)
    wait_until(lambda: is_idle(group.language), "the language server holds nothing", 10)
    begun, ended = sum(map(encodes_begun, group.encoders)) - begun, sum(map(rooms_ended, group.encoders)) - ended
    assert begun == ended <= images and bool(begun) == bool(images)


def test_a_client_that_leaves_a_batch_leaves_nothing_behind(group: ServerGroup) -> None:
    images = [[picture(40 + number), picture(60 + number)] for number in range(8)]
    body = generate([TWO] * 8, images, sampling={"n": 2})
    for seconds in (0.05, 0.3, 0.6):
        with contextlib.suppress(requests.Timeout):
            requests.post(group.language.url + GENERATE, json=body, timeout=seconds)
        wait_until(lambda: is_idle(group.language), "the language server holds nothing", 30)


def test_both_ranks_of_a_server_have_every_sample_of_every_prompt(
    colocated: Server, shared_group: Callable[..., ServerGroup]
) -> None:
    env = {"CPU_BED_FORBID_BUILTIN_TRANSPORT": "1", "SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
    group = shared_group(KIND, encoders=2, language_env=env, language_flags=("--tp-size", "2"))
    images = [
        [picture(13)],
        None,
        [picture(14), picture(15)],
    ]  # two ranks round differently: of others a text may differ
    body = generate([ONE, NONE, TWO], images, sampling={"n": 2})
    texts = [
        [one["text"] for one in requests.post(server.url + GENERATE, json=body, timeout=120).json()]
        for server in (group.language, colocated)
    ]
    assert texts[0] == texts[1] and len(texts[0]) == 6
    assert status(group.language, CHAT, chat(image(P[1]), "what?", n=3)) == 200
    wait_until(lambda: is_idle(group.language), "the language server holds nothing", 10)


@pytest.mark.parametrize("path", [CHAT, GENERATE])
def test_a_broken_image_of_six_megabytes_is_refused_in_few_words(
    path: str, colocated: Server, group: ServerGroup
) -> None:
    broken = "data:image/png;base64," + base64.b64encode(random.Random(6).randbytes(6 << 20)).decode()
    body = chat(image(broken), "what?") if path == CHAT else generate(ONE, [broken])
    before = {server.name: len(server.log()) for server in group.servers}
    response, theirs = (requests.post(one.url + path, json=body, timeout=120) for one in (group.language, colocated))
    assert response.status_code == theirs.status_code == 400
    assert len(response.content) <= 1500 and broken[1000:1100] not in response.text
    assert status(group.language, CHAT, chat(image(P[0]), "what?")) == 200, "the encoders are well"
    for server in group.servers:
        grown = server.log()[before[server.name] :]
        assert len(grown) <= 20_000 and broken[1000:1100] not in grown, server.name
