"""The connector in the shape of sglang's transfer backends: manager, sender, receiver, bootstrap server.

These classes are the public contract, derived from sglang's ``BaseKV*``; what they do is done in ``connector``. An
embedding part is a *room*: the encoder makes an EmbeddingSender for it, the language rank an EmbeddingReceiver.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from sglang.srt.disaggregation.base import BaseKVBootstrapServer, BaseKVManager, BaseKVReceiver, BaseKVSender
from sglang.srt.disaggregation.base.conn import KVTransferMetric

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
from sglang_mm_conn.core.settings import Settings
from sglang_mm_conn.core.states import Poll
from sglang_mm_conn.datapath.factory import encoder_data_paths
from sglang_mm_conn.memory.device import device_of
from sglang_mm_conn.memory.results import PrivateResult, ResultMaker, SharedResult


class EmbeddingMode(enum.Enum):
    """Which end a manager is."""

    ENCODE = "encode"
    LANGUAGE = "language"


@dataclass(frozen=True)
class EmbeddingArgs:
    """What a manager needs to know of its server.

    ``row_bytes``: bytes of the model's widest embedding row. ``host``: address to bind (encoder) or to be reached at
    by Mooncake (language rank). ``timeout``: longest life of a room, in seconds.

    Language ranks only: ``server``, the incarnation of the language server; ``rank`` of ``size`` tensor-parallel ranks,
    of which ``ranks_per_host`` in a row share a host and one copy of every embedding. The first of them is the leader.
    """

    settings: Settings
    dtype: torch.dtype
    row_bytes: int
    host: str
    timeout: float
    server: str = ""
    rank: int = 0
    size: int = 1
    ranks_per_host: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))  # what the process computes on

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size or self.size % self.ranks_per_host:
            raise ConnError(f"rank {self.rank} of {self.size}, {self.ranks_per_host} on each host, cannot be")

    @property
    def hosts(self) -> int:
        """Hosts of the language server, and so the copies of an embedding that it asks for."""
        return self.size // self.ranks_per_host

    @property
    def host_index(self) -> int:
        return self.rank // self.ranks_per_host

    @property
    def leads(self) -> bool:
        """Whether this rank receives for its host; the others read what it received."""
        return self.rank % self.ranks_per_host == 0


class EmbeddingManager(BaseKVManager):
    """One per process and end. Owns the pool or the transfer queues, the control sockets and the threads."""

    def __init__(
        self,
        args: EmbeddingArgs,
        disaggregation_mode: EmbeddingMode,
        server_args: Any = None,
        is_mla_backend: bool | None = False,
    ) -> None:
        """Raises MemoryUnavailable, DataPathUnavailable naming the setting at fault."""
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
        elif args.leads:
            shared: ResultMaker = partial(SharedResult, host_index=args.host_index)
            self.language = LanguageEndpoint(
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
        else:
            self.language = FollowerEndpoint(args.settings, rank=args.rank, host_index=args.host_index, runtime=runtime)

    def register_to_bootstrap(self) -> tuple[BootstrapInfo, DeploymentKey | None] | None:
        """What the encoder's bootstrap route answers, and to whom; None for a language rank, which only asks."""
        return None if self.encoder is None else self.encoder.bootstrap_info

    def teardown(self) -> None:
        """Stop the threads and give memory back."""
        if self.encoder is not None:
            self.encoder.close()
        if self.language is not None:
            self.language.close()


class EmbeddingSender(BaseKVSender):
    """One room on the encoder: ``init`` as soon as its size is known, ``send`` when the embedding is there."""

    def __init__(
        self,
        mgr: EmbeddingManager,
        bootstrap_addr: str,
        bootstrap_room: str,
        req_has_disagg_prefill_dp_rank: bool = False,
    ) -> None:
        if mgr.encoder is None:
            raise ConnError("an EmbeddingSender needs a manager of the encode side")
        self._endpoint = mgr.encoder
        self._mgr = mgr
        self.room = bootstrap_room
        self.ended: Future[Ended] = Future()  # resolved once, when the room has ended
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
        """Announce ``num_kv_indices`` rows of ``row_bytes`` bytes (default: the widest) to the language ranks."""
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
        """Hand the embedding over: [tokens, width], which must not change any more. Does not wait for a GPU: the
        embedding may still be being computed on the stream that is current here.

        Raises ConnError where its size is not the announced one, ProtocolError where ``metadata`` cannot travel.
        """
        limit = self._mgr.args.settings.max_metadata_bytes
        self._endpoint.add_transfer_request(
            self.room, embedding.contiguous(), encode_metadata(dict(metadata or {}), limit)
        )

    def poll(self) -> Poll:
        """Monotonic, with the numbers of sglang's KVPoll."""
        if self.ended.done():
            return Poll.Success if self.ended.result().success else Poll.Failed
        return self._endpoint.poll(self.room) or Poll.Bootstrapping

    def failure_exception(self) -> None:
        """Raise TransferFailed where the room failed."""
        if self.ended.done() and not self.ended.result().success:
            outcome = self.ended.result()
            raise TransferFailed(self.room, outcome.reason, outcome.code)

    def fail(self, reason: str, code: int) -> None:
        """The encode failed: the language ranks are told why. Changes nothing where the room has ended."""
        self._endpoint.fail(self.room, reason, code)

    def abort(self) -> None:
        self.fail("aborted by the encoder", 500)

    def clear(self) -> None:
        """Forget the room; ends it first where it has not ended."""
        if not self.ended.done():
            self.abort()
        self._mgr.senders.pop(self.room, None)

    def get_transfer_metric(self) -> KVTransferMetric:
        return KVTransferMetric()


class EmbeddingReceiver(BaseKVReceiver):
    """One room on a language rank: ``init``, then ``poll`` until it ends, then ``take`` or ``failure_exception``."""

    def __init__(self, mgr: EmbeddingManager, bootstrap_addr: str, bootstrap_room: str | None = None) -> None:
        """``bootstrap_addr``: the encoder's URL. ``bootstrap_room``: the name that rides in ``/encode``."""
        if mgr.language is None or bootstrap_room is None:
            raise ConnError("an EmbeddingReceiver needs a room and a manager of the language side")
        self._endpoint = mgr.language
        self._mgr = mgr
        self.encoder_url = bootstrap_addr
        self.room = bootstrap_room

    def init(self, prefill_dp_rank: int = 0, *, timeout: float | None = None, label: str = "") -> None:
        """Wait for the room, ``timeout`` seconds at most (default: the manager's). ``label`` appears in logs."""
        limit = self._mgr.args.timeout if timeout is None else timeout
        self._endpoint.expect(self.room, self.encoder_url, limit, label)

    def send_metadata(self, *args: Any, **kwargs: Any) -> None:
        """Not part of this connector: blocks are offered by themselves when the encoder has announced the room."""
        raise NotImplementedError("offers are made when the encoder announces the room; see resume_transfer")

    def resume_transfer(self, embedding_indices: list[int], sent_tokens: int, allocated_tokens: int) -> None:
        """Offer the next window: blocks held by (room, window), for ``allocated_tokens`` rows after ``sent_tokens``.

        The endpoint does this by itself as soon as blocks are free; it is here for callers with blocks of their own.
        Raises ConnError where the room is not waiting for blocks or has other rows.
        """
        self._endpoint.resume_transfer(self.room, embedding_indices, sent_tokens, allocated_tokens)

    def poll(self) -> Poll:
        """Monotonic, with the numbers of sglang's KVPoll."""
        return self._endpoint.poll(self.room)

    def take(self) -> tuple[torch.Tensor, dict[str, Any]]:
        """The embedding [tokens, width] and its metadata, once, after Success; the caller owns the memory. On a GPU it
        may be read on any stream; on another than the default one, see memory.device before you let go of it."""
        embedding, metadata = self._endpoint.take(self.room)
        return embedding, decode_metadata(metadata, self._mgr.args.settings.max_metadata_bytes)

    def failure_exception(self) -> None:
        """Raise TransferFailed where the room failed."""
        if self.poll() is Poll.Failed:
            outcome = self._endpoint.outcome(self.room)
            raise TransferFailed(self.room, outcome.reason, outcome.code)

    def abort(self) -> None:
        """Give the room up. Its blocks are reused only when nobody can write them any more."""
        self._endpoint.abort(self.room, "aborted by the language server")

    def clear(self) -> None:
        """Forget the room; ends it first where it has not ended."""
        self.abort()
        self._endpoint.forget(self.room)


class EmbeddingBootstrapServer(BaseKVBootstrapServer):
    """The bootstrap route on a port of its own. In sglang it is mounted on the encoder's HTTP server instead."""

    def __init__(self, host: str, port: int, manager: EmbeddingManager | None = None) -> None:
        self._server = StandaloneBootstrap(
            host, port, lambda: None if manager is None else manager.register_to_bootstrap()
        )
        self.url = self._server.url

    def close(self) -> None:
        self._server.close()
