"""The encoder server: its manager, the announcement of sizes, the push of embeddings, the bootstrap route."""

from __future__ import annotations

import asyncio
import logging
import os
from dataclasses import replace
from http import HTTPStatus
from typing import Any

from sglang.srt.disaggregation.encoder import http_server
from sglang.srt.disaggregation.encoder.server import MMError
from sglang.srt.managers.schedule_batch import Modality
from sglang.srt.runtime_context import get_mm

from sglang_mm_conn.conn_multimodal import EmbeddingArgs, EmbeddingManager, EmbeddingMode, EmbeddingSender
from sglang_mm_conn.control.authentication import DeploymentKey
from sglang_mm_conn.control.bootstrap import BootstrapInfo
from sglang_mm_conn.core.errors import ConnError, ProtocolError
from sglang_mm_conn.core.messages import PROTOCOL_VERSION
from sglang_mm_conn.core.rooms import server_of
from sglang_mm_conn.core.settings import Settings
from sglang_mm_conn.memory.malloc import raise_trim_threshold
from sglang_mm_conn.sglang_plugin.addresses import bind_address, reached_at
from sglang_mm_conn.sglang_plugin.device import compute_device
from sglang_mm_conn.sglang_plugin.names import FLAG, uses_connector
from sglang_mm_conn.sglang_plugin.processes import DpWorkers, publish_control_port, replace_spawn_targets

logger = logging.getLogger(__name__)

# What sglang keeps on EmbeddingData for its own transports; everything else travels as metadata.
_NOT_METADATA = frozenset({"req_id", "embedding", "send_time", "dtype", "shape", "error_msg", "error_code", "modality"})
_manager: EmbeddingManager | None = None  # in a process that holds embeddings
_dp_workers: DpWorkers | None = None  # in the process that starts the server
_key: DeploymentKey | None = None


def bootstrap_info() -> tuple[BootstrapInfo, DeploymentKey | None] | None:
    """For the bootstrap route; None as long as the model is being loaded."""
    return _info_of_dp_workers() if _manager is None else _manager.register_to_bootstrap()


def start_processes(dp_size: int, key_file: str | None) -> None:
    """Before sglang spawns the encoder's DP workers and TP ranks: see that the hooks get there."""
    global _dp_workers, _key
    _dp_workers = replace_spawn_targets(dp_size)
    _key = None if key_file is None else DeploymentKey.load(key_file)


def _info_of_dp_workers() -> tuple[BootstrapInfo, DeploymentKey | None] | None:
    dispatcher = http_server.dp_dispatcher
    if dispatcher is None or _dp_workers is None:
        return None
    workers = _dp_workers.known(dispatcher.alive_ranks)  # sglang does not start a worker again that died
    return (BootstrapInfo(PROTOCOL_VERSION, workers), _key) if workers else None


def keep_on_device(original: Any, self: Any, ctx: Any, *, keep_on_gpu: bool) -> Any:
    """Around ``_compute_direct_embedding``: leave out its ``.cpu()`` where SGLANG_MM_CONN_EMBEDDING_DEVICE says so.

    Decided from what every rank of the encoder knows, so that all of them run the model, or none. Two things need
    the embedding on the host: the prefix cache, whose entries live there, and the sound of a video, which sglang
    encodes for its host-side transports only.
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
    """After ``MMEncoder.__init__``: one manager in the process that holds the embeddings (rank 0)."""
    global _manager
    if not uses_connector(server_args) or self.rank != 0:
        return
    from sglang.srt.runtime_context import get_serving

    settings, host = Settings.from_env(os.environ), get_serving().host
    raise_trim_threshold(settings.heap_kept_bytes, os.environ)
    _manager = self.conn_multimodal = EmbeddingManager(
        EmbeddingArgs(
            settings=replace(settings, host=settings.host or reached_at(host)),
            dtype=self._embedding_dtype,
            row_bytes=max(self._embedding_dims.values()) * self._element_size,
            host=bind_address(host),
            timeout=self.send_timeout,
            device=compute_device(),
        ),
        EmbeddingMode.ENCODE,
        server_args,
    )
    assert _manager.encoder is not None
    info, _ = _manager.encoder.bootstrap_info
    publish_control_port(info.workers[0])


def announce_rooms(original: Any, self: Any, ctx: Any, requests: list[dict[str, Any]]) -> Any:
    """Around ``_publish_preprocess_metadata``: the sizes are known, the model has not run. Tell the language ranks."""

    async def publish() -> None:
        await original(self, ctx, requests)
        manager: EmbeddingManager | None = getattr(self, "conn_multimodal", None)
        if manager is None or ctx.is_health_check:
            return
        for request in requests:
            state = self.req_states.get(request["req_id"])
            if state is None or state.embedding_data is None or not _is_room(request["req_id"]):
                continue
            try:
                state.conn_multimodal = _announce(
                    manager, request["req_id"], state.embedding_data.shape, state.embedding_data.dtype
                )
            except ConnError as error:  # the others of its batch do not notice
                assert manager.encoder is not None
                manager.encoder.fail(request["req_id"], str(error), int(HTTPStatus.INTERNAL_SERVER_ERROR))

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
    """Around ``_push_embedding_to_prefill``, the one funnel for embeddings and errors: deliver over the connector.

    Returns when every language rank has all rows. Raises MMError, which becomes the answer to ``/encode``.
    """
    manager: EmbeddingManager | None = getattr(enc, "conn_multimodal", None)
    if manager is None:
        await original(enc, request, background_url_send=background_url_send)
        return
    room = request["req_id"]
    if not _is_room(room):
        await enc.release_request(room)
        raise MMError(
            f"request {room} does not come from a language server started with {FLAG} conn_multimodal",
            code=HTTPStatus.BAD_REQUEST,
        )
    assert manager.encoder is not None
    try:
        state = enc.req_states.get(room)
        if state is None:
            raise MMError(f"the encoder released {room} before it was sent", code=HTTPStatus.GONE)
        data = await enc._wait_for_embedding(state)
        if data.error_msg is not None:
            manager.encoder.fail(room, data.error_msg, data.error_code or int(HTTPStatus.INTERNAL_SERVER_ERROR))
            return
        await _deliver(manager, room, data, getattr(state, "conn_multimodal", None))
    except ConnError as error:
        manager.encoder.fail(room, str(error), int(HTTPStatus.INTERNAL_SERVER_ERROR))
        raise MMError(str(error)) from error
    except asyncio.CancelledError:
        manager.encoder.fail(room, "the encode was cancelled", 499)
        raise
    finally:
        sender = manager.senders.get(room)
        if sender is not None:
            sender.clear()
        await enc.release_request(room)


async def _deliver(manager: EmbeddingManager, room: str, data: Any, sender: EmbeddingSender | None) -> None:
    if sender is None:  # one that was announced may have ended since: its end was told, and is not told again
        sender = _announce(manager, room, list(data.embedding.shape), data.embedding.dtype)
    sender.send(data.embedding, metadata_of(data))
    ended = await asyncio.shield(asyncio.wrap_future(sender.ended))
    if not ended.success:
        raise MMError(f"embedding {room} was not delivered: {ended.reason}", code=ended.code)


def metadata_of(data: Any) -> dict[str, Any]:
    """What travels beside the rows of an ``EmbeddingData``: its part, its grids, its time stamps, all it is given."""
    values = {key: value for key, value in vars(data).items() if key not in _NOT_METADATA and not key.startswith("_")}
    return {**values, "modality": data.modality.name}
