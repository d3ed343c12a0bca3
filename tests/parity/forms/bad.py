"""Bad input: each way in which media, prompts, counts, parameters and sizes can be wrong."""

from __future__ import annotations

from functools import partial
from typing import Any

from tests.parity.client import Client
from tests.parity.form import (
    CHAT,
    COMPLETIONS,
    GENERATE,
    ONE,
    TWO,
    Forms,
    audio,
    chat,
    generate,
    image,
    picture,
    prompt,
    turn,
)

FORMS = Forms("Bad input")
P = [picture(seed) for seed in range(130, 140)]

# -- media ---------------------------------------------------------------------------------------------------------

_SOURCES: dict[str, Any] = {
    "an empty URL": "",
    "a space": " ",
    "a word": "nonsense",
    "an unknown scheme": "ftp://127.0.0.1/x.png",
    "a URL without a host": "http:///x.png",
    "a port that is none": "http://127.0.0.1:99999/x.png",
    "a port that refuses": "http://127.0.0.1:9/x.png",
    "a host that is unknown": "http://no-such-host.invalid/x.png",
    "a path that is none": "/nonexistent/x.png",
    "a path to a directory": "/",
    "file:// of nothing": "file:///nonexistent.png",
    "an empty data URI": "data:image/png;base64,",
    "a data URI without a comma": "data:image/png;base64",
    "a data URI that is not base64": "data:image/png;base64,@@@@",
    "a data URI of a text": "data:text/plain,hello",
    "an image of four bytes": "data:image/png;base64,AAAA",
}
_QWEN3 = "a colocated Qwen3-VL answers 500, though the input is at fault"
for name, source in _SOURCES.items():
    far = name in ("a port that refuses", "a host that is unknown")
    FORMS.post(f"image by {name}", CHAT, chat(image(source), "what?"), differs=_QWEN3 if far else "")
for name in ("an empty URL", "a word", "a path that is none", "an empty data URI", "an image of four bytes"):
    FORMS.post(f"image by {name}, /generate", GENERATE, generate(ONE, _SOURCES[name]))


def _served(way: str, name: str, client: Client) -> dict[str, Any]:
    return chat(image(client.files.url(name, way)), "what?")


for way, name in (
    ("status/", "404"), ("status/", "403"), ("status/", "500"), ("cut/", "photo.png"), ("", "text.png"),
    ("", "empty.png"),
):  # fmt: skip
    far = way in ("status/", "cut/")
    FORMS.post(f"image by http: {way}{name}", CHAT, partial(_served, way, name), differs=_QWEN3 if far else "")
FORMS.post("image by https from a server that speaks http", CHAT, lambda client: chat(
    image(client.files.url("photo.png").replace("http:", "https:")), "what?"), differs=_QWEN3)  # fmt: skip
for name, data in {
    "a number": 5, "a list of numbers": [1, 2], "an object": {"a": 1}, "a list of none": [None], "a boolean": True,
    "an unknown format": [{"format": "no_such", "feature": [1]}],
    "an empty list": [], "an empty object": {}, "nested lists": [[[P[0]]]],
    "precomputed without data": [{"format": "precomputed_embedding"}],
    "processor output without data": [{"format": "processor_output"}],
    "precomputed as JSON": [{"format": "precomputed_embedding", "feature": [[0.0] * 128] * 12,
                             "image_grid_thw": [[1, 6, 8]]}],
}.items():  # fmt: skip
    differs = _QWEN3 if name == "an empty object" else ""
    FORMS.post(f"image_data: {name}", GENERATE, generate(ONE, data), differs=differs)
FORMS.post("a broken image beside a good one", CHAT, chat(image(P[0]), image(_SOURCES["a word"]), "which?"))
FORMS.post("a broken image, streaming", CHAT, chat(image("data:image/png;base64,AAAA"), "what?", stream=True))
FORMS.post("a broken image, /generate streaming", GENERATE, generate(ONE, "data:image/png;base64,AAAA", stream=True))
FORMS.post("a broken image, two samples", CHAT, chat(image("data:image/png;base64,AAAA"), "what?", n=2))
FORMS.post("a broken image in a batch", GENERATE, generate([ONE, ONE], [P[0], "data:image/png;base64,AAAA"]))
FORMS.post("a broken image, /v1/responses", "/v1/responses", {"model": "m", "input": [{"role": "user", "content": [
    {"type": "input_image", "image_url": "data:image/png;base64,AAAA"}]}], "max_output_tokens": 4})  # fmt: skip
FORMS.post("a broken image, /v1/messages", "/v1/messages", {"model": "m", "max_tokens": 4, "messages": [
    {"role": "user", "content": [{"type": "image", "source": {
        "type": "base64", "media_type": "image/png", "data": "AAAA"}}]}]})  # fmt: skip
FORMS.post("sound that is none", CHAT, chat(audio("data:audio/mp4;base64,AAAA"), "what?"))

# -- counts --------------------------------------------------------------------------------------------------------

FORMS.post("a placeholder more than images", GENERATE, generate(TWO, [P[0]]))
FORMS.post("many placeholders, one image", GENERATE, generate(prompt("?", images=9), [P[0]]))
FORMS.post("a placeholder more than images, streaming", GENERATE, generate(TWO, [P[0]], stream=True))
FORMS.post("a placeholder more than images, two samples", GENERATE, generate(TWO, [P[0]], sampling={"n": 2}))
FORMS.post("a placeholder more than images in a batch", GENERATE, generate([ONE, TWO], [[P[0]], [P[1]]]))
FORMS.post("fewer images than prompts", GENERATE, generate([ONE, ONE], [[P[0]]]))
FORMS.post("more images than prompts", GENERATE, generate([ONE], [[P[0]], [P[1]]]))
FORMS.post("an empty batch", GENERATE, generate([], []))
FORMS.post("half a placeholder", GENERATE, generate(prompt("<|image_pad|>what?"), [P[0]]))
FORMS.post("begin without placeholder", GENERATE, generate(prompt("<|vision_start|>what?"), [P[0]]))
FORMS.post("an id twice in a batch", GENERATE, generate([ONE] * 2, [P[0], P[1]], rid=["parity-x", "parity-x"]))
FORMS.post("ids, one too few", GENERATE, generate([ONE] * 2, [P[0], P[1]], rid=["parity-x"]))
FORMS.post("sampling parameters, one too few", GENERATE, {
    "text": [ONE, ONE], "image_data": [P[0], P[1]], "sampling_params": [{"max_new_tokens": 1}]})  # fmt: skip
FORMS.post("more images than the server's limit", CHAT, chat(*[image(picture(1, 28, 28))] * 25, "which?"))
FORMS.post("more images than the limit, most without a placeholder", GENERATE, generate(ONE, [P[0]] * 25))
FORMS.post("none beside an image", GENERATE, generate(ONE, [None, P[0]]))
FORMS.post("an image beside none", GENERATE, generate(ONE, [P[0], None]))
FORMS.post("a surplus broken image", GENERATE, generate(ONE, [P[0], "data:image/png;base64,AAAA"]),
           differs="a colocated Qwen3-VL reads images that it does not use")  # fmt: skip
FORMS.post("more hashes than images", GENERATE, generate(ONE, [P[0]], mm_content_hashes=["sha256:" + "ab" * 32] * 2))

# -- prompts and parameters (none has a token id outside the vocabulary: it ends a colocated sglang) -------------------

FORMS.post("no prompt", GENERATE, {"image_data": P[0], "sampling_params": {"max_new_tokens": 1}})
FORMS.post("text and token ids", GENERATE, generate(ONE, P[0], input_ids=[1, 2]))
FORMS.post("an empty prompt", GENERATE, generate("", P[0]), differs="the input is at fault: 400, not 500")
FORMS.post("no token ids", GENERATE, generate(None, P[0], input_ids=[]))
FORMS.post("a prompt that is too long", GENERATE, generate(prompt("word " * 900, images=1), P[0]))
FORMS.post("images that are too long together", CHAT, chat(
    *[image(picture(140 + n, 560, 560)) for n in range(8)], "which?"))  # fmt: skip
FORMS.post("a prompt that is too long, streaming", GENERATE, generate(
    prompt("word " * 900, images=1), P[0], stream=True))  # fmt: skip
FORMS.post("a chat that is too long, streaming", CHAT, chat(image(P[0]), "word " * 900, stream=True))
_LARGE = picture(148, 980, 980)
for stream in (False, True):
    how = ", streaming" if stream else ""
    FORMS.post(f"an answer that does not fit behind the image{how}", GENERATE, generate(
        ONE, _LARGE, sampling={"max_new_tokens": 1500}, stream=stream))  # fmt: skip
    FORMS.post(f"a chat's answer that does not fit{how}", CHAT, chat(
        image(_LARGE), "what?", max_tokens=1500, stream=stream))  # fmt: skip
FORMS.post("too many new tokens", GENERATE, generate(ONE, P[0], sampling={"max_new_tokens": 100000}))
FORMS.post("input_embeds", GENERATE, generate(None, P[0], input_embeds=[[0.0] * 128] * 4))
for name, value in {
    "temperature": -1, "top_p": 2, "top_k": -7, "min_p": 3, "max_new_tokens": -1, "min_new_tokens": -1,
    "frequency_penalty": 9, "repetition_penalty": -1, "n": 0, "stop_token_ids": "a", "regex": "(", "ebnf": "?",
    "json_schema": "{", "no_such_parameter": 1, "logit_bias": {"999999": 1},
}.items():  # fmt: skip
    FORMS.post(f"{name} {value}", GENERATE, generate(ONE, P[0], sampling={name: value}))
FORMS.post("n 0 in a chat", CHAT, chat(image(P[0]), "what?", n=0))
FORMS.post("temperature -1 in a chat", CHAT, chat(image(P[0]), "what?", temperature=-1))
FORMS.post("max_tokens 0 in a chat", CHAT, chat(image(P[0]), "what?", max_tokens=0))
FORMS.post("an unknown session", GENERATE, generate(ONE, P[0], session_params={"id": "parity-unknown"}))
FORMS.post("log-probabilities past the end", GENERATE, generate(
    ONE, P[0], return_logprob=True, logprob_start_len=99999))  # fmt: skip

# -- messages ------------------------------------------------------------------------------------------------------

FORMS.post("no messages", CHAT, {"model": "m", "messages": []})
FORMS.post("an unknown role", CHAT, chat(messages=[turn("nobody", image(P[0]))]))
FORMS.post("an unknown part", CHAT, chat({"type": "smell", "smell": "x"}, "what?"))
FORMS.post("an image part without a URL", CHAT, chat({"type": "image_url", "image_url": {}}, "what?"))
FORMS.post("an image URL that is a text", CHAT, chat({"type": "image_url", "image_url": P[0]}, "what?"))
FORMS.post("an unknown detail", CHAT, chat(image(P[0], detail="medium"), "what?"))
FORMS.post("a tool choice without tools", CHAT, chat(image(P[0]), "what?", tool_choice="required"))
FORMS.post("a JSON schema that is none", CHAT, chat(image(P[0]), "what?", response_format={
    "type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "no_such"}}}))  # fmt: skip
FORMS.post("messages and max_tokens as texts", CHAT, {"model": "m", "messages": "hello", "max_tokens": "x"})
FORMS.post("no prompt of a completion", COMPLETIONS, {"model": "m", "max_tokens": 1})
FORMS.ask("no JSON", lambda client: client.send("POST", CHAT, data=b"{", headers={"Content-Type": "application/json"}))
FORMS.ask("another content type", lambda client: client.send("POST", CHAT, data=b"a=b"))
FORMS.ask("an unknown path", lambda client: client.get("/no/such/path"))
FORMS.ask("another method", lambda client: client.get(CHAT))

ALL = [*FORMS]
