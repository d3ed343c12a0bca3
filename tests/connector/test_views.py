"""Results that stay in their blocks, and results in memory that is used again: nobody's rows change under him.

Both endpoints run in this process, over shared memory and real sockets.
"""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from sglang_mm_conn.connector.encoder.endpoint import EncoderEndpoint
from sglang_mm_conn.connector.language.endpoint import LanguageEndpoint
from sglang_mm_conn.connector.language.results import Copied
from sglang_mm_conn.connector.metadata import encode_metadata
from sglang_mm_conn.control.bootstrap_server import StandaloneBootstrap
from sglang_mm_conn.core.actions import CopyOut
from sglang_mm_conn.core.rooms import new_id, new_room_base
from sglang_mm_conn.core.settings import Settings
from sglang_mm_conn.core.states import Poll
from sglang_mm_conn.datapath.factory import encoder_data_paths
from sglang_mm_conn.memory.copying import HOLD_GIL_BELOW
from sglang_mm_conn.memory.results import Contents, Result, SharedResult
from tests.connector.processes import wait_for

HOST = "127.0.0.1"
WIDTH = 1024
BLOCK_ROWS = 64  # blocks of 256 KiB
BLOCKS = 16
LARGE = 100  # rows: 400 KiB, two blocks


class Ends:
    """An encoder and a language rank with a pool of BLOCKS blocks."""

    def __init__(self, make_result: Callable[[str, Contents], Result] | None = None, **settings: Any) -> None:
        self.settings = Settings(blocks=BLOCKS, block_size=BLOCK_ROWS, data_path="shm", checksum=True, **settings)
        self.encoder = EncoderEndpoint(
            self.settings, host=HOST, dtype="float32", widest_row_bytes=WIDTH * 4, send_timeout=60.0,
            data_paths=encoder_data_paths(self.settings, HOST),
        )  # fmt: skip
        self.bootstrap = StandaloneBootstrap(HOST, 0, lambda: self.encoder.bootstrap_info)
        extra: dict[str, Any] = {} if make_result is None else {"make_result": make_result}
        self.language = LanguageEndpoint(
            self.settings, server=new_id(), host=HOST, dtype="float32", widest_row_bytes=WIDTH * 4,
            **extra,
        )  # fmt: skip

    def close(self) -> None:
        self.language.close()
        self.encoder.close()
        self.bootstrap.close()

    def start(self, number: int, rows: int) -> str:
        room = new_room_base(self.language.server)
        self.language.expect(room, self.bootstrap.url, 60.0, str(number))
        self.encoder.announce(room, rows, WIDTH * 4, "float32", lambda ended: None)
        self.encoder.add_transfer_request(room, torch.full((rows, WIDTH), float(number)), encode_metadata({}, 1 << 20))
        return room

    def finish(self, room: str) -> torch.Tensor:
        wait_for(lambda: self.language.poll(room) in (Poll.Success, Poll.Failed), f"the end of {room}")
        assert self.language.poll(room) is Poll.Success, self.language.outcome(room)
        taken = self.language.take(room)[0]
        self.language.forget(room)
        return taken

    def transfer(self, number: int, rows: int = LARGE) -> torch.Tensor:
        return self.finish(self.start(number, rows))

    def in_pool(self, tensor: torch.Tensor) -> bool:
        first = self.language.pool.regions[0].data_ptr()
        return first <= tensor.data_ptr() < first + BLOCKS * BLOCK_ROWS * WIDTH * 4

    def free(self) -> int:
        with self.language._lock:
            self.language.core.check_integrity()
            return self.language.core.allocator.free_count


@pytest.fixture
def ends() -> Iterator[Ends]:
    made = Ends()
    yield made
    made.close()


def test_large_result_is_a_view_of_its_blocks_which_the_last_tensor_frees(ends: Ends) -> None:
    rows = ends.transfer(1)
    assert ends.in_pool(rows) and ends.free() == BLOCKS - 2
    part = rows[10:20]
    del rows
    gc.collect()
    others = [ends.transfer(number) for number in (2, 3, 4)]
    assert bool((part == 1).all()) and [other[0, 0].item() for other in others] == [2, 3, 4]
    assert ends.free() == BLOCKS - 8
    del part, others
    gc.collect()
    wait_for(lambda: ends.free() == BLOCKS, "all blocks are free")


def test_a_small_result_is_copied_out(ends: Ends) -> None:
    rows = ends.transfer(1, HOLD_GIL_BELOW // (WIDTH * 4))
    assert not ends.in_pool(rows) and ends.free() == BLOCKS


def test_views_hold_their_share_of_the_pool_and_what_is_beyond_is_copied_out(ends: Ends) -> None:
    kept = [ends.transfer(number) for number in range(10)]
    assert [ends.in_pool(rows) for rows in kept] == [True] * 4 + [False] * 6  # 50 % of 16 blocks, by two
    assert [rows[-1, -1].item() for rows in kept] == list(range(10))
    whole = ends.transfer(11, BLOCKS * BLOCK_ROWS * 3)  # it passes through what views leave
    assert bool((whole == 11).all()) and not ends.in_pool(whole)


def test_no_view_is_made_with_a_share_of_0_nor_of_what_other_ranks_read() -> None:
    for ends in (Ends(view_percent=0), Ends(make_result=SharedResult)):
        rows = ends.transfer(1)
        assert not ends.in_pool(rows) and ends.free() == BLOCKS and bool((rows == 1).all())
        del rows
        ends.close()


def test_memory_of_results_is_used_again_but_never_while_somebody_has_it() -> None:
    ends = Ends(view_percent=0)
    first = ends.transfer(1)
    at = first.data_ptr()
    second = ends.transfer(2)
    assert second.data_ptr() != at and bool((first == 1).all())
    del first
    third = ends.transfer(3)
    assert third.data_ptr() == at and bool((second == 2).all()) and bool((third == 3).all())
    ends.close()


def test_rows_that_a_request_changes_are_its_own(ends: Ends) -> None:
    for number in range(2 * BLOCKS):
        rows = ends.transfer(number)
        assert bool((rows == number).all())
        rows.zero_()


def test_view_of_a_room_given_up_before_the_core_knows_it_gives_its_blocks_back(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its release must not come before the view."""
    results, control = ends.language._results, ends.language._control
    monkeypatch.setattr(results, "_inline_limit_bytes", 0)  # on a copier, so that the control thread can overtake it
    copy_out, told = results.copy_out, threading.Event()

    def given_up(copy: CopyOut, *args: Any) -> Copied:
        copied = copy_out(copy, *args)
        assert copied.view
        ends.language.abort(copy.room, "given up")
        gc.collect()
        control.call(told.set)
        assert told.wait(60)  # so is whatever the control thread was left to do before
        return copied

    monkeypatch.setattr(results, "copy_out", given_up)
    room = ends.start(1, LARGE)
    wait_for(lambda: told.is_set() and ends.free() == BLOCKS, "all blocks are free")
    assert ends.language.poll(room) is Poll.Failed and len(results) == 0


def test_a_view_outlives_its_endpoint() -> None:
    ends = Ends()
    rows = ends.transfer(7)
    ends.close()
    assert bool((rows == 7).all())


def test_many_requests_that_keep_their_rows_for_a_while_see_nobody_else_s(
    ends: Ends, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    wrong: list[str] = []

    def work(first: int) -> None:
        kept: list[tuple[int, torch.Tensor]] = []
        for number in range(first, first + 25):
            rows = (10, LARGE, 300, 40, 1500)[number % 5]  # small, a view, a larger one, small, larger than the pool
            kept.append((number, ends.transfer(number, rows)))
            while len(kept) > number % 4:
                was, tensor = kept.pop(0)
                if not bool((tensor == was).all()):
                    wrong.append(f"{was} holds {tensor.unique().tolist()}")
                del tensor

    threads = [threading.Thread(target=work, args=(100 * number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gc.collect()
    assert not wrong and not caplog.records
    wait_for(lambda: ends.free() == BLOCKS, "all blocks are free")
