"""The benchmark notices wrong bytes."""

import torch

from sglang_mm_conn.bench.payload import Payload, PayloadFile
from sglang_mm_conn.bench.transports.base import Room

NBYTES = 64 << 10
ROOM = Room("room", 8, 4096)


def payload() -> Payload:
    file = PayloadFile(2 * NBYTES)
    opened = Payload(file.path, NBYTES, 2)
    file.close()
    return opened


def test_the_right_bytes_are_no_mistake() -> None:
    sent = payload()
    sent.mark(1, 7)
    got = sent.tensor(1, ROOM).clone()
    assert sent.mistake(1, 7, ROOM, got) == ""
    assert sent.mark_mistake(7, ROOM, got) == ""


def test_one_wrong_byte_is_noticed_and_named() -> None:
    sent = payload()
    sent.mark(0, 7)
    got = sent.tensor(0, ROOM).clone()
    got.view(-1).view(torch.uint8)[40_001] ^= 1
    assert "the first at byte 40000" in sent.mistake(0, 7, ROOM, got)


def test_the_bytes_of_another_room_are_noticed() -> None:
    sent = payload()
    sent.mark(0, 6)
    stale = sent.tensor(0, ROOM).clone()
    assert "16 of 8192 words" in sent.mistake(0, 7, ROOM, stale)
    assert "is room 6's, not room 7's" in sent.mark_mistake(7, ROOM, stale)


def test_one_stale_page_is_noticed_by_its_mark_alone() -> None:
    sent = payload()
    sent.mark(0, 6)
    stale = sent.tensor(0, ROOM).clone()
    sent.mark(0, 7)
    got = sent.tensor(0, ROOM).clone()
    got.view(-1)[4096:6144] = stale.view(-1)[4096:6144]
    assert sent.mark_mistake(7, ROOM, got) == "the page at byte 8192 is room 6's, not room 7's"


def test_a_tensor_that_is_too_short_is_noticed() -> None:
    sent = payload()
    assert "4096 bytes arrived" in sent.mistake(0, 1, ROOM, torch.zeros(4096, dtype=torch.uint8))
    assert "4096 bytes arrived" in sent.mark_mistake(1, ROOM, torch.zeros(4096, dtype=torch.uint8))
