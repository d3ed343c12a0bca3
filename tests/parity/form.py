"""Owns what a request form is, and the words that forms are written in."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from sglang_mm_conn.demo.images import Image
from tests.parity.client import Client
from tests.parity.replies import Reply

GENERATE, CHAT, COMPLETIONS = "/generate", "/v1/chat/completions", "/v1/completions"
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
AUDIO = "<|audio_start|><|audio_pad|><|audio_end|>"
GREEDY = {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}

_BY_CHANCE = {"prompt_tokens_details", "cached_tokens", "cached_tokens_details", "num_retractions"}

Body = dict[str, Any]
Ask = Callable[[Any], Any]  # of a Client, or of an EngineClient


@dataclass(frozen=True)
class Form:
    """One form of request.

    Attributes:
        group: the heading above it in the table.
        ask: sends it, and returns everything that must be the same.
        servers: the flags of the servers that it needs, a name in ``deployments.SERVERS``.
        kinds: the models that take it; none: each model.
        differs: why a colocated sglang answers it otherwise, if it does.
    """

    group: str
    name: str
    ask: Ask
    servers: str = "plain"
    kinds: tuple[str, ...] = ()
    differs: str = ""


class Forms(list[Form]):
    """The forms of one group, as they are written down."""

    def __init__(self, group: str, servers: str = "plain", kinds: tuple[str, ...] = ()) -> None:
        super().__init__()
        self._group, self._servers, self._kinds = group, servers, kinds

    def ask(self, name: str, ask: Ask, *, differs: str = "") -> None:
        self.append(Form(self._group, name, ask, self._servers, self._kinds, differs))

    def post(self, name: str, path: str, body: Body | Callable[[Client], Body], *, differs: str = "") -> None:
        """One request. Of a batch it is chance how many tokens a prompt finds in the cache: which came before it?"""

        def ask(client: Client) -> Any:
            sent = body(client) if callable(body) else body
            reply = client.post(path, sent)
            return uncached(reply) if _is_batch(sent) else reply

        self.ask(name, ask, differs=differs)


def _is_batch(body: Body) -> bool:
    ids = body.get("input_ids") or [0]
    return any(isinstance(body.get(key), list) for key in ("text", "prompt")) or isinstance(ids[0], list)


def posting(path: str, body: Body | Callable[[Client], Body]) -> Ask:
    return lambda client: client.post(path, body(client) if callable(body) else body)


def at_once(asks: Iterable[Ask]) -> Ask:
    return lambda client: uncached(client.several(*asks))


def uncached(found: Any) -> Any:
    """``found`` without what depends on when requests at once come to the scheduler."""
    if isinstance(found, Reply):
        return replace(found, content=uncached(found.content))
    if isinstance(found, dict):
        return {key: uncached(one) for key, one in found.items() if key not in _BY_CHANCE}
    return [uncached(one) for one in found] if isinstance(found, list | tuple) else found


# -- prompts and media ---------------------------------------------------------------------------------------------


def picture(seed: int, width: int = 112, height: int = 84) -> str:
    return Image(seed, width, height).data_uri()


def prompt(text: str, *, images: int = 0, media: str = "") -> str:
    return f"<|im_start|>user\n{IMAGE * images}{media}{text}<|im_end|>\n<|im_start|>assistant\n"


ONE, TWO, NONE = prompt("what?", images=1), prompt("which?", images=2), prompt("who are you?")


def image(url: str, **options: Any) -> Body:
    """A part of a chat message."""
    return {"type": "image_url", "image_url": {"url": url, **options}}


def video(url: str, **options: Any) -> Body:
    return {"type": "video_url", "video_url": {"url": url, **options}}


def audio(url: str) -> Body:
    return {"type": "audio_url", "audio_url": {"url": url}}


def parts(*content: str | Body) -> list[Body]:
    return [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]


def turn(role: str, *content: str | Body) -> Body:
    return {"role": role, "content": parts(*content)}


# -- bodies --------------------------------------------------------------------------------------------------------


def chat(*content: str | Body, messages: list[Body] | None = None, **more: Any) -> Body:
    """A chat completion of one message with ``content``, or of ``messages``."""
    asked = messages or [turn("user", *content)]
    return {"model": "m", "messages": asked, "temperature": 0, "max_tokens": 6, "ignore_eos": True, **more}


def generate(text: Any, images: Any = None, *, sampling: Body | None = None, **more: Any) -> Body:
    """A request to ``/generate``. ``sampling`` is added to greedy sampling of 6 tokens."""
    media = {} if images is None else {"image_data": images}
    return {"text": text, **media, "sampling_params": {**GREEDY, **(sampling or {})}, **more}
