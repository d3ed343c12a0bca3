"""Offers: first come, first served, as many blocks as are free, and never a later deadline."""

from __future__ import annotations

import pytest

from sglang_mm_conn.core.blocks import BlockAllocator
from sglang_mm_conn.core.errors import ConnError
from sglang_mm_conn.core.language import offers
from sglang_mm_conn.core.language.offers import Offers, offer_message
from sglang_mm_conn.core.language.receiver_room import Peer, ReceiverRoom
from sglang_mm_conn.core.layout import Geometry
from sglang_mm_conn.core.messages import Announce, Init, Resume
from sglang_mm_conn.core.states import ReceiverState

GEOMETRY = Geometry(block_bytes=40, blocks_per_region=8, regions=1)  # ten rows of four bytes each


def make(first_offer: int | None = None) -> tuple[Offers, BlockAllocator]:
    allocator = BlockAllocator(8)
    return Offers(allocator, GEOMETRY, first_offer=first_offer, max_embedding_bytes=4000), allocator


def room(name: str, tokens: int) -> ReceiverRoom:
    entry = ReceiverRoom(name, "http://encoder", 60.0, 0.0, 1, peer=Peer("e1", "10.0.0.1:17001", "shm", True))
    entry.machine.transition_to(ReceiverState.QUEUED)
    entry.total_tokens, entry.row_bytes = tokens, 4
    return entry


def test_the_head_takes_what_is_free_and_the_next_waits() -> None:
    queue, allocator = make()
    first, second = room("a", 100), room("b", 10)
    queue.waiting.extend([first, second])
    assert queue.take() == (first, list(range(8)), 80)
    assert queue.take() is None and queue.anyone_waits()
    allocator.release(("a", 0), [3])
    assert queue.take() == (second, [3], 10)
    assert queue.take() is None and not queue.anyone_waits()


def test_a_room_that_ended_while_it_waited_gets_nothing_and_is_forgotten() -> None:
    queue, _ = make()
    ended, waiting = room("a", 10), room("b", 10)
    queue.waiting.append(ended)
    ended.machine.transition_to(ReceiverState.FAILED)
    assert not queue.anyone_waits()
    queue.waiting.append(waiting)
    queue.sweep()
    assert list(queue.waiting) == [waiting]
    queue.waiting.appendleft(ended)
    assert queue.take() == (waiting, [0], 10)


def test_only_the_first_window_is_kept_small() -> None:
    queue, _ = make(first_offer=15)
    entry = room("a", 60)
    queue.waiting.append(entry)
    assert queue.take() == (entry, [0, 1], 15)
    entry.window, entry.sent_tokens = 0, 15
    queue.waiting.append(entry)
    assert queue.take() == (entry, [2, 3, 4, 5, 6], 45)


def test_one_offer_stays_far_below_the_limit_of_a_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offers, "MAX_OFFER_BLOCKS", 3)
    queue, _ = make()
    entry = room("a", 60)
    queue.waiting.append(entry)
    assert queue.take() == (entry, [0, 1, 2], 30)


def test_blocks_that_are_not_the_windows_and_rows_that_do_not_fit_are_no_offer() -> None:
    queue, allocator = make()
    entry = room("a", 15)
    blocks = allocator.allocate(("a", 0), 2)
    queue.check(entry, blocks, 0, 15)
    for wrong, sent, allocated in ((blocks, 1, 5), ([5], 0, 5), (blocks, 0, 0), (blocks, 0, 16), (blocks[:1], 0, 11)):
        with pytest.raises(ConnError):
            queue.check(entry, wrong, sent, allocated)


def test_an_embedding_that_no_offer_can_hold_is_refused_with_both_figures() -> None:
    queue, _ = make()
    assert queue.too_large(Announce(room="a", total_tokens=1000, row_bytes=4, dtype="float32")) is None
    wide = queue.too_large(Announce(room="a", total_tokens=1, row_bytes=41, dtype="float32"))
    assert wide is not None and wide.code == 500 and "41" in wide.reason and "40" in wide.reason
    many = queue.too_large(Announce(room="a", total_tokens=1001, row_bytes=4, dtype="float32"))
    assert many is not None and many.code == 413 and "1001" in many.reason and "4000" in many.reason


@pytest.mark.parametrize(("left", "told"), [(60.0, 59.0), (5.0, 4.5), (0.0, 0.0), (-3.0, 0.0)])
def test_the_encoder_is_told_a_deadline_that_is_not_later_than_ours(left: float, told: float) -> None:
    entry = room("a", 15)
    entry.window = 0
    init = offer_message(entry, 60.0 - left).message
    assert isinstance(init, Init) and init.deadline == pytest.approx(told)
    entry.window = 1
    resume = offer_message(entry, 60.0 - left).message
    assert isinstance(resume, Resume) and resume.deadline == pytest.approx(told) and resume.window == 1
