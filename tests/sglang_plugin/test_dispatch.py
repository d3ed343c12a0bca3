"""The tokenizer's side of the plugin, as far as it can be tested without a server."""

from __future__ import annotations

import ast
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fastapi import HTTPException
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.managers.schedule_batch import Modality

from sglang_mm_conn.core.rooms import new_id, new_room_base, part_room
from sglang_mm_conn.sglang_plugin import dispatch
from sglang_mm_conn.sglang_plugin.dispatch import (
    RoomDispatcher,
    dispatch_each,
    forget_requests,
    rooms_of,
    split_room,
    with_room,
)
from sglang_mm_conn.sglang_plugin.news import PromptComes, PromptOver, news_in


@pytest.mark.parametrize("url", ["http://encoder:30000", "http://[::1]:1/path"])
def test_the_room_base_travels_in_the_url_of_the_encoder(url: str) -> None:
    room_base = new_room_base(new_id())
    assert split_room(with_room(url, room_base)) == (url, room_base)
    assert split_room(url) == (url, "")


def test_without_an_encoder_sglang_encodes_itself() -> None:
    dispatcher = RoomDispatcher.__new__(RoomDispatcher)
    dispatcher._static, dispatcher.encode_urls = [], []
    request = SimpleNamespace(image_data=["a"], video_data=None, audio_data=None, mm_content_hashes=None, rid="r")
    assert dispatcher._send_encode_request(request) is None and not request.need_wait_for_mm_inputs


def test_rooms_are_numbered_as_the_dispatcher_numbers_the_parts() -> None:
    base = new_room_base(new_id())
    assigned = {Modality.IMAGE: [2, 1, 0], Modality.AUDIO: [0, 0, 3]}
    urls = ["http://a:1", "http://b:1", "http://a:1"]
    assert rooms_of(base, urls, assigned) == [(url, part_room(base, part)) for part, url in enumerate(urls)]


class Manager:
    """sglang's tokenizer manager, as far as the hook uses it."""

    def __init__(self) -> None:
        self.mm_receiver = RoomDispatcher.__new__(RoomDispatcher)
        self.mm_receiver._static, self.mm_receiver.encode_urls = [], ["http://encoder:1"]
        self.mm_processor: Any = None
        self.limits_checked: list[Any] = []
        self._validate_mm_limits = self._normalize_mm_content_hashes = self.limits_checked.append
        self.encoder_dispatch_ready: dict[str, threading.Event] = {}
        self.sent: list[Any] = []
        self._dispatch_to_scheduler = self.sent.append


def batch(samples: int) -> SimpleNamespace:
    prompts = [GenerateReqInput(rid="a", text="what?", image_data=["c"]), GenerateReqInput(rid="b", text="who?")]

    class Batch(SimpleNamespace):
        def __getitem__(self, number: int) -> GenerateReqInput:
            return prompts[number]

    return Batch(is_single=False, batch_size=2, parallel_sample_num=samples)


@pytest.mark.parametrize("samples", [1, 3])
def test_each_prompt_of_a_batch_is_dispatched_and_its_samples_are_announced(samples: int) -> None:
    manager, request = Manager(), batch(samples)
    bases = {"a": new_room_base(new_id())}

    def original(self: Any, prompt: Any) -> None:
        assert prompt.is_single and prompt.batch_size == 1
        prompt.encoder_urls = [with_room("http://encoder:1", bases[prompt.rid])]
        prompt.num_items_assigned = {Modality.IMAGE: [2]}
        self.encoder_dispatch_ready[prompt.rid] = threading.Event()

    dispatch_each(original, manager, request)
    (message,) = manager.sent
    rooms = [("http://encoder:1", part_room(bases["a"], 0))]
    assert news_in(message) == PromptComes(bases["a"], "a", rooms, samples + 1 if samples > 1 else 1)
    assert [one.rid for one in manager.limits_checked] == ["a", "a"], "sglang's limits of media and hashes"
    assert not manager.encoder_dispatch_ready, "nothing is left of ids that are not heard of again"


class QwenVLImageProcessor:
    """sglang's processor of this name: its model processes media by itself, too."""


EMBEDDING = [{"format": "precomputed_embedding", "feature": torch.zeros(1)}]


@pytest.mark.parametrize("media", [EMBEDDING, None])
def test_a_prompt_without_media_for_encoders_is_not_dispatched(media: Any) -> None:
    manager, prompt = Manager(), GenerateReqInput(rid="a", text="what?", image_data=media, encoder_urls=["forged"])
    prompt.is_single, manager.mm_processor = True, QwenVLImageProcessor()
    dispatch_each(lambda *_: pytest.fail("dispatched"), manager, prompt)
    assert prompt.need_wait_for_mm_inputs is False, "sglang processes the media in the tokenizer process"
    assert prompt.encoder_urls is None, "a client does not say what was dispatched"


@pytest.mark.parametrize(
    ("processor", "session", "media"),
    [(None, None, EMBEDDING), (QwenVLImageProcessor(), {"id": "s"}, EMBEDDING),
     (QwenVLImageProcessor(), None, [{"format": "precomputed_embedding", "feature": [[0.0]], "hash": 1}])],
)  # fmt: skip
def test_what_would_end_the_scheduler_is_refused(processor: Any, session: Any, media: Any) -> None:
    manager, prompt = Manager(), GenerateReqInput(rid="a", text="what?", image_data=media, session_params=session)
    prompt.is_single, manager.mm_processor = True, processor
    with pytest.raises(ValueError, match=r"tensors|URLs"):
        dispatch_each(lambda *_: pytest.fail("dispatched"), manager, prompt)


def test_a_model_without_weights_for_media_needs_a_registered_encoder() -> None:
    manager, prompt = Manager(), GenerateReqInput(rid="a", text="what?", image_data=["c"])
    prompt.is_single, manager.mm_receiver.encode_urls = True, []
    with pytest.raises(HTTPException) as refused:
        dispatch_each(lambda *_: pytest.fail("dispatched"), manager, prompt)
    assert refused.value.status_code == 503


def test_what_sglang_forgets_is_over_for_dispatcher_and_scheduler() -> None:
    manager = Manager()
    gone: list[list[str]] = []
    manager.mm_receiver.endpoint = SimpleNamespace(clients_gone=gone.append)  # type: ignore[assignment]
    first, second = new_room_base(new_id()), new_room_base(new_id())

    def state(base: str, *, finished: bool) -> SimpleNamespace:
        urls = [with_room("http://encoder:1", base)] if base else None
        return SimpleNamespace(obj=SimpleNamespace(encoder_urls=urls), finished=finished)

    forget_requests(None, manager, {"text": state("", finished=True)})
    assert gone == [] and manager.sent == []
    forget_requests(None, manager, {"a": state(first, finished=True), "b": state(second, finished=False)})
    assert gone == [[first, second]] and [news_in(one) for one in manager.sent] == [PromptOver(second)]


def test_the_tokenizers_side_does_not_import_the_schedulers() -> None:
    assert dispatch.__file__ is not None
    imported = [node.module for node in ast.walk(ast.parse(Path(dispatch.__file__).read_text()))
                if isinstance(node, ast.ImportFrom)]  # fmt: skip
    assert imported and not any(module and module.endswith("scheduler") for module in imported)
