"""The accounts of blocks: every block is free or has an owner, and a lost block is noticed."""

from __future__ import annotations

import pytest

from sglang_mm_conn.core.blocks import BlockAllocator
from sglang_mm_conn.core.errors import ConnError
from sglang_mm_conn.core.language.accounts import check_integrity, report
from sglang_mm_conn.core.language.quarantine import QuarantineTable
from sglang_mm_conn.core.language.receiver_room import Peer, ReceiverRoom
from sglang_mm_conn.core.language.unclaimed import UnclaimedRooms
from sglang_mm_conn.core.language.views import Views


class Accounts:
    """Room "a" has offered two blocks, "b" is a view of one, "c" has left one in quarantine; four are free."""

    def __init__(self) -> None:
        self.allocator = BlockAllocator(8)
        self.views = Views(self.allocator, most_blocks=8, least_bytes=1)
        self.quarantine = QuarantineTable(self.allocator)
        self.rooms = {name: self._room(name, count) for name, count in (("a", 2), ("b", 1), ("c", 1))}
        viewed, failed = self.rooms["b"], self.rooms["c"]
        viewed.view = self.views.grant(viewed)
        self.views.put(viewed)
        self.quarantine.put(failed, 0.0)
        viewed.blocks, failed.blocks = [], []

    def _room(self, name: str, count: int) -> ReceiverRoom:
        peer = Peer("e1", "10.0.0.1:17001", "shm", True)
        entry = ReceiverRoom(name, "http://encoder", 60.0, 0.0, 1, peer=peer, window=0, total_tokens=10, row_bytes=4)
        entry.blocks = self.allocator.allocate((name, 0), count)
        return entry

    def check(self) -> None:
        check_integrity(self.allocator, self.rooms, self.views, self.quarantine)


def test_the_report_names_who_has_the_blocks() -> None:
    accounts = Accounts()
    accounts.check()
    assert report(accounts.allocator, accounts.rooms, accounts.views, UnclaimedRooms(30.0)) == {
        "blocks": 8, "free": 4, "held": 3, "views": 1, "quarantined": 1, "rooms": {"expected": 3}, "unclaimed": 0,
    }  # fmt: skip


def test_a_block_that_nobody_has_on_record_is_noticed() -> None:
    accounts = Accounts()
    accounts.rooms["a"].blocks.pop()
    with pytest.raises(ConnError, match="rooms and views hold 2 blocks, the allocator counts 3"):
        accounts.check()


def test_a_quarantine_without_a_record_is_noticed() -> None:
    accounts = Accounts()
    accounts.allocator.quarantine(("a", 0), accounts.rooms["a"].blocks)
    accounts.rooms["a"].blocks = []
    with pytest.raises(ConnError, match="quarantine lists 1, the allocator counts 3"):
        accounts.check()
