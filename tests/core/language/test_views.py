"""Views: which embeddings may stay in their blocks, and the limit of all views together."""

from __future__ import annotations

import pytest

from sglang_mm_conn.core.blocks import BlockAllocator
from sglang_mm_conn.core.errors import ConnError
from sglang_mm_conn.core.language.receiver_room import ReceiverRoom
from sglang_mm_conn.core.language.views import Views


def room(name: str, blocks: list[int], tokens: int = 100) -> ReceiverRoom:
    entry = ReceiverRoom(name, "http://encoder", 60.0, 0.0, 1, window=0, blocks=blocks)
    entry.total_tokens, entry.row_bytes = tokens, 4
    return entry


def test_only_neighbouring_blocks_and_large_embeddings_may_stay() -> None:
    views = Views(BlockAllocator(8), most_blocks=8, least_bytes=400)
    assert not views.grant(room("a", [0, 2]))
    assert not views.grant(room("a", [1, 0]))
    assert not views.grant(room("a", [0, 1], tokens=99))
    assert views.grant(room("a", [0, 1]))


def test_views_and_copies_that_may_make_one_share_the_budget_until_they_are_over() -> None:
    allocator = BlockAllocator(8)
    views = Views(allocator, most_blocks=4, least_bytes=1)
    first = room("a", allocator.allocate(("a", 0), 2))
    first.view = views.grant(first)
    second = room("b", allocator.allocate(("b", 0), 2))
    second.view = views.grant(second)
    assert first.view and second.view and not views.grant(room("c", [4]))
    views.renounce(second.blocks)
    views.put(first)
    assert "a" in views and "b" not in views and views.blocks == 2
    views.check_integrity(granted=0)
    assert not views.grant(room("c", [4, 5, 6]))
    views.release("a")
    assert views.grant(room("c", [4, 5, 6])) and allocator.held_count == 2


def test_nobody_makes_a_view_that_was_not_granted() -> None:
    views = Views(BlockAllocator(8), most_blocks=8, least_bytes=1)
    with pytest.raises(ConnError):
        views.put(room("a", [0]))


def test_a_wrong_count_is_noticed() -> None:
    views = Views(BlockAllocator(8), most_blocks=8, least_bytes=1)
    assert views.grant(room("a", [0]))
    views.check_integrity(granted=1)
    with pytest.raises(ConnError):
        views.check_integrity(granted=0)
