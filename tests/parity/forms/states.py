"""States of the server: caches, chunks, pauses, aborts, weights, memory, many requests at once."""

from __future__ import annotations

import tempfile
from typing import Any

from tests.parity.client import Client
from tests.parity.form import (
    CHAT,
    GENERATE,
    NONE,
    ONE,
    TWO,
    Forms,
    at_once,
    chat,
    generate,
    image,
    picture,
    posting,
    turn,
    uncached,
)

FORMS = Forms("States of the server")
P = [picture(seed) for seed in range(100, 130)]
_ONE = posting(CHAT, chat(image(P[0]), "what?"))


def _flushed(client: Client) -> Any:
    return _ONE(client), client.post("/flush_cache", {}), _ONE(client)


def _shared_prefix(client: Client) -> Any:
    """The second finds the first's image in the cache, the third half of its images."""
    bodies = [generate(ONE, P[1]), generate(ONE + "and?", P[1]), generate(TWO, [P[1], P[2]])]
    return [client.post(GENERATE, body) for body in bodies]


FORMS.ask("/flush_cache", _flushed)
FORMS.ask("a prefix in the cache", _shared_prefix)
FORMS.ask("turns of a chat, each longer", lambda client: [
    client.post(CHAT, chat(messages=[turn("user", image(P[3]), "what?"),
                                     *[turn("assistant", "so"), turn("user", "and?")] * turns]))
    for turns in range(3)])  # fmt: skip


def _long(tokens: int = 600, seed: int = 4, **more: Any) -> Any:
    return posting(GENERATE, generate(ONE, P[seed], sampling={"max_new_tokens": tokens}, **more))


def _end(reply: Any) -> Any:
    """Of an answer that was ended: how far it came is chance."""
    if reply.status != 200:
        return reply.status
    return reply.status, reply.content["meta_info"]["finish_reason"]["type"]


def _paused(client: Client, mode: str) -> Any:
    """A pause while one is generated and another comes."""
    running = client.beside(_long(300 if mode != "abort" else 600))
    client.wait_busy()
    paused = client.post("/pause_generation", {"mode": mode}).status
    coming = None if mode == "abort" else client.beside(_ONE)
    continued = client.post("/continue_generation", {}).status
    first = running.result()
    ended = _end(first) if mode == "abort" else uncached(first)
    return paused, continued, ended, coming and uncached(coming.result()), _ONE(client)


for mode in ("abort", "in_place", "retract"):
    FORMS.ask(f"pause and continue: {mode}", lambda client, mode=mode: _paused(client, mode))  # type: ignore[misc]


def _aborted(client: Client, **which: Any) -> Any:
    running = client.beside(_long(rid="parity-abort"))
    client.wait_busy()
    aborted = client.post("/abort_request", which).status
    ended = _end(running.result())
    client.wait_idle()
    return aborted, ended, client.post(GENERATE, generate(ONE, P[4])), _ONE(client)


def _aborted_batch(client: Client) -> Any:
    bodies = generate([ONE, ONE], [P[5], P[6]], sampling={"max_new_tokens": 600}, rid=["parity-1", "parity-2"])
    running = client.beside(posting(GENERATE, bodies))
    client.wait_busy()
    aborted = [client.post("/abort_request", {"rid": rid}).status for rid in ("parity-1", "parity-2")]
    ended = running.result().status
    client.wait_idle()
    return aborted, ended, _ONE(client)


def _aborted_one(client: Client) -> Any:
    """The others of a batch go on."""
    bodies = generate([ONE] * 3, P[5:8], sampling={"max_new_tokens": 200}, rid=[f"parity-{n}" for n in range(3)])
    running = client.beside(posting(GENERATE, bodies))
    client.wait_busy()
    aborted = client.post("/abort_request", {"rid": "parity-1"}).status
    reply = running.result()
    ends = [one["meta_info"]["finish_reason"]["type"] for one in reply.content] if reply.status == 200 else reply
    texts = [one["text"] for one in reply.content[::2]] if reply.status == 200 else []
    return aborted, ends, texts, _ONE(client)


def _left(client: Client, body: dict[str, Any], seconds: float, path: str = CHAT) -> Any:
    client.leave(path, body, seconds)
    client.wait_idle()
    return uncached([_ONE(client), client.post(CHAT, chat(image(P[7]), "what?"))])


FORMS.ask("abort by id", lambda client: _aborted(client, rid="parity-abort"))
FORMS.ask("abort all", lambda client: _aborted(client, abort_all=True))
FORMS.ask("abort an unknown id", lambda client: [
    client.post("/abort_request", {"rid": "parity-none"}).status, _ONE(client)])  # fmt: skip
FORMS.ask("abort of a batch", _aborted_batch)
FORMS.ask("abort of one of a batch", _aborted_one)
_LONG: dict[str, Any] = {"max_tokens": 600}
FORMS.ask("a client leaves at once", lambda client: _left(client, chat(image(P[7]), "what?", **_LONG), 0.01))
FORMS.ask("a client leaves soon", lambda client: _left(client, chat(image(P[7]), "what?", **_LONG), 0.1))
FORMS.ask("a client leaves while it reads", lambda client: _left(
    client, chat(image(P[7]), "what?", stream=True, **_LONG), 0.5))  # fmt: skip
FORMS.ask("a client leaves two samples", lambda client: _left(client, chat(image(P[7]), "what?", n=2, **_LONG), 0.3))
FORMS.ask("a client leaves a batch", lambda client: _left(
    client, generate([ONE] * 3, P[8:11], sampling={"max_new_tokens": 600}), 0.2, GENERATE))  # fmt: skip


def _new_weights(client: Client) -> Any:
    body = {"model_path": str(client.model)}
    return _ONE(client), client.post("/update_weights_from_disk", body).status, _ONE(client)


def _released(client: Client) -> Any:
    before = _ONE(client)
    released = client.post("/release_memory_occupation", {}).status
    resumed = client.post("/resume_memory_occupation", {}).status
    return before, released, resumed, _ONE(client)


def _profiled(client: Client) -> Any:
    with tempfile.TemporaryDirectory() as directory:
        started = client.post("/start_profile", {"output_dir": directory, "activities": ["CPU"]}).status
        answer = _ONE(client)
        return started, answer, client.post("/stop_profile", {}).status


def _health_under_load(client: Client) -> Any:
    running = [client.beside(_long(100, seed)) for seed in (11, 12, 13)]
    client.wait_busy()
    health = [client.get("/health_generate").status for _ in range(2)]
    return health, [uncached(one.result()) for one in running]


FORMS.ask("weights from disk", _new_weights)
FORMS.ask("weights from a directory that is none", lambda client: [
    client.post("/update_weights_from_disk", {"model_path": "/nonexistent"}).status, _ONE(client)])  # fmt: skip
FORMS.ask("memory released and resumed", _released)
FORMS.ask("a profile", _profiled)
FORMS.ask("/health_generate under load", _health_under_load)
FORMS.ask("text beside images", at_once(
    [posting(GENERATE, generate(ONE, P[14 + n]) if n % 2 else generate(NONE)) for n in range(8)]))  # fmt: skip
FORMS.ask("good ones beside bad ones", at_once(
    [posting(GENERATE, generate(ONE, P[14 + n] if n % 2 else "data:image/png;base64,AAAA")) for n in range(8)]
))  # fmt: skip
FORMS.ask("200 requests at once", at_once(
    [posting(GENERATE, generate(ONE, picture(300 + n, 56, 56), sampling={"max_new_tokens": 2})) for n in range(200)]
))  # fmt: skip

CHUNKS = Forms("Prefill in chunks", servers="chunked")
CHUNKS.post("a chunk that ends inside an image", GENERATE, generate(ONE, picture(21, 560, 280)))
CHUNKS.post("an image of several chunks", CHAT, chat(image(picture(22, 840, 560)), "what?"))
CHUNKS.post("several images, several chunks", CHAT, chat(
    *[image(picture(23 + n, 280, 280)) for n in range(4)], "which?"))  # fmt: skip
CHUNKS.post("log-probabilities across chunks", GENERATE, generate(
    ONE, picture(28, 560, 280), return_logprob=True, logprob_start_len=0))  # fmt: skip
CHUNKS.post("two samples, several chunks", CHAT, chat(image(picture(29, 560, 560)), "what?", n=2))
CHUNKS.post("a batch, several chunks", GENERATE, generate([ONE] * 2, [picture(30, 560, 280), picture(31, 280, 560)]))
CHUNKS.ask("chunks in the cache", lambda client: [
    client.post(GENERATE, generate(ONE + more, picture(32, 560, 280))) for more in ("", "a", "ab")])  # fmt: skip
CHUNKS.ask("requests at once, several chunks", at_once(
    [posting(GENERATE, generate(ONE, picture(33 + n, 420, 280))) for n in range(6)]))  # fmt: skip
CHUNKS.ask("a client leaves between chunks", lambda client: _left(
    client, chat(image(picture(40, 980, 980)), "what?", **_LONG), 0.4))  # fmt: skip

ALL = [*FORMS, *CHUNKS]
