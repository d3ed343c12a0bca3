"""Forms of requests that a colocated server takes or refuses: several prompts in one request, several samples of one,
placeholders that do not match the media. sglang's own embedding transports fail on each of these.
"""

from __future__ import annotations

import base64
import contextlib
import json
import random
import re
from collections.abc import Callable
from typing import Any

import pytest
import requests
from transformers.convert_slow_tokenizer import bytes_to_unicode

from sglang_mm_conn.demo.images import Image
from sglang_mm_conn.demo.servers import Server, ServerGroup
from sglang_mm_conn.demo.tiny_tokenizer import TOKEN_ID, byte_alphabet
from tests.servers.observe import encodes_begun, is_idle, rooms_ended, wait_until

KIND = "qwen2_5_vl"
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
GREEDY = {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}


def prompt(images: int, text: str) -> str:
    return f"<|im_start|>user\n{IMAGE * images}{text}<|im_end|>\n<|im_start|>assistant\n"


def uri(seed: int) -> str:
    return Image(seed).data_uri()


def generate(texts: list[Any], images: list[Any], *, n: int = 1, **more: Any) -> dict[str, Any]:
    return {"text": texts, "image_data": images, "sampling_params": {**GREEDY, "n": n}, **more}


def chat(*seeds: int, n: int = 1, **more: Any) -> dict[str, Any]:
    content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": uri(seed)}} for seed in seeds]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": "what is this?"}]}]
    body = {"model": "m", "messages": messages, "temperature": 0, "max_tokens": 6, "ignore_eos": True, "n": n}
    return {**body, **more}


def ids_of(text: str) -> list[int]:
    """Token ids of ``text`` in the tiny tokenizer, which has one per byte."""
    alphabet, letters = byte_alphabet(), bytes_to_unicode()
    pieces = re.split(f"({'|'.join(map(re.escape, TOKEN_ID))})", text)
    return [
        number
        for piece in pieces
        for number in (
            [TOKEN_ID[piece]] if piece in TOKEN_ID else [alphabet.index(letters[byte]) for byte in piece.encode()]
        )
    ]


GENERATE, CHAT = "/generate", "/v1/chat/completions"
ONE, TWO, NONE = prompt(1, "what is this?"), prompt(2, "what are these?"), prompt(0, "who are you?")
# form: (path, body, images of it)
FORMS: dict[str, tuple[str, dict[str, Any], int]] = {
    "two samples": (CHAT, chat(1, n=2), 1),
    "three samples with two images, as a stream": (CHAT, chat(2, 3, n=3, stream=True), 2),
    "a list of prompts": (GENERATE, generate([ONE] * 3, [uri(4), uri(5), uri(6)]), 3),
    "a list of prompts with several images": (GENERATE, generate([TWO, ONE], [[uri(7), uri(8)], [uri(9)]]), 3),
    "a list of prompts, one without an image": (GENERATE, generate([ONE, NONE, ONE], [[uri(10)], None, [uri(11)]]), 2),
    "a list of one prompt": (GENERATE, generate([ONE], [[uri(12)]]), 1),
    "two samples of each prompt of a list": (GENERATE, generate([ONE, NONE, TWO], [[uri(13)], None, [uri(14), uri(15)]],
                                                                n=2), 3),
    "two samples of a prompt": (GENERATE, {**generate([], [uri(16)], n=2), "text": ONE}, 1),
    "a list of prompts as a stream": (GENERATE, generate([ONE, ONE], [[uri(17)], [uri(18)]], stream=True), 2),
    "a list of prompts with ids": (GENERATE, generate([ONE, ONE], [[uri(19)], [uri(20)]], rid=["a", "b"]), 2),
    "an image without a placeholder": (GENERATE, {**generate([], [uri(22)]), "text": NONE}, 0),
    "an image more than placeholders": (GENERATE, {**generate([], [uri(23), uri(24)]), "text": ONE}, 1),
    "placeholders among token ids": (GENERATE, {**generate([], [uri(25)]), "text": None, "input_ids": ids_of(ONE)}, 1),
    "an image more than placeholders in a list": (GENERATE, generate([ONE, NONE], [[uri(26), uri(27)], [uri(28)]]), 1),
    "the same image in two prompts": (GENERATE, generate([ONE, TWO], [[uri(21)], [uri(21), uri(21)]]), 3),
}  # fmt: skip
BAD: dict[str, tuple[str, dict[str, Any]]] = {
    "a broken image in a list": (GENERATE, generate([ONE, ONE], [[uri(30)], ["data:image/png;base64,AAAA"]])),
    "a broken image with two samples": (GENERATE, {**generate([], ["data:image/png;base64,AAAA"], n=2), "text": ONE}),
    "fewer images than prompts": (GENERATE, generate([ONE, ONE], [[uri(31)]])),
    "fewer images than placeholders": (GENERATE, {**generate([], [uri(34)]), "text": TWO}),
    "fewer images than placeholders in a list": (GENERATE, generate([ONE, TWO], [[uri(35)], [uri(36)]])),
    "an id twice": (GENERATE, generate([ONE, ONE], [[uri(32)], [uri(33)]], rid=["a", "a"])),
}


def send(server: Server, path: str, body: dict[str, Any]) -> tuple[int, Any]:
    """Status, and what must be the same: text, reason of the end and usage of each answer, in order."""
    response = requests.post(server.url + path, json=body, timeout=120, stream=bool(body.get("stream")))
    if response.status_code != 200:
        return response.status_code, None
    if body.get("stream"):
        return 200, joined(response, path)
    found: Any = response.json()
    if path == CHAT:
        return 200, [[(one["index"], one["message"]["content"], one["finish_reason"]) for one in found["choices"]],
                     found["usage"]]  # fmt: skip
    return 200, [
        (one["text"], one["meta_info"]["finish_reason"], one["meta_info"]["prompt_tokens"],
         one["meta_info"]["completion_tokens"])
        for one in (found if isinstance(found, list) else [found])
    ]  # fmt: skip


def joined(response: requests.Response, path: str) -> dict[int, str]:
    """The text of each answer of a stream."""
    texts: dict[int, str] = {}
    for line in response.iter_lines():
        data = line.removeprefix(b"data: ")
        if not data or data == b"[DONE]":
            continue
        event = json.loads(data)
        if path == GENERATE:
            texts[event.get("index", 0)] = event["text"]
        else:
            for choice in event["choices"]:
                texts[choice["index"]] = texts.get(choice["index"], "") + (choice["delta"].get("content") or "")
    return texts


@pytest.fixture(scope="module")
def colocated(reference: Callable[..., Any]) -> Server:
    running: Server = reference(KIND)._running()
    return running


@pytest.fixture
def group(shared_group: Callable[..., ServerGroup]) -> ServerGroup:
    return shared_group(KIND, encoders=2, env={"CPU_BED_FORBID_BUILTIN_TRANSPORT": "1", "SGLANG_MM_CONN_CHECKSUM": "1"})


@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_answered_as_colocated_and_each_image_is_encoded_once(
    form: str, colocated: Server, group: ServerGroup
) -> None:
    path, body, images = FORMS[form]
    begun, ended = sum(map(encodes_begun, group.encoders)), sum(map(rooms_ended, group.encoders))
    assert send(group.language, path, body) == send(colocated, path, body)
    wait_until(lambda: is_idle(group.language), "the language server holds nothing", 10)
    begun, ended = sum(map(encodes_begun, group.encoders)) - begun, sum(map(rooms_ended, group.encoders)) - ended
    assert begun == ended <= images, "however many samples"


@pytest.mark.parametrize("form", BAD)
def test_each_bad_form_gets_the_status_of_a_colocated_server(form: str, colocated: Server, group: ServerGroup) -> None:
    path, body = BAD[form]
    status, _ = send(group.language, path, body)
    assert status == send(colocated, path, body)[0] and status >= 400
    wait_until(lambda: is_idle(group.language), "the language server holds nothing", 20)
    path, body, _ = FORMS["two samples"]
    assert send(group.language, path, body) == send(colocated, path, body)


def test_a_client_that_leaves_a_batch_leaves_nothing_behind(group: ServerGroup) -> None:
    body = generate([TWO] * 8, [[uri(40 + number), uri(60 + number)] for number in range(8)], n=2)
    for seconds in (0.05, 0.3, 0.6):
        with contextlib.suppress(requests.Timeout):
            requests.post(group.language.url + GENERATE, json=body, timeout=seconds)
        wait_until(lambda: is_idle(group.language), "the language server holds nothing", 30)


def test_both_ranks_of_a_server_have_every_sample_of_every_prompt(
    colocated: Server, shared_group: Callable[..., ServerGroup]
) -> None:
    env = {"CPU_BED_FORBID_BUILTIN_TRANSPORT": "1", "SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
    group = shared_group(KIND, encoders=2, language_env=env, language_flags=("--tp-size", "2"))
    for form in ("two samples of each prompt of a list", "three samples with two images, as a stream"):
        path, body, _ = FORMS[form]
        assert send(group.language, path, body) == send(colocated, path, body)
    wait_until(lambda: is_idle(group.language), "the language server holds nothing", 10)


@pytest.mark.parametrize("form", [CHAT, GENERATE])
def test_a_broken_image_of_six_megabytes_is_refused_in_few_words(
    form: str, colocated: Server, group: ServerGroup
) -> None:
    broken = "data:image/png;base64," + base64.b64encode(random.Random(6).randbytes(6 << 20)).decode()
    body = chat(1) if form == CHAT else {**generate([], [broken]), "text": ONE}
    if form == CHAT:
        body["messages"][0]["content"][0]["image_url"]["url"] = broken
    before = {server.name: len(server.log()) for server in group.servers}
    response, theirs = (requests.post(one.url + form, json=body, timeout=120) for one in (group.language, colocated))
    assert response.status_code == theirs.status_code == 400
    assert len(response.content) <= 1500 and broken[1000:1100] not in response.text
    assert send(group.language, *FORMS["two samples"][:2])[0] == 200, "the encoders are well"
    for server in group.servers:
        grown = server.log()[before[server.name] :]
        assert len(grown) <= 20_000 and broken[1000:1100] not in grown, server.name
