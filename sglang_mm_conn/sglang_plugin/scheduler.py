"""The language server's scheduler processes: their requests wait for embeddings that arrive over this connector."""

from __future__ import annotations

import logging
import os
import time
from array import array
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from typing import Any

import torch
from sglang.srt.disaggregation.encoder.receiver import (
    MMReceiverHTTP,
    WaitingMMRequestBase,
    WaitingMMRequestStatus,
)
from sglang.srt.environ import envs
from sglang.srt.managers.io_struct import AbortReq, EncoderDispatchErrorReq
from sglang.srt.managers.utils import compute_num_reserved_tokens
from sglang.srt.runtime_context import get_disagg, get_parallel, get_serving

from sglang_mm_conn.conn_multimodal import EmbeddingArgs, EmbeddingManager, EmbeddingMode
from sglang_mm_conn.control.http_exchange import normalized
from sglang_mm_conn.control.reports import ReportSender
from sglang_mm_conn.core.dispatch.actions import Redispatched
from sglang_mm_conn.core.dispatch.reports import EncoderStatuses, Report
from sglang_mm_conn.core.dispatch.verdicts import for_client, of_failure
from sglang_mm_conn.core.errors import ConnError, TransferFailed
from sglang_mm_conn.core.outcomes import FailureCode, known_http_status
from sglang_mm_conn.core.settings import Settings
from sglang_mm_conn.memory.malloc import raise_trim_threshold
from sglang_mm_conn.sglang_plugin.addresses import reached_at
from sglang_mm_conn.sglang_plugin.device import compute_device
from sglang_mm_conn.sglang_plugin.dispatch import RoomDispatcher, rooms_of, split_room
from sglang_mm_conn.sglang_plugin.idle import wake_on
from sglang_mm_conn.sglang_plugin.internals import extend_internal_state, widest_row
from sglang_mm_conn.sglang_plugin.lengths import Context, PromptTooLong
from sglang_mm_conn.sglang_plugin.names import BACKEND, REPORTS_ENV, server_incarnation, uses_connector
from sglang_mm_conn.sglang_plugin.news import News, PromptComes, PromptOver, news_in
from sglang_mm_conn.sglang_plugin.prompts import Prompt, Prompts, RequestGivenUp

logger = logging.getLogger(__name__)

# What fails a request that somebody has aborted while it waited. No client reads it.
_ABORTED = "aborted before its embeddings came"


def create_receiver(original: Any, server_args: Any, *args: Any, **kwargs: Any) -> Any:
    """Around ``create_mm_receiver``: this plugin's receiver for a server with the flag, else sglang's."""
    if not uses_connector(server_args):
        return original(server_args, *args, **kwargs)
    if kwargs.get("scheduler") is not None:
        return SchedulerReceiver(server_args, kwargs["dtype"], kwargs["hf_config"], kwargs["scheduler"])
    return RoomDispatcher(kwargs["encode_urls"])


def ready_first(requests: list[Any], received: list[Any]) -> list[Any]:
    """``requests`` with those that became ready first, and then those ``received`` in this tick.

    sglang's order is the reverse. An abort received in the tick in which its request becomes ready would then be
    handled when the request no longer waits for embeddings and is not queued yet, and would have no effect.
    """
    new = {id(request) for request in received}
    return sorted(requests, key=lambda request: id(request) in new)


def split_news(recv_reqs: list[Any]) -> tuple[list[Any], list[News]]:
    """``recv_reqs`` without the news of the tokenizer process, and the news."""
    received, news = [], []
    for request in recv_reqs:
        found = news_in(request) if isinstance(request, EncoderDispatchErrorReq) else None
        if found is None:
            received.append(request)
        else:
            news.append(found)
    return received, news


def context_of(scheduler: Any) -> Context | None:
    """The context that prompts must fit into; None if sglang cuts those that do not."""
    if get_serving().allow_auto_truncate:
        return None
    return Context(scheduler.model_config.context_len, compute_num_reserved_tokens())


class SchedulerReceiver(MMReceiverHTTP):
    """In place of sglang's receiver in a scheduler process: owns the manager and the waiting requests."""

    def __init__(self, server_args: Any, dtype: torch.dtype, hf_config: Any, scheduler: Any) -> None:
        # Does not call super().__init__, which opens a socket whose messages are unpickled, and creates a pool.
        parallel = get_parallel()
        self.scheduler = scheduler
        self.tp_rank, self.tp_size, self.tp_group = parallel.tp_rank, parallel.tp_size, parallel.tp_group
        self.encode_urls = [normalized(url) for url in get_disagg().encoder_urls]
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
                row_bytes=widest_row(scheduler.model_config) * dtype.itemsize,
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
        self.context = context_of(scheduler)
        self.aborted: dict[str, Any] = {}  # why, by the ids of requests that somebody has aborted
        self._joined_scheduler = False
        report: Callable[[Report], None] | None = None
        if self.tp_rank == 0 and os.environ.get(REPORTS_ENV):  # on the host of the dispatchers
            sender = ReportSender(os.environ[REPORTS_ENV])
            report = sender.send
            self.manager.language_endpoint.watch_encoders(lambda encoders: sender.send(EncoderStatuses(encoders)))
        self.prompts = Prompts(self.manager, self.model_type, report)
        for url in self.encode_urls:
            self.manager.language_endpoint.use_encoder(url)

    def _server(self) -> str:
        """The server's incarnation on all its hosts: that of rank 0, whose host names the rooms."""
        mine = server_incarnation()
        return mine if self.tp_size == 1 else str(self.tp_group.all_gather_object(mine)[0])

    def process_waiting_requests(self, recv_reqs: list[Any]) -> Any:
        """Called every tick: accepts new requests, polls waiting ones. Returns (ready requests, aborted requests)."""
        completions = self.manager.language_endpoint.completions
        completions.clear()  # before the rooms are polled, so that no notification is lost
        if not self._joined_scheduler:  # the scheduler was not fully constructed when it created this object
            self._joined_scheduler = True
            wake_on(self.scheduler, completions.fileno(), lambda: bool(self.waiting_list))
            # Part of `internal_states` in GET /server_info.
            extend_internal_state(self.scheduler, BACKEND, self.manager.language_endpoint.report)
        received, news = split_news(recv_reqs)
        for coming in [one for one in news if isinstance(one, PromptComes)]:
            self._heed(coming)
        requests, aborted = self._process_waiting_requests(
            received, WaitingEmbeddingRequest, prompts=self.prompts, context=self.context
        )
        for one in [one for one in news if not isinstance(one, PromptComes)]:  # afterwards: they may be about requests
            self._heed(one)  # that have come in this tick
        self.prompts.sweep(time.monotonic())
        if news:
            completions.notify()  # the next tick must come at once
        if any(request.status == WaitingMMRequestStatus.SUCCESS for request in self.waiting_list):
            # Another rank still waits, and nothing will notify this one when that rank is done: poll again at once.
            completions.notify()
        return ready_first(requests, received), self._answer_aborted(aborted)

    def abort_waiting_requests(self, recv_req: Any) -> None:
        """Abort by id or of all: every rank gets it in the same tick."""
        for waiting in self.waiting_list:
            if recv_req.abort_all or waiting.rid.startswith(recv_req.rid):
                self.aborted[waiting.rid] = recv_req.finished_reason
                waiting.abort()

    def _answer_aborted(self, failed: list[tuple[Any, str, int | None]]) -> list[tuple[Any, str, int | None]]:
        """Answer those that somebody has aborted as sglang answers for its waiting queue. Returns the others."""
        for request, reason, _ in failed:
            why = self.aborted.pop(request.rid, None)
            if reason == _ABORTED:
                self.scheduler.send_abort_output(AbortReq(rid=request.rid, finished_reason=why), request)
        return [one for one in failed if one[1] != _ABORTED]

    def _heed(self, news: News) -> None:
        """Requests are found by their room base: a later one, or one of another tokenizer process, may have the same
        id."""
        if isinstance(news, PromptComes):
            try:
                self.prompts.expect(news.room_base, news.label, news.rooms, news.requests)
            except Exception:  # its requests fail when they come
                logger.exception("The embeddings of %s cannot be expected", news.label)
        elif isinstance(news, PromptOver):
            self.prompts.expect_no_more(news.room_base)
        else:
            self.prompts.heed(news)
            if isinstance(news, Redispatched):
                for waiting in self.waiting_list:
                    if waiting.room_base == news.room_base:
                        waiting.wait_again()

    def create_req(self, recv_req: Any) -> Any:
        # In sglang 0.5.23 an aborted request without input ids ends the whole server (its output calls len(None)).
        if recv_req.input_ids is None:
            recv_req.input_ids = array("q", [])
        return super().create_req(recv_req)


class WaitingEmbeddingRequest(WaitingMMRequestBase):
    """A request that waits for the embeddings of its prompt."""

    def __init__(
        self,
        rid: str,
        recv_req: Any,
        mm_processor: Any,
        encoder_urls: list[str],
        prompts: Prompts,
        context: Context | None,
        **_: Any,
    ) -> None:
        # Does not call super().__init__, which opens a socket per request.
        self.rid = rid
        self.recv_req = recv_req
        self.mm_processor = mm_processor
        self.num_items_assigned = recv_req.num_items_assigned
        self._prompts, self._context = prompts, context
        self._prompt: Prompt | None = None
        self._prompt_ids = recv_req.input_ids
        self.status = WaitingMMRequestStatus.PENDING
        self.error_msg: str | None = None
        self.error_code: int | None = None
        self.start_time = time.time()  # sglang compares it with time.time()
        self.recv_embedding_data: Any = None
        self.recv_socket = self.embedding_pool = self.embeddings_buffer = None
        self._pool_slot_id = self._mm_finalizer = self.registration_future = None
        self.encoder_urls, bases = zip(*map(split_room, encoder_urls), strict=True)
        self.room_base = bases[0]
        if not self.room_base:
            raise ConnError(
                "the request was dispatched by a tokenizer process without the conn_multimodal plugin; "
                "with --tokenizer-worker-num 1 there is no such process"
            )

    def send_encode_request(self) -> None:
        """Expect the embeddings, unless another request of the same prompt has done that."""
        rooms = partial(rooms_of, self.room_base, self.encoder_urls, self.num_items_assigned)
        self._prompt = self._prompts.use(self.room_base, self.rid, rooms)

    def wait_again(self) -> None:
        """A part comes from another encoder. This rank may already have had all parts, and another one not."""
        if self._prompt is not None:
            self.recv_embedding_data = None
            self.recv_req.mm_inputs, self.recv_req.input_ids = None, self._prompt_ids
            self.status = WaitingMMRequestStatus.PENDING

    def _try_recv_mm_data(self) -> None:
        """Called every tick. Copies nothing large: parts are joined on another thread."""
        if self.status != WaitingMMRequestStatus.PENDING or self._prompt is None:
            return
        try:
            joined = self._prompt.poll(time.monotonic())
            if joined is not None:
                self.recv_embedding_data, embeddings = joined
                self._finish_assemble(dict(embeddings))
                if self._context is not None:
                    self._context.check(len(self.recv_req.input_ids), self.recv_req.sampling_params.max_new_tokens)
        except RequestGivenUp as error:
            self._fail_and_release(error.reason, error.code)
        except TransferFailed as error:
            self._fail(error.code, f"with room {error.room} ({error.code}): {error.reason}", error.reason)
        except ConnError as error:
            self._fail(FailureCode.RANK_FAILED, f"on this rank: {error}", "")
        except PromptTooLong as error:
            self._fail_and_release(str(error), int(HTTPStatus.BAD_REQUEST))
        except Exception as error:
            self._fail_assemble(error)

    def _fail(self, code: int, told: str, reason: str) -> None:
        """``told`` is for the log: a client learns nothing of rooms and ranks."""
        logger.warning("Request %s fails %s", self.rid, told)
        code, reason = for_client(of_failure(code, reason))
        self._fail_and_release(reason, code)

    def _fail_and_release(self, error_msg: str, error_code: int | None = None) -> None:
        # sglang's scheduler converts the code to HTTPStatus, and an unknown code (499) would end the whole server.
        super()._fail_and_release(error_msg, None if error_code is None else known_http_status(error_code))

    def abort(self) -> None:
        """Somebody has aborted it: nobody wants the embeddings."""
        if self.status in (WaitingMMRequestStatus.PENDING, WaitingMMRequestStatus.SUCCESS):
            self._fail_and_release(_ABORTED)

    def release_resources(self) -> None:
        """Called by sglang on abort, failure and timeout, possibly more than once."""
        self._leave()

    def close_recv_socket(self) -> None:
        """Called by sglang at every end; after a success only when all ranks have agreed on it.

        So the segment of a leader's result keeps its name until every rank has mapped it or the request has failed.
        """
        self._leave()

    def _leave(self) -> None:
        if self._prompt is not None:
            self._prompt = None
            self._prompts.leave(self.room_base)

    def _extract_embedding_from_buffer(self, recv_obj: Any, parts: Any) -> None:
        raise ConnError("sglang's message buffers are not used: embeddings arrive over conn_multimodal")

    def _prepare_embedding_buffer(self) -> bool:
        raise ConnError("sglang's message buffers are not used: embeddings arrive over conn_multimodal")
