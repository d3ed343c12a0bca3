"""Sampling, and what a request wants returned."""

from __future__ import annotations

from tests.parity.client import Client
from tests.parity.form import CHAT, GENERATE, ONE, Body, Forms, chat, generate, image, picture

FORMS = Forms("Sampling and returns")
P = [picture(seed) for seed in range(80, 100)]

_SAMPLING: dict[str, Body] = {
    "a seed": {"temperature": 0.8, "sampling_seed": 7},
    "top_k 1": {"temperature": 0.8, "top_k": 1},
    "top_p": {"temperature": 0.8, "top_p": 1e-6},
    "min_p": {"temperature": 0.8, "min_p": 1.0},
    "a frequency penalty": {"frequency_penalty": 1.5, "max_new_tokens": 12},
    "a presence penalty": {"presence_penalty": 1.5, "max_new_tokens": 12},
    "a repetition penalty": {"repetition_penalty": 1.5, "max_new_tokens": 12},
    "a logit bias": {"logit_bias": {"100": 50.0}},
    "no_stop_trim": {"stop": ["a"], "no_stop_trim": True},
    "stop_regex": {"stop_regex": ["[a-z]"]},
    "a stream interval": {"stream_interval": 2},
    "beams": {"beam_width": 2, "n": 2},
}
for name, sampling in _SAMPLING.items():
    FORMS.post(name, GENERATE, generate(ONE, P[0], sampling=sampling))
FORMS.post("a seed in a chat", CHAT, chat(image(P[0]), "what?", temperature=0.8, seed=5))

_WANTED: dict[str, Body] = {
    "log-probabilities": {"return_logprob": True},
    "top log-probabilities": {"return_logprob": True, "top_logprobs_num": 3},
    "log-probabilities of the prompt": {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 2},
    "log-probabilities from the middle of the image": {"return_logprob": True, "logprob_start_len": 20},
    "log-probabilities of given tokens": {"return_logprob": True, "token_ids_logprob": [100, 101]},
    "log-probabilities with their texts": {"return_logprob": True, "return_text_in_logprobs": True},
    "flat log-probabilities": {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 2,
                               "return_flat_raw_top_logprobs": True},
    "hidden states": {"return_hidden_states": True},
    "ids of the prompt": {"return_prompt_token_ids": True},
    "entropy": {"return_entropy": True},
    "routed experts": {"return_routed_experts": True},
    "a priority": {"priority": 3},
    "an id": {"rid": "parity-one"},
    "an extra key": {"extra_key": "tenant"},
    "a cache salt": {"cache_salt": "salt"},
    "no logs": {"no_logs": True},
    "custom labels": {"custom_labels": {"team": "a"}},
    "a routing key": {"routing_key": "k"},
    "data parallel rank 0": {"routed_dp_rank": 0},
    "data parallel rank 5": {"routed_dp_rank": 5},
}  # fmt: skip
for name, wanted in _WANTED.items():
    FORMS.post(name, GENERATE, generate(ONE, P[1], **wanted))

for stream in (False, True):
    how = ", streaming" if stream else ""
    FORMS.post(f"log-probabilities of a chat{how}", CHAT, chat(
        image(P[2]), "what?", logprobs=True, top_logprobs=2, stream=stream))  # fmt: skip
    FORMS.post(f"log-probabilities of the prompt{how}, /generate", GENERATE, generate(
        ONE, P[2], stream=stream, return_logprob=True, logprob_start_len=0))  # fmt: skip
    FORMS.post(
        f"hidden states, each token{how}", GENERATE, generate(ONE, P[2], stream=stream, return_hidden_states=True)
    )
FORMS.post("hidden states of a chat", CHAT, chat(image(P[3]), "what?", return_hidden_states=True))
FORMS.post("hidden states of two samples", GENERATE, generate(
    ONE, P[3], return_hidden_states=True, sampling={"n": 2}))  # fmt: skip
FORMS.post("an id of a chat", CHAT, chat(image(P[3]), "what?", rid="parity-two"))
FORMS.post("ids of the prompt of a chat", CHAT, chat(image(P[3]), "what?", return_prompt_token_ids=True))
FORMS.post("log-probabilities of two samples", CHAT, chat(image(P[3]), "what?", n=2, logprobs=True))
FORMS.post("a priority of a chat", CHAT, chat(image(P[3]), "what?", priority=1))


def _same_id_twice(client: Client) -> object:
    body = generate(ONE, P[4], rid="parity-again")
    return client.post(GENERATE, body), client.post(GENERATE, body)


FORMS.ask("an id again, after its end", _same_id_twice)


def _session(client: Client) -> object:
    """Two turns of a session, the second without an image."""
    session = "parity-session"
    opened = client.post("/open_session", {"capacity_of_str_len": 1000, "session_id": session})
    if opened.status >= 400:
        return opened
    first = client.post(GENERATE, generate(ONE, P[5], session_params={"id": session}, rid="parity-s1"))
    second = client.post(GENERATE, generate("and then?", session_params={"id": session, "rid": "parity-s1"}))
    third = client.post(GENERATE, generate(ONE, P[6], session_params={"id": session, "rid": "parity-s1"}))
    return opened, first, second, third, client.post("/close_session", {"session_id": session})


FORMS.ask("a session", _session)

LORA = Forms("LoRA", servers="lora")
LORA.post("an adapter by name", GENERATE, generate(ONE, P[7], lora_path="tiny"))
LORA.post("no adapter", GENERATE, generate(ONE, P[7]))
LORA.post("an adapter in a batch", GENERATE, generate([ONE, ONE], [P[7], P[8]], lora_path=["tiny", None]))
LORA.post("an adapter of a chat", CHAT, chat(image(P[7]), "what?", lora_path="tiny"))
LORA.post("an adapter of two samples", CHAT, chat(image(P[8]), "what?", lora_path="tiny", n=2))
LORA.post("an unknown adapter", GENERATE, generate(ONE, P[7], lora_path="unknown"))

ALL = [*FORMS, *LORA]
