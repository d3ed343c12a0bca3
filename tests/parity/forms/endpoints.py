"""Every endpoint that takes a prompt, each streaming and not."""

from __future__ import annotations

from typing import Any

from tests.parity.form import CHAT, COMPLETIONS, GENERATE, Ask, Forms, chat, generate, image, parts, picture, prompt

FORMS = Forms("Endpoints")

_TEXT = prompt("what is this?", images=1)


def completion(text: Any, **more: Any) -> dict[str, Any]:
    return {"model": "m", "prompt": text, "temperature": 0, "max_tokens": 6, "ignore_eos": True, **more}


def response(*content: dict[str, Any], **more: Any) -> dict[str, Any]:
    asked = [{"role": "user", "content": list(content)}]
    return {"model": "m", "input": asked, "temperature": 0, "max_output_tokens": 6, "store": False, **more}


def message(*content: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"model": "m", "max_tokens": 6, "temperature": 0, "messages": [{"role": "user", "content": [*content]}],
            **more}  # fmt: skip


def ollama(path: str, *, stream: bool, **content: Any) -> Ask:
    """Of a stream the status only: sglang loses the text that comes with the end, so that it is chance how much."""
    body = {"model": "m", "stream": stream, "options": {"temperature": 0, "num_predict": 6}, **content}
    return lambda client: client.post(path, body).status if stream else client.post(path, body)


def _source(seed: int) -> dict[str, Any]:
    data = picture(seed).partition(",")[2]
    return {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}}


_INPUT_TEXT = {"type": "input_text", "text": "what is this?"}
_INPUT_IMAGE = {"type": "input_image", "image_url": picture(3)}
_SAY = {"type": "text", "text": "what is this?"}

for stream in (False, True):
    how = ", streaming" if stream else ""
    FORMS.post(f"chat completion{how}", CHAT, chat(image(picture(1)), "what is this?", stream=stream))
    FORMS.post(f"chat completion of a text{how}", CHAT, chat("who are you?", stream=stream))
    FORMS.post(f"/generate{how}", GENERATE, generate(_TEXT, picture(2), stream=stream))
    FORMS.post(f"/generate of a text{how}", GENERATE, generate(prompt("who are you?"), stream=stream))
    FORMS.post(f"completion of a text{how}", COMPLETIONS, completion("once upon a time", stream=stream))
    FORMS.post(f"completions of two texts{how}", COMPLETIONS, completion(["one", "two"], stream=stream))
    FORMS.post(f"completion, a placeholder in the text{how}", COMPLETIONS, completion(_TEXT, stream=stream))
    FORMS.post(f"/v1/responses{how}", "/v1/responses", response(_INPUT_IMAGE, _INPUT_TEXT, stream=stream))
    FORMS.post(f"/v1/responses of a text{how}", "/v1/responses", response(_INPUT_TEXT, stream=stream))
    FORMS.post(f"/v1/messages{how}", "/v1/messages", message(_source(4), _SAY, stream=stream))
    FORMS.post(f"/v1/messages of a text{how}", "/v1/messages", message(_SAY, stream=stream))
    images = [picture(5).partition(",")[2]]
    message_with_image = {"role": "user", "content": "what is this?", "images": images}
    FORMS.ask(f"/api/chat{how}", ollama("/api/chat", stream=stream, messages=[message_with_image]))
    FORMS.ask(f"/api/generate{how}", ollama("/api/generate", stream=stream, prompt="what is this?", images=images))

FORMS.post(
    "chat completion with usage in the stream", CHAT,
    chat(image(picture(1)), "what?", stream=True, stream_options={"include_usage": True}),
)  # fmt: skip
FORMS.post("/invocations", "/invocations", chat(image(picture(6)), "what is this?"))
FORMS.post(
    "/vertex_generate", "/vertex_generate",
    {"instances": [{"text": _TEXT, "image_data": picture(7)}], "parameters": {"sampling_params": {
        "temperature": 0, "max_new_tokens": 6}}},
)  # fmt: skip
FORMS.post("/v1/tokenize", "/v1/tokenize", {"model": "m", "prompt": _TEXT})
FORMS.post(
    "/v1/tokenize of messages", "/v1/tokenize",
    {"model": "m", "messages": [{"role": "user", "content": parts("hello", image(picture(1)))}]},
)  # fmt: skip
FORMS.post("/v1/detokenize", "/v1/detokenize", {"model": "m", "tokens": [104, 101, 108]})
FORMS.post("/v1/messages/count_tokens", "/v1/messages/count_tokens", message(_source(8), _SAY))
FORMS.post("/v1/embeddings of a text", "/v1/embeddings", {"model": "m", "input": "hello"})
FORMS.post("/v1/embeddings of an image", "/v1/embeddings", {"model": "m", "input": [{"image": picture(1)}]})
FORMS.post("/encode of an image", "/encode", {"text": _TEXT, "image_data": picture(1)})
FORMS.post("/classify of an image", "/classify", {"text": _TEXT, "image_data": picture(1)})
FORMS.post(
    "/v1/score", "/v1/score",
    {"model": "m", "query": "hello", "items": ["one", "two"], "label_token_ids": [100, 101], "apply_softmax": True},
)  # fmt: skip
FORMS.post("/v1/rerank", "/v1/rerank", {"model": "m", "query": "hello", "documents": ["one", "two"]})
FORMS.ask("/health, /model_info, /v1/models", lambda client: [
    client.get("/health").status, client.get("/health_generate").status, client.get("/ping").status,
    client.get("/v1/models").status, client.get("/model_info").content["is_generation"],
])  # fmt: skip
