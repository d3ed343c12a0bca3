"""Owns one chat request to an OpenAI-style endpoint, and its answer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sglang_mm_conn.demo.questions import Question


@dataclass(frozen=True)
class Answer:
    """What a server replied: the generated text and tokens, or the error it gave."""

    status: int
    text: str = ""
    tokens: tuple[str, ...] = ()
    finish: str | None = None
    error: str = ""

    @property
    def ok(self) -> bool:
        return self.status == 200

    def same_as(self, other: "Answer") -> bool:
        """Whether both are answers with equal text and equal tokens."""
        return self.ok and other.ok and (self.text, self.tokens) == (other.text, other.tokens)


def ask(
    url: str,
    question: Question,
    *,
    rid: str | None = None,
    timeout: float = 120.0,
    more: Mapping[str, Any] | None = None,
) -> Answer:
    """Sends one request with temperature 0, so that two servers of one model must answer alike. `rid` names the
    request in their logs; `more` is added to the request's body."""
    import requests

    session = requests.Session()
    session.trust_env = False  # no proxy of the environment: the servers are on this host
    with session:
        body = {**body_of(question, rid), **(more or {})}
        response = session.post(f"{url}/v1/chat/completions", json=body, timeout=timeout)
    if response.status_code != 200:
        return Answer(status=response.status_code, error=response.text[:600])
    choice = response.json()["choices"][0]
    logprobs = (choice.get("logprobs") or {}).get("content") or []
    return Answer(
        status=200,
        text=choice["message"]["content"] or "",
        tokens=tuple(entry["token"] for entry in logprobs),
        finish=choice.get("finish_reason"),
    )


def body_of(question: Question, rid: str | None = None) -> dict[str, Any]:
    media: dict[str, tuple[Any, ...]] = {
        "image_url": question.images,
        "video_url": question.videos,
        "audio_url": question.audios,
    }
    content: list[dict[str, Any]] = [
        {"type": kind, kind: {"url": one.data_uri()}} for kind, several in media.items() for one in several
    ]
    content.append({"type": "text", "text": question.text})
    body: dict[str, Any] = {
        "model": "default",
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": question.max_tokens,
        "ignore_eos": True,
        "logprobs": True,
        "top_logprobs": 1,
    }
    if rid is not None:
        body["rid"] = rid
    return body
