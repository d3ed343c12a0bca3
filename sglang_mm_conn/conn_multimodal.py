"""The public API, in the form of sglang's transfer backends: manager, sender, receiver, bootstrap server.

The classes derive from sglang's ``BaseKV*`` and delegate to the endpoints in ``connector``. A *room* is the embedding
of one part of a request: the encoder creates an EmbeddingSender for it, each language rank an EmbeddingReceiver.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from functools import partial
from typing import Any

import torch
from sglang.srt.disaggregation.base import BaseKVBootstrapServer, BaseKVManager, BaseKVReceiver, BaseKVSender
from sglang.srt.disaggregation.base.conn import KVTransferMetric

from sglang_mm_conn.connector.args import EmbeddingArgs, EmbeddingMode
from sglang_mm_conn.connector.encoder.endpoint import EncoderEndpoint
from sglang_mm_conn.connector.language.endpoint import LanguageEndpoint
from sglang_mm_conn.connector.language.follower import FollowerEndpoint
from sglang_mm_conn.connector.metadata import decode_metadata, dtype_name, encode_metadata
from sglang_mm_conn.connector.runtime import Runtime
from sglang_mm_conn.control.authentication import DeploymentKey
from sglang_mm_conn.control.bootstrap import BootstrapInfo
from sglang_mm_conn.control.bootstrap_server import StandaloneBootstrap
from sglang_mm_conn.core.actions import Ended
from sglang_mm_conn.core.errors import ConnError, TransferFailed
from sglang_mm_conn.core.outcomes import FailureCode
from sglang_mm_conn.core.states import Poll
from sglang_mm_conn.datapath.factory import encoder_data_paths
from sglang_mm_conn.memory.device import device_of
from sglang_mm_conn.memory.results import PrivateResult, ResultMaker, SharedResult

__all__ = [
    "EmbeddingArgs",
    "EmbeddingBootstrapServer",
    "EmbeddingManager",
    "EmbeddingMode",
    "EmbeddingReceiver",
    "EmbeddingSender",
]


class EmbeddingManager(BaseKVManager):
    """Owns a process's endpoint: its pool or its transfer queues, its control sockets and its threads.

    Attributes:
        args: As passed.
        mode: The role of the process.
        encoder: The endpoint of an encoder process, else None; see ``encoder_endpoint``.
        language: The endpoint of a language rank, else None; see ``language_endpoint``.
        senders: The EmbeddingSenders whose room has not ended, by room.
    """

    def __init__(
        self,
        args: EmbeddingArgs,
        disaggregation_mode: EmbeddingMode,
        server_args: Any = None,
        is_mla_backend: bool | None = False,
    ) -> None:
        """Starts the endpoint and its threads.

        Args:
            args: What the manager needs to know about its server.
            disaggregation_mode: The role of the process.
            server_args: Not used; in sglang's signature.
            is_mla_backend: Not used; in sglang's signature.

        Raises:
            MemoryUnavailable: The pool cannot be allocated. The message names the setting.
            DataPathUnavailable: A data path of the settings cannot be used. The message names the setting.
        """
        self.args = args
        self.mode = disaggregation_mode
        self.encoder: EncoderEndpoint | None = None
        self.language: LanguageEndpoint | FollowerEndpoint | None = None
        self.senders: dict[str, EmbeddingSender] = {}
        runtime = Runtime(device_of(args.device, args.settings))
        if disaggregation_mode is EmbeddingMode.ENCODE:
            self.encoder = EncoderEndpoint(
                args.settings,
                host=args.host,
                dtype=dtype_name(args.dtype),
                widest_row_bytes=args.row_bytes,
                send_timeout=args.timeout,
                data_paths=encoder_data_paths(args.settings, args.settings.host or args.host, runtime.device),
                runtime=runtime,
            )
        else:
            self.language = _language_endpoint(args, runtime)

    @property
    def encoder_endpoint(self) -> EncoderEndpoint:
        """The endpoint of an encoder process. Raises ConnError in a language rank."""
        if self.encoder is None:
            raise ConnError(f"this manager has the role {self.mode.value!r}: only the role 'encode' has senders")
        return self.encoder

    @property
    def language_endpoint(self) -> LanguageEndpoint | FollowerEndpoint:
        """The endpoint of a language rank. Raises ConnError in an encoder process."""
        if self.language is None:
            raise ConnError(f"this manager has the role {self.mode.value!r}: only the role 'language' has receivers")
        return self.language

    def register_to_bootstrap(self) -> tuple[BootstrapInfo, DeploymentKey | None] | None:
        """What the bootstrap route answers, and the key that the asking language rank must prove to have.

        Returns:
            The answer of an encoder process, and its deployment key (None without one); None for a language rank.
        """
        return None if self.encoder is None else self.encoder.bootstrap_info

    def teardown(self) -> None:
        """Stop the threads and free the memory."""
        if self.encoder is not None:
            self.encoder.close()
        if self.language is not None:
            self.language.close()


def _language_endpoint(args: EmbeddingArgs, runtime: Runtime) -> LanguageEndpoint | FollowerEndpoint:
    """One that receives, for the leader of a host; one that reads what the leader has received, for the others."""
    if not args.leads:
        return FollowerEndpoint(args.settings, rank=args.rank, host_index=args.host_index, runtime=runtime)
    shared: ResultMaker = partial(SharedResult, host_index=args.host_index)
    return LanguageEndpoint(
        args.settings,
        server=args.server,
        host=args.settings.host or args.host,
        dtype=dtype_name(args.dtype),
        widest_row_bytes=args.row_bytes,
        rank=args.host_index,
        size=args.hosts,
        make_result=PrivateResult if args.ranks_per_host == 1 else shared,
        runtime=runtime,
    )


class EmbeddingSender(BaseKVSender):
    """A room on the encoder: ``init`` as soon as the embedding's size is known, ``send`` when it is computed.

    Attributes:
        room: Name of the room.
        ended: Resolves once, to the room's end.
    """

    def __init__(
        self,
        mgr: EmbeddingManager,
        bootstrap_addr: str,
        bootstrap_room: str,
        req_has_disagg_prefill_dp_rank: bool = False,
    ) -> None:
        """
        Args:
            mgr: A manager with the role ENCODE.
            bootstrap_addr: Not used; in sglang's signature.
            bootstrap_room: Name of the room: the ``req_id`` of the request to ``/encode``.
            req_has_disagg_prefill_dp_rank: Not used; in sglang's signature.

        Raises:
            ConnError: The manager has the other role.
        """
        self._endpoint = mgr.encoder_endpoint
        self._mgr = mgr
        self.room = bootstrap_room
        self.ended: Future[Ended] = Future()
        mgr.senders[self.room] = self
        self.ended.add_done_callback(lambda _: mgr.senders.pop(bootstrap_room, None))

    def init(
        self,
        num_kv_indices: int,
        aux_index: int | None = None,
        *,
        row_bytes: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Announce the size of the embedding to the language ranks. Does nothing if the room has ended.

        Args:
            num_kv_indices: Rows of the embedding.
            aux_index: Not used; in sglang's signature.
            row_bytes: Bytes of a row; the manager's ``row_bytes`` by default.
            dtype: dtype of the embedding; the manager's by default.
        """
        if self.ended.done():
            return
        self._endpoint.announce(
            self.room,
            num_kv_indices,
            row_bytes or self._mgr.args.row_bytes,
            dtype_name(dtype or self._mgr.args.dtype),
            self.ended.set_result,
        )

    def send(self, embedding: torch.Tensor, metadata: Mapping[str, Any] | None = None) -> None:
        """Send the embedding. Returns at once; ``ended`` resolves when every language rank has it.

        Args:
            embedding: Shape [tokens, width], of the announced size. It must not change from now on. On a GPU it may
                still be being computed, on the stream that is current in the calling thread.
            metadata: What ``EmbeddingReceiver.take`` returns with it. Values: None, numbers, strings, bytes, tensors,
                numpy arrays, and lists, tuples and dicts of them.

        Raises:
            ConnError: The size of ``embedding`` is not the announced one.
            ProtocolError: ``metadata`` has a value of another type, or is larger than the setting
                SGLANG_MM_CONN_MAX_METADATA_BYTES.
        """
        limit = self._mgr.args.settings.max_metadata_bytes
        self._endpoint.add_transfer_request(
            self.room, embedding.contiguous(), encode_metadata(dict(metadata or {}), limit)
        )

    def poll(self) -> Poll:
        """The state of the room, with the values of sglang's KVPoll. It never goes back to an earlier state."""
        if self.ended.done():
            return Poll.Success if self.ended.result().success else Poll.Failed
        return self._endpoint.poll(self.room) or Poll.Bootstrapping

    def failure_exception(self) -> None:
        """Raise TransferFailed if the room has failed."""
        if self.ended.done() and not self.ended.result().success:
            outcome = self.ended.result()
            raise TransferFailed(self.room, outcome.reason, outcome.code)

    def fail(self, reason: str, code: int) -> None:
        """End the room because its encode failed. Does nothing if the room has ended.

        Args:
            reason: Why, for the language ranks and their clients.
            code: The HTTP status that the clients should see.
        """
        self._endpoint.fail(self.room, reason, code)

    def abort(self) -> None:
        """As ``fail``, without a reason."""
        self.fail("aborted by the encoder", FailureCode.INTERNAL)

    def clear(self) -> None:
        """Forget the room, after aborting it if it has not ended."""
        if not self.ended.done():
            self.abort()
        self._mgr.senders.pop(self.room, None)

    def get_transfer_metric(self) -> KVTransferMetric:
        """Empty: the metrics of sglang's interface are about KV transfers."""
        return KVTransferMetric()


class EmbeddingReceiver(BaseKVReceiver):
    """A room on a language rank: ``init``, then ``poll`` until it ends, then ``take`` or ``failure_exception``.

    Attributes:
        room: Name of the room.
        encoder_url: URL of the encoder that sends the embedding.
    """

    def __init__(self, mgr: EmbeddingManager, bootstrap_addr: str, bootstrap_room: str | None = None) -> None:
        """
        Args:
            mgr: A manager with the role LANGUAGE.
            bootstrap_addr: URL of the encoder.
            bootstrap_room: Name of the room: the ``req_id`` of the request to ``/encode``.

        Raises:
            ConnError: The manager has the other role, or ``bootstrap_room`` is None.
        """
        if bootstrap_room is None:
            raise ConnError("bootstrap_room is None: an EmbeddingReceiver needs the name of its room")
        self._endpoint = mgr.language_endpoint
        self._mgr = mgr
        self.encoder_url = bootstrap_addr
        self.room = bootstrap_room

    def init(self, prefill_dp_rank: int = 0, *, timeout: float | None = None, label: str = "") -> None:
        """Expect the embedding. From now on blocks are offered when the encoder announces the room.

        Args:
            prefill_dp_rank: Not used; in sglang's signature.
            timeout: Seconds after which the room fails; the manager's ``timeout`` by default.
            label: Name of the request in log lines.
        """
        limit = self._mgr.args.timeout if timeout is None else timeout
        self._endpoint.expect(self.room, self.encoder_url, limit, label)

    def send_metadata(self, *args: Any, **kwargs: Any) -> None:
        """Not supported: blocks are offered automatically. Raises NotImplementedError."""
        raise NotImplementedError("blocks are offered when the encoder announces the room, see resume_transfer")

    def resume_transfer(self, embedding_indices: list[int], sent_tokens: int, allocated_tokens: int) -> None:
        """Offer the next window. Only for callers with blocks of their own: the endpoint does it when blocks are free.

        Args:
            embedding_indices: Numbers of the blocks, which are allocated to (room, window).
            sent_tokens: Rows of the embedding that earlier windows have received.
            allocated_tokens: Rows of this window.

        Raises:
            ConnError: The room does not wait for blocks, or the rows do not continue those received.
        """
        self._endpoint.resume_transfer(self.room, embedding_indices, sent_tokens, allocated_tokens)

    def poll(self) -> Poll:
        """The state of the room, with the values of sglang's KVPoll. It never goes back to an earlier state.

        Raises:
            ConnError: ``init`` was not called, or ``clear`` was.
        """
        return self._endpoint.poll(self.room)

    def take(self) -> tuple[torch.Tensor, dict[str, Any]]:
        """The embedding and its metadata. The room must be in the state Success.

        Returns:
            The embedding, of shape [tokens, width] and the announced dtype, in memory that the caller owns; and the
            metadata that was passed to ``EmbeddingSender.send``. On a GPU the embedding may be read on any stream; if
            on another than the default one, see memory/device.py before dropping the last reference.

        Raises:
            ConnError: The room has not succeeded.
        """
        embedding, metadata = self._endpoint.take(self.room)
        return embedding, decode_metadata(metadata, self._mgr.args.settings.max_metadata_bytes)

    def failure_exception(self) -> None:
        """Raise TransferFailed if the room has failed."""
        if self.poll() is Poll.Failed:
            outcome = self._endpoint.outcome(self.room)
            raise TransferFailed(self.room, outcome.reason, outcome.code)

    def abort(self) -> None:
        """End the room. Its blocks are reused only when no encoder can write to them any more."""
        self._endpoint.abort(self.room, "aborted by the language server")

    def clear(self) -> None:
        """Forget the room, after aborting it if it has not ended."""
        self.abort()
        self._endpoint.forget(self.room)


class EmbeddingBootstrapServer(BaseKVBootstrapServer):
    """The bootstrap route on a port of its own. In sglang it is part of the encoder's HTTP server instead.

    Attributes:
        url: Its URL.
    """

    def __init__(self, host: str, port: int, manager: EmbeddingManager | None = None) -> None:
        """
        Args:
            host: Address to bind.
            port: Port to bind; 0 for a free one.
            manager: The manager whose information the route answers; without one it answers that there is none yet.
        """
        self._server = StandaloneBootstrap(
            host, port, lambda: None if manager is None else manager.register_to_bootstrap()
        )
        self.url = self._server.url

    def close(self) -> None:
        """Stop the server."""
        self._server.close()
