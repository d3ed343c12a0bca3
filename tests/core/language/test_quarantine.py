"""Quarantined blocks: which proofs free them, and which processes get another Abort."""

from __future__ import annotations

import pytest

from sglang_mm_conn.core.blocks import BlockAllocator
from sglang_mm_conn.core.language.quarantine import ABORT_AGAIN_SECONDS, QuarantineTable
from sglang_mm_conn.core.language.receiver_room import Peer, ReceiverRoom, RoomMessage
from sglang_mm_conn.core.messages import Announce, Done, Drained, Failed, Progress

SHM = Peer("e1", "10.0.0.1:17001", "shm", True)
MOONCAKE = Peer("e2", "10.0.0.1:17002", "mooncake", False, epoch=2)


def table(*peers: Peer, epoch: int | None = None) -> tuple[QuarantineTable, BlockAllocator]:
    """Rooms "0", "1", ... failed in window 1, which offered rows 10 to 14, one block each."""
    allocator = BlockAllocator(4)
    quarantine = QuarantineTable(allocator)
    for number, peer in enumerate(peers):
        entry = ReceiverRoom(str(number), "http://encoder", 60.0, 0.0, 1, peer=peer, window=1)
        entry.epoch = peer.epoch if epoch is None else epoch
        entry.blocks, entry.sent_tokens, entry.allocated_tokens = allocator.allocate((str(number), 1), 1), 10, 4
        quarantine.put(entry, float(number))
    assert allocator.quarantined_count == len(peers) == len(quarantine)
    return quarantine, allocator


@pytest.mark.parametrize(
    "message",
    [
        Drained(room="0"),
        Failed(room="0", reason="gone", code=502, drained=True),
        Progress(room="0", window=1, sent_tokens=14),
        Done(room="0", window=1, total_tokens=14),
    ],
    ids=lambda message: type(message).__name__,
)
def test_each_proof_frees_the_blocks(message: RoomMessage) -> None:
    quarantine, allocator = table(SHM)
    assert quarantine.on_message(message)
    assert not quarantine and allocator.free_count == 4


@pytest.mark.parametrize(
    "message",
    [
        Failed(room="0", reason="gone", code=502, drained=False),
        Announce(room="0", total_tokens=14, row_bytes=4, dtype="float32"),
        Progress(room="0", window=0, sent_tokens=10),
        Progress(room="0", window=1, sent_tokens=13),
        Progress(room="0", window=1, sent_tokens=14, refused="no"),
        Done(room="0", window=2, total_tokens=14),
        Done(room="0", window=1, total_tokens=15),
    ],
    ids=lambda message: type(message).__name__,
)
def test_what_proves_nothing_frees_nothing(message: RoomMessage) -> None:
    quarantine, allocator = table(SHM)
    assert not quarantine.on_message(message)
    assert list(quarantine) == ["0"] and allocator.quarantined_count == 1


def test_a_proof_needs_the_process_session_and_epoch_that_were_offered_the_blocks() -> None:
    quarantine, _ = table(MOONCAKE, epoch=1)  # given epoch 2 after the offer
    assert not quarantine.waits_for(MOONCAKE, "0")
    assert quarantine.waits_for(Peer("e2", "10.0.0.1:17002", "mooncake", False, epoch=1), "0")
    assert not quarantine.waits_for(Peer("e3", "10.0.0.1:17001", "mooncake", False, epoch=1), "0")
    assert not quarantine.waits_for(MOONCAKE, "unknown")


def test_the_end_of_a_process_proves_something_over_shared_memory_alone() -> None:
    quarantine, allocator = table(SHM, MOONCAKE)
    assert not quarantine.writer_gone("e2") and not quarantine.writer_gone("e3")
    assert quarantine.writer_gone("e1")
    assert list(quarantine) == ["1"] and allocator.quarantined_count == 1


def test_a_revocation_frees_what_was_offered_for_that_epoch_or_an_older_one() -> None:
    quarantine, _ = table(MOONCAKE, Peer("e2", "10.0.0.1:17002", "mooncake", False, epoch=3))
    assert not quarantine.epoch_revoked("10.0.0.1:17002", 1) and not quarantine.epoch_revoked("10.0.0.2:17002", 9)
    assert quarantine.epoch_revoked("10.0.0.1:17002", 2)
    assert list(quarantine) == ["1"]


def test_peers_and_the_oldest_doubt_of_a_session_are_known() -> None:
    quarantine, _ = table(SHM, MOONCAKE, MOONCAKE)
    assert quarantine.peers() == {SHM, MOONCAKE}
    assert quarantine.in_doubt_since(MOONCAKE.mooncake_session_id) == 1.0
    assert table(SHM)[0].in_doubt_since(MOONCAKE.mooncake_session_id) is None


def test_an_unanswered_abort_is_repeated_to_a_registered_process_when_due_only() -> None:
    quarantine, _ = table(SHM, MOONCAKE)
    assert quarantine.to_ask_again(ABORT_AGAIN_SECONDS - 0.1, {"e1", "e2"}) == []
    assert quarantine.to_ask_again(ABORT_AGAIN_SECONDS + 1, {"e1"}) == [(SHM, "0")]
    assert quarantine.to_ask_again(ABORT_AGAIN_SECONDS + 1, {"e1", "e2"}) == [(MOONCAKE, "1")]
    assert quarantine.of_process("e1") == [(SHM, "0")]


def test_blocks_are_freed_once() -> None:
    quarantine, allocator = table(SHM)
    assert quarantine.release("0") and not quarantine.release("0")
    assert allocator.free_count == 4
