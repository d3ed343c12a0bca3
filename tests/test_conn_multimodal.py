"""The public classes: which rank of a language server receives, and which reads what another received."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sglang_mm_conn.conn_multimodal import (
    EmbeddingArgs,
    EmbeddingManager,
    EmbeddingMode,
    EmbeddingReceiver,
    EmbeddingSender,
)
from sglang_mm_conn.connector.language.endpoint import LanguageEndpoint
from sglang_mm_conn.connector.language.follower import FollowerEndpoint
from sglang_mm_conn.connector.metadata import encode_metadata
from sglang_mm_conn.core.errors import ConnError, TransferFailed
from sglang_mm_conn.core.rooms import new_id, new_room_base
from sglang_mm_conn.core.settings import Settings
from sglang_mm_conn.core.states import Poll
from sglang_mm_conn.memory.results import Contents, PrivateResult, SharedResult

ENCODER = "http://127.0.0.1:1"


def args(**ranks: Any) -> EmbeddingArgs:
    settings = Settings(blocks=4, block_size=4, data_path="shm")
    return EmbeddingArgs(settings, torch.float32, 16, "127.0.0.1", 5.0, server=new_id(), **ranks)


@pytest.mark.parametrize(
    ("rank", "size", "per_host", "leads", "host_index", "hosts"),
    [
        (0, 1, 1, True, 0, 1),
        (0, 2, 2, True, 0, 1),
        (1, 2, 2, False, 0, 1),
        (4, 8, 4, True, 1, 2),
        (7, 8, 4, False, 1, 2),
    ],
)
def test_the_first_rank_of_every_host_leads(
    rank: int, size: int, per_host: int, leads: bool, host_index: int, hosts: int
) -> None:
    one = args(rank=rank, size=size, ranks_per_host=per_host)
    assert (one.leads, one.host_index, one.hosts) == (leads, host_index, hosts)


@pytest.mark.parametrize(("rank", "size", "per_host"), [(2, 2, 1), (0, 3, 2)])
def test_ranks_that_cannot_be_are_refused(rank: int, size: int, per_host: int) -> None:
    with pytest.raises(ConnError, match=f"invalid ranks: rank {rank} of {size} with {per_host} per host"):
        args(rank=rank, size=size, ranks_per_host=per_host)


def test_a_rank_alone_on_its_host_shares_nothing_and_a_leader_asks_for_one_copy() -> None:
    for ranks, kind in (({}, PrivateResult), ({"rank": 0, "size": 2, "ranks_per_host": 2}, SharedResult)):
        manager = EmbeddingManager(args(**ranks), EmbeddingMode.LANGUAGE)
        try:
            assert isinstance(manager.language, LanguageEndpoint) and manager.language._size == 1
            result = manager.language._results._memory.make(new_room_base(new_id()), Contents(1, "float32", 4, b""))
            assert isinstance(result, kind)
            result.close()
        finally:
            manager.teardown()


def test_a_receiver_on_a_follower_reads_what_its_leader_published() -> None:
    manager = EmbeddingManager(args(rank=1, size=2, ranks_per_host=2), EmbeddingMode.LANGUAGE)
    assert isinstance(manager.language, FollowerEndpoint) and manager.register_to_bootstrap() is None
    assert manager.language_endpoint is manager.language
    with pytest.raises(ConnError, match="this manager has the role 'language'"):
        EmbeddingSender(manager, "", "room")
    room, failed = new_room_base(manager.args.server), new_room_base(manager.args.server)
    receivers = [EmbeddingReceiver(manager, ENCODER, name) for name in (room, failed)]
    for receiver in receivers:
        receiver.init(label="rid")
        assert receiver.poll() is Poll.Bootstrapping
    metadata = encode_metadata({"grid": torch.ones(1, 3)}, 1 << 20)
    result = SharedResult(room, Contents(2, "float32", 32, metadata))
    result.rows.copy_(torch.arange(8.0).view(torch.uint8))
    result.publish()
    assert receivers[0].poll() is Poll.Success
    embedding, values = receivers[0].take()
    assert torch.equal(embedding, torch.arange(8.0).reshape(2, 4)) and torch.equal(values["grid"], torch.ones(1, 3))
    receivers[0].clear()
    receivers[1].abort()
    with pytest.raises(TransferFailed, match="aborted by the language server"):
        receivers[1].failure_exception()
    receivers[1].clear()
    result.close()
    manager.teardown()
