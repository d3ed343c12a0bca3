"""Prompts: batches, several turns, images in several places, tools, structured output, ends."""

from __future__ import annotations

from typing import Any

from tests.parity.client import Client
from tests.parity.form import (
    CHAT,
    GENERATE,
    IMAGE,
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
    prompt,
    turn,
)
from tests.parity.tokens import ids_of

FORMS = Forms("Prompts")
P = [picture(seed) for seed in range(40, 80)]

# -- batches and samples -------------------------------------------------------------------------------------------

FORMS.post("two samples", CHAT, chat(image(P[0]), "what?", n=2))
FORMS.post("three samples of two images, streaming", CHAT, chat(image(P[1]), image(P[2]), "which?", n=3, stream=True))
FORMS.post("two samples of /generate", GENERATE, generate(ONE, P[3], sampling={"n": 2}))
FORMS.post("two samples of a text", GENERATE, generate(NONE, sampling={"n": 2}))
FORMS.post("a batch", GENERATE, generate([ONE] * 3, [P[4], P[5], P[6]]))
FORMS.post("a batch of one", GENERATE, generate([ONE], [P[4]]))
FORMS.post("a batch, images in lists", GENERATE, generate([ONE] * 2, [[P[4]], [P[5]]]))
FORMS.post("a batch of several images each", GENERATE, generate([TWO, ONE], [[P[4], P[5]], [P[6]]]))
FORMS.post("a batch, one without an image", GENERATE, generate([ONE, NONE, ONE], [[P[4]], None, [P[5]]]))
FORMS.post("a batch, one with an empty list", GENERATE, generate([ONE, NONE], [[P[4]], []]))
FORMS.post("a batch, one image for all", GENERATE, generate([ONE, ONE], P[7]))
FORMS.post("a batch, streaming", GENERATE, generate([ONE] * 2, [P[8], P[9]], stream=True))
FORMS.post("a batch of two samples each", GENERATE, generate([ONE, NONE], [[P[4]], None], sampling={"n": 2}))
FORMS.post("a batch with ids", GENERATE, generate([ONE] * 2, [P[4], P[5]], rid=["parity-a", "parity-b"]))
FORMS.post("a batch with one id for all", GENERATE, generate([ONE] * 2, [P[4], P[5]], rid="parity-c"))
FORMS.post("a batch of token ids", GENERATE, lambda client: generate(
    None, [P[10], P[11]], input_ids=[ids_of(ONE), ids_of(ONE)]))  # fmt: skip
FORMS.post("a batch with parameters of each", GENERATE, {
    "text": [ONE, ONE], "image_data": [P[4], P[5]], "sampling_params": [
        {"temperature": 0, "max_new_tokens": 3, "ignore_eos": True},
        {"temperature": 0, "max_new_tokens": 5, "ignore_eos": True}]})  # fmt: skip
FORMS.post("a batch with log-probabilities", GENERATE, generate(
    [ONE] * 2, [P[4], P[5]], return_logprob=True, top_logprobs_num=2, logprob_start_len=0))  # fmt: skip
FORMS.post("a batch of eight", GENERATE, generate([ONE] * 8, P[12:20]))
FORMS.post("a batch of texts", GENERATE, generate([NONE, prompt("hello")]))

# -- one prompt ----------------------------------------------------------------------------------------------------

FORMS.post("token ids", GENERATE, lambda client: generate(None, P[20], input_ids=ids_of(ONE)))
FORMS.post("token ids of a text", GENERATE, lambda client: generate(None, input_ids=ids_of(NONE)))
FORMS.post(
    "token ids with a bare placeholder",
    GENERATE,
    lambda client: generate(None, P[20], input_ids=ids_of(prompt("<|image_pad|>what?"))),
    differs="without <|vision_start|> a language server of Qwen3-VL places the image's tokens as those of a text",
)
FORMS.post("<image> as the placeholder", GENERATE, generate(prompt("<image>what?"), P[20]),
           differs="a colocated Qwen2-VL or Qwen2.5-VL ignores the image")  # fmt: skip
FORMS.post("image only", CHAT, chat(image(P[20])))
FORMS.post("image after the text", CHAT, chat("what is this?", image(P[20])))
FORMS.post("images between texts", CHAT, chat("first", image(P[20]), "then", image(P[21]), "and?"))
FORMS.post("the same image twice", CHAT, chat(image(P[20]), image(P[20]), "same?"))
FORMS.post("the same image in three places", GENERATE, generate(
    prompt(f"{IMAGE}and{IMAGE}and{IMAGE}"), [P[20]] * 3))  # fmt: skip
FORMS.post("an image that is a text's placeholder only", GENERATE, generate(ONE))
FORMS.post("a surplus image", GENERATE, generate(ONE, [P[20], P[21]]))
FORMS.post("an image without a placeholder", GENERATE, generate(NONE, [P[20]]))
FORMS.post("an empty text beside an image", CHAT, chat(image(P[20]), ""))
FORMS.post("a long text beside an image", CHAT, chat(image(P[20]), "word " * 150))
FORMS.post("letters of many scripts", CHAT, chat(image(P[20]), "Was ist das? これは何ですか 🙂 ما هذا"))
FORMS.post("a special token in the text", CHAT, chat(image(P[20]), "what is <|im_end|> this?"))
FORMS.post("a placeholder in the text of a chat", CHAT, chat(image(P[20]), image(P[21]), f"what {IMAGE} is?"))
FORMS.post("a system prompt", CHAT, chat(messages=[
    {"role": "system", "content": "be short"}, turn("user", image(P[22]), "what?")]))  # fmt: skip
FORMS.post("an image in the system prompt", CHAT, chat(messages=[
    turn("system", "look at", image(P[22])), turn("user", "what was it?")]))  # fmt: skip
FORMS.post("images in old turns", CHAT, chat(messages=[
    turn("user", image(P[23]), "what?"), {"role": "assistant", "content": "a picture"},
    turn("user", image(P[24]), "and this?"), {"role": "assistant", "content": "another"},
    turn("user", "which was first?")]))  # fmt: skip
FORMS.post("an image in an old turn and a new one", CHAT, chat(messages=[
    turn("user", image(P[23]), "what?"), {"role": "assistant", "content": "a picture"},
    turn("user", image(P[23]), "again?")]))  # fmt: skip
FORMS.post("continue the last message", CHAT, chat(messages=[
    turn("user", image(P[25]), "what?"), {"role": "assistant", "content": "It is"}], continue_final_message=True,
))  # fmt: skip
FORMS.post("24 images", CHAT, chat(*[image(picture(200 + n, 56, 56)) for n in range(24)], "how many?"))
FORMS.post("six images of different sizes", CHAT, chat(
    *[image(picture(230 + n, 28 * (n + 1), 56 + 28 * n)) for n in range(6)], "which?"))  # fmt: skip
FORMS.post("separator, no template: text and images of a completion", GENERATE, generate(f"{IMAGE}:", P[26]))
FORMS.post("modalities: multi-images", CHAT, chat(
    {**image(P[26]), "modalities": "multi-images"}, {**image(P[27]), "modalities": "multi-images"}, "which?",
))  # fmt: skip

# -- tools and structured output -----------------------------------------------------------------------------------

_TOOL = {"type": "function", "function": {"name": "look", "description": "looks", "parameters": {
    "type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}}}  # fmt: skip
_SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"],
           "additionalProperties": False}  # fmt: skip
FORMS.post("tools that may be used", CHAT, chat(image(P[28]), "look", tools=[_TOOL]))
FORMS.post("no tool may be used", CHAT, chat(image(P[28]), "look", tools=[_TOOL], tool_choice="none"))
FORMS.post("a tool must be used", CHAT, chat(image(P[28]), "look", tools=[_TOOL], tool_choice="required",
                                             max_tokens=60))  # fmt: skip
FORMS.post("a tool's answer with an image", CHAT, chat(messages=[
    turn("user", image(P[28]), "look"),
    {"role": "assistant", "content": "", "tool_calls": [
        {"id": "parity-1", "type": "function", "function": {"name": "look", "arguments": '{"x": 1}'}}]},
    {"role": "tool", "tool_call_id": "parity-1", "content": "seen"}]))  # fmt: skip
FORMS.post("a JSON schema", CHAT, chat(image(P[29]), "what?", max_tokens=24, response_format={
    "type": "json_schema", "json_schema": {"name": "s", "schema": _SCHEMA}}))  # fmt: skip
FORMS.post("a JSON object, streaming", CHAT, chat(image(P[29]), "what?", stream=True, max_tokens=12, response_format={
    "type": "json_object"}))  # fmt: skip
FORMS.post("a regular expression", GENERATE, generate(ONE, P[29], sampling={"regex": "(yes|no)!"}))
FORMS.post("an EBNF grammar", GENERATE, generate(ONE, P[29], sampling={"ebnf": 'root ::= "a" | "b"'}))

# -- ends ----------------------------------------------------------------------------------------------------------

_STOP = "\n"


def _first_letter(client: Client) -> Any:
    """A stop string that certainly comes: a letter of the answer without one."""
    text = client.post(GENERATE, generate(ONE, P[30], sampling={"max_new_tokens": 12})).content["text"]
    stop = text[len(text) // 2 :][:1] or _STOP
    body = generate(ONE, P[30], sampling={"max_new_tokens": 12, "stop": [stop]})
    return client.post(GENERATE, body), client.post(GENERATE, {**body, "stream": True})


FORMS.ask("a stop string", _first_letter)
FORMS.post("stop token ids", GENERATE, generate(ONE, P[30], sampling={"stop_token_ids": list(range(128))}))
FORMS.post("a stop string in a chat", CHAT, chat(image(P[30]), "what?", stop=["a", "e"], max_tokens=20))
FORMS.post("to the end of sequence", CHAT, chat(image(P[30]), "what?", ignore_eos=False, max_tokens=40))
FORMS.post("at least so many tokens", GENERATE, generate(
    ONE, P[30], sampling={"ignore_eos": False, "min_new_tokens": 8, "max_new_tokens": 12}))  # fmt: skip
FORMS.post("one token", GENERATE, generate(ONE, P[30], sampling={"max_new_tokens": 1}))
FORMS.post("no token", GENERATE, generate(ONE, P[30], sampling={"max_new_tokens": 0}))
FORMS.post("special tokens shown", GENERATE, generate(ONE, P[30], sampling={"skip_special_tokens": False}))

# -- the same images again -----------------------------------------------------------------------------------------

_AGAIN = posting(CHAT, chat(image(P[31]), "what?"))
FORMS.ask("the same request again", lambda client: [_AGAIN(client) for _ in range(3)])
FORMS.ask("the same image, another question", lambda client: [
    client.post(CHAT, chat(image(P[31]), text)) for text in ("what?", "what is it?", "who?")])  # fmt: skip
FORMS.ask("another image, the same question", lambda client: [
    client.post(CHAT, chat(image(P[32 + n]), "what?")) for n in range(3)])  # fmt: skip
FORMS.ask("four at once", at_once([posting(CHAT, chat(image(P[32 + n]), "what?")) for n in range(4)]))
FORMS.ask("the same image four times at once", at_once([_AGAIN] * 4))

# A colocated Qwen2-VL or Qwen2.5-VL never answers the first, and ends at the second.
FOR_EACH_ROW = Forms("Prompts", kinds=("qwen3_vl",))
FOR_EACH_ROW.post("a placeholder for each row", GENERATE, generate(
    ONE.replace("<|image_pad|>", "<|image_pad|>" * 6), picture(20, 96, 64)))  # fmt: skip
FOR_EACH_ROW.post("<image> twice, and a native placeholder", GENERATE, generate(
    prompt(f"<image>a{IMAGE}b<image>"), P[20:23]))  # fmt: skip

ALL = [*FORMS, *FOR_EACH_ROW]
