"""The language server: rooms are named where requests are dispatched (tokenizer) and awaited in the scheduler.

The room base of a request rides from the tokenizer to the scheduler as the fragment of the encoder URLs that sglang
freezes on the request: the message between the two has no field of ours.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from array import array
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.disaggregation.encoder.receiver import (
    EmbeddingData,
    MMReceiverHTTP,
    MultiModalEmbeddingData,
    WaitingMMRequestBase,
    WaitingMMRequestStatus,
    calculate_modality_num_parts,
    create_part_req_id,
)
from sglang.srt.environ import envs
from sglang.srt.managers.io_struct import EncoderDispatchErrorReq
from sglang.srt.managers.schedule_batch import Modality
from sglang.srt.runtime_context import get_disagg, get_parallel, get_serving

from sglang_mm_conn.conn_multimodal import EmbeddingArgs, EmbeddingManager, EmbeddingMode, EmbeddingReceiver
from sglang_mm_conn.core.errors import ConnError, TransferFailed, known_http_status
from sglang_mm_conn.core.rooms import new_room_base
from sglang_mm_conn.core.settings import Settings
from sglang_mm_conn.core.states import Poll
from sglang_mm_conn.memory.malloc import raise_trim_threshold
from sglang_mm_conn.sglang_plugin.addresses import reached_at
from sglang_mm_conn.sglang_plugin.device import compute_device
from sglang_mm_conn.sglang_plugin.idle import wake_on
from sglang_mm_conn.sglang_plugin.names import BACKEND, server_incarnation, uses_connector

logger = logging.getLogger(__name__)

# How long a prompt may take to be tokenized before the failure of its encode is told to nobody.
_DISPATCHED_SECONDS = 300.0


def create_receiver(original: Any, server_args: Any, *args: Any, **kwargs: Any) -> Any:
    """Around ``create_mm_receiver``: ours for a server with the flag, sglang's for any other."""
    if not uses_connector(server_args):
        return original(server_args, *args, **kwargs)
    if kwargs.get("scheduler") is not None:
        return SchedulerReceiver(server_args, kwargs["dtype"], kwargs["hf_config"], kwargs["scheduler"])
    return RoomDispatcher(kwargs["encode_urls"])


def with_room(url: str, room_base: str) -> str:
    return f"{url}#{room_base}"


def split_room(url: str) -> tuple[str, str]:
    """(encoder URL, room base); the base is empty where a dispatcher other than ours made the request."""
    plain, _, room_base = url.partition("#")
    return plain, room_base


def ready_first(requests: list[Any], received: list[Any]) -> list[Any]:
    """Those that have waited before those ``received`` in this tick. sglang has it the other way round: an abort that
    came just now would be handled while its request is neither waiting for embeddings nor queued, and do nothing."""
    new = {id(request) for request in received}
    return sorted(requests, key=lambda request: id(request) in new)


def _tag(room_base: str) -> str:
    return f" [dispatch {room_base}]"


class RoomDispatcher(MMReceiverHTTP):
    """In the tokenizer process: names the rooms of each request and posts ``/encode``, all on one thread."""

    def __init__(self, encode_urls: list[str]) -> None:
        # Not the base's __init__: that opens sockets whose messages are unpickled.
        self.encode_urls = encode_urls  # grows and shrinks in place as encoders register
        self.host = reached_at(get_serving().host)
        self._server = server_incarnation()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="mm-conn-dispatch", daemon=True).start()

    def _send_encode_request(
        self, obj: Any, time_stats_json: Any = None, on_dispatch_error: Any = None
    ) -> threading.Event | None:
        """Dispatch the items of ``obj`` to the encoders. Returns the event that sglang sets once the request is on
        its way to the scheduler; None where there is nothing to dispatch."""
        if not obj.is_single:
            raise ValueError("a batch of prompts with images cannot be sent to encoders: send them one by one")
        items = self._extract_url_data(obj)
        urls = list(self.encode_urls)
        if not items or not urls:
            if items:
                logger.warning("No encoder is known: request %s is processed without one", obj.rid)
            obj.need_wait_for_mm_inputs = False
            return None
        room_base = new_room_base(self._server)
        obj.need_wait_for_mm_inputs = True
        obj.num_items_assigned = self._assign_items_by_modality(items, len(urls))
        obj.encoder_urls = [with_room(url, room_base) for url in urls]
        dispatched = threading.Event()
        asyncio.run_coroutine_threadsafe(
            self._dispatch(
                obj.rid, room_base, items, obj.num_items_assigned, urls, time_stats_json, dispatched, on_dispatch_error
            ),
            self._loop,
        )
        return dispatched

    async def _dispatch(
        self,
        rid: str,
        room_base: str,
        items: list[Any],
        assigned: Any,
        urls: list[str],
        time_stats_json: Any,
        dispatched: threading.Event,
        on_dispatch_error: Any,
    ) -> None:
        try:
            error = await self.encode(
                req_id=room_base,
                mm_data=items,
                embedding_port=None,
                endpoint_encode="encode",
                num_items_assigned=assigned,
                encode_urls=urls,
                time_stats_json=time_stats_json,
            )
            problem = None if error is None else (error.error_msg, error.error_code)
        except Exception as failure:
            logger.warning("Dispatch of %s failed: %s", rid, failure)
            problem = (f"{type(failure).__name__}: {failure}", int(HTTPStatus.BAD_GATEWAY))
        if problem is None or on_dispatch_error is None:
            return
        # The scheduler must know the request before it can hear that it failed.
        deadline = self._loop.time() + _DISPATCHED_SECONDS
        while not dispatched.is_set() and self._loop.time() < deadline:
            await asyncio.sleep(0.005)
        # The tag keeps a late error away from a later request that reuses the id.
        text, code = problem[0] + _tag(room_base), known_http_status(problem[1])
        on_dispatch_error(EncoderDispatchErrorReq(rid=rid, error_msg=text, error_code=code))

    def process_waiting_requests(self, recv_reqs: Any) -> Any:
        raise ConnError("requests wait in the scheduler, not in the tokenizer")


class SchedulerReceiver(MMReceiverHTTP):
    """In a scheduler process: one manager, and one WaitingEmbeddingRequest per request that waits."""

    def __init__(self, server_args: Any, dtype: torch.dtype, hf_config: Any, scheduler: Any) -> None:
        # Not the base's __init__: that opens a socket whose messages are unpickled, and a pool of its own.
        parallel = get_parallel()
        self.scheduler = scheduler
        self.tp_rank, self.tp_size, self.tp_group = parallel.tp_rank, parallel.tp_size, parallel.tp_group
        self.encode_urls = list(get_disagg().encoder_urls)
        self.wait_timeout = envs.SGLANG_ENCODER_RECV_TIMEOUT.get()
        self.hostname = reached_at(get_serving().host)
        self.model_type = getattr(hf_config, "model_type", "").lower()
        self.waiting_list: list[WaitingEmbeddingRequest] = []
        self.waiting_by_rid: dict[str, WaitingEmbeddingRequest] = {}
        self.scheduler_recv_socket = self.scheduler_context = self.scheduler_embedding_port = None
        self._init_mm_processor(server_args, hf_config, model_config=scheduler.model_config)
        settings = Settings.from_env(os.environ)
        raise_trim_threshold(settings.heap_kept_bytes, os.environ)
        self.manager = EmbeddingManager(
            EmbeddingArgs(
                settings=settings,
                dtype=dtype,
                row_bytes=_widest_row(scheduler.model_config) * dtype.itemsize,
                host=self.hostname,
                timeout=self.wait_timeout,
                server=self._server(),
                rank=self.tp_rank,
                size=self.tp_size,
                ranks_per_host=self.tp_size // parallel.nnodes,
                device=compute_device(),
            ),
            EmbeddingMode.LANGUAGE,
            server_args,
        )
        assert self.manager.language is not None
        self._joined_scheduler = False
        for url in self.encode_urls:
            self.manager.language.use_encoder(url)

    def _server(self) -> str:
        """The incarnation of the server: that of rank 0, beside which rooms are named, on every host of the server."""
        mine = server_incarnation()
        return mine if self.tp_size == 1 else str(self.tp_group.all_gather_object(mine)[0])

    def process_waiting_requests(self, recv_reqs: list[Any]) -> Any:
        """Every tick: take in new requests, poll the waiting ones, answer (ready requests, aborted requests)."""
        assert self.manager.language is not None
        self.manager.language.completions.clear()  # before the rooms are looked at, so that no notification is lost
        if not self._joined_scheduler:  # it is complete now; it was not when it made this object
            self._joined_scheduler = True
            wake_on(self.scheduler, self.manager.language.completions.fileno(), lambda: bool(self.waiting_list))
            self._report_in_server_info()
        received = [request for request in recv_reqs if not self._is_stale_error(request)]
        requests, aborted = self._process_waiting_requests(received, WaitingEmbeddingRequest, manager=self.manager)
        if any(request.status == WaitingMMRequestStatus.SUCCESS for request in self.waiting_list):
            # Another rank is not done yet, and nothing tells this one when it is: look again at once.
            self.manager.language.completions.notify()
        return ready_first(requests, received), aborted

    def _is_stale_error(self, request: Any) -> bool:
        """A dispatch error of an earlier request whose id was used again."""
        if not isinstance(request, EncoderDispatchErrorReq):
            return False
        waiting = self.waiting_by_rid.get(request.rid)
        return waiting is not None and _tag(waiting.room_base) not in request.error_msg

    def _report_in_server_info(self) -> None:
        """``GET /server_info`` says what the pool and the rooms are doing: in ``internal_states``, by our name."""
        state, language = self.scheduler.internal_state, self.manager.language
        assert language is not None
        original = state.get_internal_state

        def get_internal_state(request: Any) -> Any:
            answer = original(request)
            answer.internal_state[BACKEND] = language.report()
            return answer

        state.get_internal_state = get_internal_state

    def create_req(self, recv_req: Any) -> Any:
        # In sglang 0.5.23 an aborted request without input ids ends the whole server (len(None) in its output).
        if recv_req.input_ids is None:
            recv_req.input_ids = array("q", [])
        return super().create_req(recv_req)


def _widest_row(model_config: Any) -> int:
    """Values in the widest row that an encoder of this model sends, by sglang's own rule."""
    from sglang.srt.disaggregation.encoder.server import MMEncoder

    return max(MMEncoder._infer_embedding_dims(SimpleNamespace(model_config=model_config)).values())


class WaitingEmbeddingRequest(WaitingMMRequestBase):
    """One request that waits for its rooms: one per part, each from one encoder."""

    def __init__(
        self, rid: str, recv_req: Any, mm_processor: Any, encoder_urls: list[str], model_type: str,
        manager: EmbeddingManager, **_: Any,
    ) -> None:  # fmt: skip
        # Not the base's __init__: that opens a socket per request.
        self.rid = rid
        self.recv_req = recv_req
        self.mm_processor = mm_processor
        self.model_type = model_type
        self.num_items_assigned = recv_req.num_items_assigned
        self.manager = manager
        self.status = WaitingMMRequestStatus.PENDING
        self.error_msg: str | None = None
        self.error_code: int | None = None
        self.start_time = time.time()  # sglang compares it with time.time()
        self.recv_embedding_data: Any = None
        self.recv_socket = self.embedding_pool = self.embeddings_buffer = None
        self._pool_slot_id = self._mm_finalizer = self.registration_future = None
        self.encoder_urls, bases = zip(*map(split_room, encoder_urls), strict=True)
        self.room_base = bases[0]
        self._receivers: list[EmbeddingReceiver] = []
        self._assembly: Any = None
        if not self.room_base:
            raise ConnError(
                "the request was dispatched by a tokenizer process without the conn_multimodal plugin "
                "(--tokenizer-worker-num must be 1)"
            )

    def send_encode_request(self) -> None:
        """Expect a room per part, numbered as the dispatcher numbers them."""
        modalities = list(self.num_items_assigned)
        _, parts = calculate_modality_num_parts(modalities, self.num_items_assigned)
        part = 0
        for modality in modalities:
            for url, items in zip(self.encoder_urls, self.num_items_assigned[modality], strict=False):
                if items:
                    self._expect(url, part)
                    part += 1
        assert part == sum(parts.values())

    def _expect(self, url: str, part: int) -> None:
        receiver = EmbeddingReceiver(self.manager, url, create_part_req_id(self.room_base, part))
        receiver.init(label=self.rid)
        self._receivers.append(receiver)

    def _try_recv_mm_data(self) -> None:
        """Polled every tick; nothing large is copied here."""
        if self.status != WaitingMMRequestStatus.PENDING:
            return
        try:
            if self._assembly is None:
                states = [receiver.poll() for receiver in self._receivers]
                if Poll.Failed in states:
                    self._receivers[states.index(Poll.Failed)].failure_exception()
                if any(state is not Poll.Success for state in states):
                    return
                assert self.manager.language is not None
                self._assembly = self.manager.language.submit(self._join_parts)
            if self._assembly.done():
                self.recv_embedding_data, embeddings = self._assembly.result()
                self._finish_assemble(embeddings)
        except TransferFailed as error:
            self._fail_and_release(f"{error.reason} (room {error.room})", error.code)
        except Exception as error:
            self._fail_assemble(error)

    def _join_parts(self) -> tuple[MultiModalEmbeddingData, dict[Modality, torch.Tensor]]:
        """On a copier thread: sglang's record of the parts, and one tensor per modality."""
        data: MultiModalEmbeddingData | None = None
        tensors: dict[Modality, list[torch.Tensor]] = {}
        for number, receiver in enumerate(self._receivers):
            embedding, metadata = receiver.take()
            part = _embedding_data(self.rid, embedding, metadata)
            if part.part_idx != number or part.num_parts != len(self._receivers):
                raise ConnError(f"part {part.part_idx} of {part.num_parts} came as part {number}")
            if data is None:
                data = MultiModalEmbeddingData.from_embedding_data(part, model_type=self.model_type)
            else:
                data.add(part)
            tensors.setdefault(part.modality, []).append(embedding)
        assert data is not None
        return data, {
            modality: parts[0] if len(parts) == 1 else torch.cat(parts) for modality, parts in tensors.items()
        }

    def _fail_and_release(self, error_msg: str, error_code: int | None = None) -> None:
        # sglang's scheduler makes an HTTPStatus of the code, and ends the whole server where there is none (499).
        super()._fail_and_release(error_msg, None if error_code is None else known_http_status(error_code))

    def release_resources(self) -> None:
        """On abort, failure and time-out; may be called again."""
        self._clear_rooms()

    def close_recv_socket(self) -> None:
        """In every ending; after a success only when all ranks have agreed on it. So a leader's result keeps its name
        until every rank has mapped it, or the request failed on all of them."""
        self._clear_rooms()

    def _clear_rooms(self) -> None:
        for receiver in self._receivers:
            receiver.clear()
        self._receivers = []
        self._assembly = None  # an error in it refers to the rows it was about

    def _extract_embedding_from_buffer(self, recv_obj: Any, parts: Any) -> None:
        raise ConnError("embeddings do not come as messages here")

    def _prepare_embedding_buffer(self) -> bool:
        raise ConnError("there is no buffer to prepare here")


def _embedding_data(rid: str, embedding: torch.Tensor, metadata: dict[str, Any]) -> EmbeddingData:
    values = dict(metadata)
    return EmbeddingData(
        rid,
        values.pop("num_parts"),
        values.pop("part_idx"),
        values.pop("grid_dim"),
        Modality[values.pop("modality")],
        embedding,
        **values,
    )
