"""Owns the accounts of a language rank's pool: who has each block, for its log and to prove that none is lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from sglang_mm_conn.core.blocks import BlockAllocator
from sglang_mm_conn.core.errors import ConnError
from sglang_mm_conn.core.language.quarantine import QuarantineTable
from sglang_mm_conn.core.language.receiver_room import ReceiverRoom
from sglang_mm_conn.core.language.unclaimed import UnclaimedRooms
from sglang_mm_conn.core.language.views import Views


def report(
    allocator: BlockAllocator, rooms: Mapping[str, ReceiverRoom], views: Views, unclaimed: UnclaimedRooms
) -> dict[str, Any]:
    """The number of blocks free, held, in views and in quarantine; of rooms in each state; of unclaimed rooms."""
    return {
        "blocks": allocator.blocks,
        "free": allocator.free_count,
        "held": allocator.held_count,
        "views": views.blocks,
        "quarantined": allocator.quarantined_count,
        "rooms": dict(Counter(entry.state.value for entry in rooms.values())),
        "unclaimed": len(unclaimed),
    }


def check_integrity(
    allocator: BlockAllocator, rooms: Mapping[str, ReceiverRoom], views: Views, quarantine: QuarantineTable
) -> None:
    """Raise ConnError unless each block is free, held by an open window or a view, or listed in quarantine."""
    allocator.check_integrity()
    granted = sum(len(entry.blocks) for entry in rooms.values() if entry.view)
    views.check_integrity(granted)
    held = views.blocks + sum(len(entry.blocks) for entry in rooms.values())
    quarantined = sum(len(one.blocks) for one in quarantine.values())
    if held != allocator.held_count or quarantined != allocator.quarantined_count:
        raise ConnError(
            f"rooms and views hold {held} blocks, the allocator counts {allocator.held_count}; "
            f"the quarantine lists {quarantined}, the allocator counts {allocator.quarantined_count}"
        )
