"""The encoder server: starts the manager, announces rooms, sends embeddings, answers the bootstrap route."""

from __future__ import annotations

import asyncio
import logging
import os
from dataclasses import replace
from http import HTTPStatus
from typing import Any

import msgspec
from sglang.srt.disaggregation.encoder import http_server
from sglang.srt.disaggregation.encoder.server import MMError
from sglang.srt.managers.schedule_batch import Modality
from sglang.srt.runtime_context import get_mm

from sglang_mm_conn.conn_multimodal import EmbeddingArgs, EmbeddingManager, EmbeddingMode, EmbeddingSender
from sglang_mm_conn.control.authentication import DeploymentKey
from sglang_mm_conn.control.bootstrap import BootstrapInfo
from sglang_mm_conn.core.dispatch.verdicts import BATCH_GIVEN_UP
from sglang_mm_conn.core.errors import ConnError, ProtocolError
from sglang_mm_conn.core.messages import PROTOCOL_VERSION
from sglang_mm_conn.core.outcomes import FailureCode
from sglang_mm_conn.core.rooms import server_of
from sglang_mm_conn.core.settings import Settings
from sglang_mm_conn.memory.malloc import raise_trim_threshold
from sglang_mm_conn.sglang_plugin.addresses import bind_address, reached_at
from sglang_mm_conn.sglang_plugin.device import compute_device
from sglang_mm_conn.sglang_plugin.draining import ServerDrain, follow_server
from sglang_mm_conn.sglang_plugin.internals import row_format, wait_for_embedding
from sglang_mm_conn.sglang_plugin.names import BACKEND, FLAG, uses_connector
from sglang_mm_conn.sglang_plugin.processes import DpWorkers, publish_control_port, replace_spawn_targets

logger = logging.getLogger(__name__)

# Fields of sglang's EmbeddingData that are not sent as metadata: the room, its size and its rows say the same, or only
# sglang's own transports need them. The modality is sent as its name.
_NOT_METADATA = frozenset({"req_id", "embedding", "send_time", "dtype", "shape", "error_msg", "error_code", "modality"})
_manager: EmbeddingManager | None = None  # in a process that holds embeddings
_dp_workers: DpWorkers | None = None  # in the process that has the HTTP route
_key: DeploymentKey | None = None
_drain: ServerDrain | None = None  # in the process that has the HTTP route


def bootstrap_info() -> tuple[BootstrapInfo, DeploymentKey | None] | None:
    """What the bootstrap route answers; None while the model is being loaded."""
    known = _info_of_dp_workers() if _manager is None else _manager.register_to_bootstrap()
    if known is None:
        return None
    draining = _drain is not None and _drain.draining.refuses
    cached = bool(get_mm().enable_prefix_mm_cache)
    return msgspec.structs.replace(known[0], draining=draining, prefix_cache=cached), known[1]


def start_processes(dp_size: int, settings: Settings) -> None:
    """Called once, in the process that has the HTTP route, before sglang spawns the encoder's DP workers and TP ranks,
    which are to load the hooks too."""
    global _dp_workers, _key, _drain
    _dp_workers = replace_spawn_targets(dp_size)
    _key = None if settings.key_file is None else DeploymentKey.load(settings.key_file)
    _drain = ServerDrain(settings, _key, _dp_workers)
    _drain.install(http_server.app)


def _info_of_dp_workers() -> tuple[BootstrapInfo, DeploymentKey | None] | None:
    dispatcher = http_server.dp_dispatcher
    if dispatcher is None or _dp_workers is None:
        return None
    workers = _dp_workers.known(dispatcher.alive_ranks)  # sglang does not restart a worker that died
    return (BootstrapInfo(PROTOCOL_VERSION, workers), _key) if workers else None


def keep_on_device(original: Any, self: Any, ctx: Any, *, keep_on_gpu: bool) -> Any:
    """Around ``_compute_direct_embedding``: keep the embedding on the GPU, by SGLANG_MM_CONN_EMBEDDING_DEVICE.

    Two things need it on the host: the prefix cache, whose entries are there, and the audio of a video, which sglang
    encodes only without ``keep_on_gpu``. All ranks of the encoder must decide alike, since ``keep_on_gpu`` also decides
    whether the model runs or the cache is asked. So only what every rank knows is used.
    """
    return original(self, ctx, keep_on_gpu=keep_on_gpu or _stays_on_device(self, ctx))


def _stays_on_device(encoder: Any, ctx: Any) -> bool:
    return (
        uses_connector(encoder.server_args)
        and Settings.from_env(os.environ).resolved_embedding_device != "cpu"
        and not ctx.is_health_check
        and not get_mm().enable_prefix_mm_cache
        and not (ctx.modality == Modality.VIDEO and ctx.preprocess_result.mm_inputs.get("video_audio_features"))
    )


def start_manager(result: None, self: Any, server_args: Any, *args: Any, **kwargs: Any) -> None:
    """After ``MMEncoder.__init__``: create the manager, in the process that holds the embeddings (rank 0)."""
    global _manager
    if not uses_connector(server_args) or self.rank != 0:
        return
    from sglang.srt.runtime_context import get_serving

    settings, host = Settings.from_env(os.environ), get_serving().host
    raise_trim_threshold(settings.heap_kept_bytes, os.environ)
    dtype, row_bytes = row_format(self)
    _manager = self.conn_multimodal = EmbeddingManager(
        EmbeddingArgs(
            settings=replace(settings, host=settings.host or reached_at(host)),
            dtype=dtype,
            row_bytes=row_bytes,
            host=bind_address(host),
            timeout=self.send_timeout,
            device=compute_device(),
        ),
        EmbeddingMode.ENCODE,
        server_args,
    )
    endpoint = _manager.encoder_endpoint
    publish_control_port(endpoint.bootstrap_info[0].workers[0])
    if _drain is not None:
        _drain.serves(endpoint)
    follow_server(endpoint)


def announce_rooms(original: Any, self: Any, ctx: Any, requests: list[dict[str, Any]]) -> Any:
    """Around ``_publish_preprocess_metadata``: announce the sizes to the language ranks before the model runs."""

    async def publish() -> None:
        await original(self, ctx, requests)
        manager: EmbeddingManager | None = getattr(self, "conn_multimodal", None)
        if manager is None or ctx.is_health_check:
            return
        over = 0
        for request in requests:
            state = self.req_states.get(request["req_id"])
            if state is None or state.embedding_data is None or not _is_room(request["req_id"]):
                continue
            try:
                state.conn_multimodal = _announce(
                    manager, request["req_id"], state.embedding_data.shape, state.embedding_data.dtype
                )
                over += state.conn_multimodal.ended.done()
            except ConnError as error:  # fails this request only, not the others of its batch
                code = int(HTTPStatus.INTERNAL_SERVER_ERROR)
                manager.encoder_endpoint.fail(request["req_id"], str(error), code)
        if over == len(requests):
            # Raised here, an error reaches all ranks before the model runs on any: sglang compares them at this point.
            raise MMError(BATCH_GIVEN_UP, code=HTTPStatus.GONE)

    return publish()


def _is_room(req_id: str) -> bool:
    try:
        server_of(req_id)
    except ProtocolError:
        return False
    return True


def _announce(manager: EmbeddingManager, room: str, shape: list[int], dtype: Any) -> EmbeddingSender:
    sender = EmbeddingSender(manager, "", room)
    sender.init(shape[0], row_bytes=shape[1] * dtype.itemsize, dtype=dtype)
    return sender


async def push_embedding(
    original: Any, enc: Any, request: dict[str, Any], *, background_url_send: bool = False
) -> None:
    """Around ``_push_embedding_to_prefill``: send the embedding, or the error of its encode, over the connector.

    Returns when every language rank has all rows. Raises MMError, which sglang returns as the answer to ``/encode``.
    """
    manager: EmbeddingManager | None = getattr(enc, "conn_multimodal", None)
    if manager is None:
        await original(enc, request, background_url_send=background_url_send)
        return
    room = request["req_id"]
    if not _is_room(room):
        await enc.release_request(room)
        raise MMError(
            f"request {room} was not made by a language server with {FLAG} {BACKEND}",
            code=HTTPStatus.BAD_REQUEST,
        )
    endpoint = manager.encoder_endpoint
    try:
        state = enc.req_states.get(room)
        if state is None:
            raise MMError(f"the encoder released {room} before its embedding was sent", code=HTTPStatus.GONE)
        data = await wait_for_embedding(enc, state)
        if data.error_msg is not None:
            endpoint.fail(room, data.error_msg, data.error_code or int(HTTPStatus.INTERNAL_SERVER_ERROR))
            return
        await _deliver(manager, room, data, getattr(state, "conn_multimodal", None))
    except ConnError as error:
        endpoint.fail(room, str(error), int(HTTPStatus.INTERNAL_SERVER_ERROR))
        raise MMError(str(error)) from error
    except asyncio.CancelledError:
        endpoint.fail(room, "the encode was cancelled", FailureCode.ABORTED)
        raise
    finally:
        sender = manager.senders.get(room)
        if sender is not None:
            sender.clear()
        await enc.release_request(room)


async def _deliver(manager: EmbeddingManager, room: str, data: Any, sender: EmbeddingSender | None) -> None:
    if sender is None:  # not announced; one that was announced and has ended since is not announced again
        sender = _announce(manager, room, list(data.embedding.shape), data.embedding.dtype)
    sender.send(data.embedding, metadata_of(data))
    ended = await asyncio.shield(asyncio.wrap_future(sender.ended))
    if not ended.success:
        raise MMError(f"embedding {room} was not delivered: {ended.reason}", code=ended.code)


def metadata_of(data: Any) -> dict[str, Any]:
    """The fields of sglang's ``EmbeddingData`` that are sent with its rows: part number, grids, time stamps, ..."""
    values = {key: value for key, value in vars(data).items() if key not in _NOT_METADATA and not key.startswith("_")}
    return {**values, "modality": data.modality.name}
