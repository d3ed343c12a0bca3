"""The language server's tokenizer process: names the rooms of each request and has encoders encode its items.

The message from the tokenizer to the scheduler has no field of this connector. So the room base of a request travels as
the fragment of its encoder URLs, which sglang stores on the request: one URL a part, in the order of the parts.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from http import HTTPStatus
from typing import Any

from fastapi import HTTPException
from sglang.srt.disaggregation.encoder.receiver import MMReceiverHTTP, _encoder_media_item
from sglang.srt.environ import envs
from sglang.srt.managers.io_struct import EncoderDispatchErrorReq, GenerateReqInput
from sglang.srt.managers.schedule_batch import Modality
from sglang.srt.runtime_context import get_disagg, get_serving

from sglang_mm_conn.connector.dispatch.endpoint import Dispatched, DispatcherEndpoint
from sglang_mm_conn.connector.dispatch.media import item_of
from sglang_mm_conn.control.http_exchange import normalized
from sglang_mm_conn.core.dispatch.actions import GiveUp, Redispatched
from sglang_mm_conn.core.dispatch.requests import Part
from sglang_mm_conn.core.errors import ConnError
from sglang_mm_conn.core.rooms import new_room_base, part_room
from sglang_mm_conn.core.settings import Settings
from sglang_mm_conn.sglang_plugin.addresses import reached_at
from sglang_mm_conn.sglang_plugin.media_items import (
    as_posted,
    can_be_posted,
    check_media,
    check_preprocessed,
    has_images_in_memory,
    listed,
)
from sglang_mm_conn.sglang_plugin.names import BACKEND, REPORTS_ENV, server_incarnation
from sglang_mm_conn.sglang_plugin.news import PromptComes, PromptOver, news_request
from sglang_mm_conn.sglang_plugin.placeholders import has_rules_of_qwen, match_media

logger = logging.getLogger(__name__)

Tell = Callable[[EncoderDispatchErrorReq], None]


def with_room(url: str, room_base: str) -> str:
    """``url`` with ``room_base`` as its fragment."""
    return f"{url}#{room_base}"


def split_room(url: str) -> tuple[str, str]:
    """(encoder URL, room base). The base is empty where sglang's own dispatcher made the request."""
    plain, _, room_base = url.partition("#")
    return plain, room_base


class RoomDispatcher(MMReceiverHTTP):
    """In place of sglang's receiver in the tokenizer process."""

    def __init__(self, encode_urls: list[str]) -> None:
        # Does not call super().__init__, which opens sockets whose messages are unpickled.
        self.encode_urls = encode_urls  # sglang changes it in place as encoders register
        self.host = reached_at(get_serving().host)
        self._server = server_incarnation()
        self._static = [normalized(url) for url in get_disagg().encoder_urls]
        self._seconds = float(envs.SGLANG_ENCODER_RECV_TIMEOUT.get())
        settings = Settings.from_env(os.environ)
        self.endpoint = DispatcherEndpoint(
            settings, server=self._server, report_address=os.environ.get(REPORTS_ENV) or None, urls=self._urls
        )

    def knows_encoders(self) -> bool:
        return bool(self._urls())

    def _urls(self) -> list[str]:
        """The encoders of ``--encoder-urls``, for good, and those that are registered now."""
        return list(dict.fromkeys([*self._static, *map(normalized, list(self.encode_urls))]))

    def _send_encode_request(
        self, obj: Any, time_stats_json: Any = None, on_dispatch_error: Tell | None = None
    ) -> threading.Event | None:
        """Start the dispatch of the items of ``obj`` to the encoders.

        Returns the event that sglang sets once it has sent the request to the scheduler, or None without items or
        encoders.
        """
        media = self._extract_url_data(obj)
        urls = self._urls()
        if not media or not urls:
            if media:
                logger.warning("No encoder is registered: request %s is processed without one", obj.rid)
            obj.need_wait_for_mm_inputs = False
            return None
        room_base = new_room_base(self._server)
        with_keys = self.endpoint.caches_items
        items = [
            item_of(one["modality"].name, one["url"], one.get("content_hash"), with_key=with_keys) for one in media
        ]
        dispatched = Dispatched(
            content=partial(self._content, media, time_stats_json),
            tell=partial(_tell, obj.rid, on_dispatch_error),
            reached=threading.Event(),
            slow=has_images_in_memory(obj),
        )
        placed = self.endpoint.dispatch(obj.rid, room_base, items, self._seconds, dispatched)
        obj.need_wait_for_mm_inputs = True
        obj.num_items_assigned = {
            modality: [part.count if part.modality == modality.name else 0 for _, part in placed]
            for modality in dict.fromkeys(one["modality"] for one in media)
        }
        obj.encoder_urls = [with_room(url, room_base) for url, _ in placed]
        return dispatched.reached

    def _content(self, media: list[dict[str, Any]], time_stats_json: Any, part: Part, room: str) -> dict[str, Any]:
        """What sglang posts to ``/encode`` for ``part``."""
        modality = Modality[part.modality]
        of_modality = [one for one in media if one["modality"] is modality]
        return {
            "mm_items": [
                _encoder_media_item({**one, "url": as_posted(one["url"])})
                for one in of_modality[part.first : part.first + part.count]
            ],
            "num_parts": part.of,
            "part_idx": part.number,
            "req_id": room,
            "modality": part.modality,
            "prefill_host": self.host,
            "embedding_port": None,
            "time_stats_json": time_stats_json,
        }

    def process_waiting_requests(self, recv_reqs: Any) -> Any:
        raise ConnError("requests wait in the scheduler, not in the tokenizer")


def _tell(rid: str, tell: Tell | None, news: Redispatched | GiveUp) -> None:
    """Send ``news`` of the request ``rid`` to its scheduler."""
    if tell is not None:
        tell(news_request(rid, news))


def rooms_of(
    room_base: str, encoder_urls: Sequence[str], num_items_assigned: Mapping[Modality, Sequence[int]]
) -> list[tuple[str, str]]:
    """(encoder URL, room) of each part, as the dispatcher numbers them."""
    urls = [url for items in num_items_assigned.values()
            for url, count in zip(encoder_urls, items, strict=False) if count]  # fmt: skip
    return [(url, part_room(room_base, part)) for part, url in enumerate(urls)]


def dispatch_each(original: Callable[[Any, Any], None], self: Any, obj: Any) -> None:
    """Around ``_handle_epd_disaggregation_encode_request`` of the tokenizer manager, which knows no batches: dispatch
    each prompt of a batch by itself. sglang makes a batch of a prompt with ``n`` above 1, too.

    Raises ValueError if a colocated sglang would refuse the media of a prompt.
    """
    if not isinstance(getattr(self, "mm_receiver", None), RoomDispatcher):
        original(self, obj)
        return
    prompts = [obj] if obj.is_single else [obj[number] for number in range(obj.batch_size)]
    for prompt in prompts:
        # Without an encoder sglang processes the media in this process.
        prompt.need_wait_for_mm_inputs, prompt.encoder_urls = False, None
        if isinstance(prompt, GenerateReqInput) and prompt.contains_mm_input():
            prompt.need_wait_for_mm_inputs = _for_encoders(self, prompt)
    if obj.is_single:
        if obj.need_wait_for_mm_inputs:
            original(self, obj)
        return
    samples = getattr(obj, "parallel_sample_num", 1)
    for prompt in [one for one in prompts if one.need_wait_for_mm_inputs]:  # sglang uses these objects from here on
        prompt.is_single, prompt.batch_size = True, 1
        original(self, prompt)
        if getattr(prompt, "encoder_urls", None):
            plain, bases = zip(*map(split_room, prompt.encoder_urls), strict=True)
            rooms = rooms_of(bases[0], plain, prompt.num_items_assigned)
            # The requests follow one by one, and those before may take long. Of several samples there is one request
            # more, which generates nothing.
            requests = samples + 1 if samples > 1 else 1
            self._dispatch_to_scheduler(news_request(prompt.rid, PromptComes(bases[0], prompt.rid, rooms, requests)))
            # The scheduler knows the prompt. (Samples get ids of their own, so sglang never sets this event.)
            self.encoder_dispatch_ready.pop(prompt.rid).set()


def _for_encoders(manager: Any, prompt: GenerateReqInput) -> bool:
    """Whether ``prompt`` has media for encoders; otherwise sglang processes the media, if any, in this process.

    Raises ValueError if a colocated sglang would refuse the media, or this server cannot process them. Raises
    HTTPException (503) if it cannot and no encoder is registered.
    """
    # Other models than Qwen's have no vision model, or one without weights, with --language-only. And sglang's
    # scheduler ends if a session has media of both ways.
    by_itself = has_rules_of_qwen(manager.mm_processor) and not prompt.session_params
    if not can_be_posted(prompt):
        if not by_itself:
            raise ValueError("here images, videos and audio must be data or URLs, not embeddings or preprocessed")
        check_preprocessed(prompt)
        return False
    prompt.image_data = listed(prompt.image_data) or None
    manager._validate_mm_limits(prompt)
    manager._normalize_mm_content_hashes(prompt)
    check_media(prompt)
    match_media(prompt, manager.mm_processor)
    if prompt.contains_mm_input() and not by_itself and not manager.mm_receiver.knows_encoders():
        raise HTTPException(HTTPStatus.SERVICE_UNAVAILABLE, "no encoder is registered")
    return bool(prompt.contains_mm_input())


def forget_requests(result: None, self: Any, request_states: dict[str, Any]) -> None:
    """After ``_release_req_states_on_failure`` of the tokenizer manager: nobody waits for these requests any more.

    sglang calls it after most successful requests, too: their handler drops the generator that ran them.
    """
    dispatcher = getattr(self, "mm_receiver", None)
    dispatched = [(split_room(urls[0])[1], rid, state.finished) for rid, state in request_states.items()
                  if (urls := getattr(state.obj, "encoder_urls", None))]  # fmt: skip
    if not dispatched or not isinstance(dispatcher, RoomDispatcher):
        return
    dispatcher.endpoint.clients_gone(list(dict.fromkeys(base for base, _, _ in dispatched)))
    unfinished = {base: rid for base, rid, finished in dispatched if not finished}
    for base, rid in unfinished.items():
        self._dispatch_to_scheduler(news_request(rid, PromptOver(base)))


async def report_encoders(original: Callable[[Any], Awaitable[list[Any]]], self: Any) -> list[Any]:
    """Around ``get_internal_state`` of the tokenizer manager: the dispatcher's report in ``GET /server_info``."""
    states = await original(self)
    dispatcher = getattr(self, "mm_receiver", None)
    if isinstance(dispatcher, RoomDispatcher) and states:
        states[0].setdefault(BACKEND, {})["dispatch"] = dispatcher.endpoint.report()
    return states
