"""The Mooncake path with an engine of our own: batches, staging, doubt."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Iterable

import pytest
import torch

from sglang_mm_conn.core.errors import DataPathError
from sglang_mm_conn.core.layout import Extent, Geometry, window_extents
from sglang_mm_conn.datapath.mooncake.staging import Staging
from sglang_mm_conn.datapath.mooncake.writer import (
    BATCHES,
    MAX_SLICES,
    SLICE_BYTES,
)
from sglang_mm_conn.memory.device import Device, Slice
from tests.datapath.fake_engine import REFUSED, REFUSED_WITH_A_CODE, SESSION, SLOTS, WRITERS, Bed


def test_opening_a_link_writes_nothing_so_that_no_warm_up_lands_in_a_live_block() -> None:
    bed = Bed(Geometry(64, 50, 2))
    _, engine, _ = bed.link()
    assert not engine.batches and not any(bool(region.any()) for region in bed.regions)


@pytest.mark.parametrize(("staging_bytes", "nbytes"), [(4096, 700), (4096, 6000), (400, 6400), (44, 333), (8, 50)])
def test_the_right_bytes_land_whatever_the_staging_holds(staging_bytes: int, nbytes: int) -> None:
    bed = Bed(Geometry(64, 50, 2), staging_bytes)
    link, engine, staging = bed.link()
    blocks = [99, 3, 4, 5, 49, 50, 51, *range(60, 99), *range(6, 49), 0, 1, 2, *range(52, 60)]
    source = torch.randint(0, 256, (nbytes,), dtype=torch.uint8)
    link.write(source, window_extents(bed.geometry, blocks, nbytes))
    assert torch.equal(bed.received(blocks, nbytes), source)
    assert all(sum(length for *_, length in batch) <= bed.path.slot_bytes for batch in engine.batches)
    assert set(engine.sessions) == {SESSION}
    assert len(staging._free) == SLOTS
    assert engine.under_way == 0


def test_a_batch_has_no_more_pieces_than_the_link_bears() -> None:
    bed = Bed(Geometry(2, 6000, 1), staging_bytes=1 << 20)
    link, engine, _ = bed.link()
    blocks = list(range(0, 6000, 2))  # no two are neighbours
    source = torch.randint(0, 256, (6000,), dtype=torch.uint8)
    link.write(source, window_extents(bed.geometry, blocks, 6000))
    assert [len(batch) for batch in engine.batches] == [*[MAX_SLICES] * 5, 3000 - 5 * MAX_SLICES]
    assert engine.most_pieces == BATCHES * MAX_SLICES == 1024
    assert torch.equal(bed.received(blocks, 6000), source)


def test_a_large_run_travels_in_pieces_side_by_side() -> None:
    nbytes = 3 * SLICE_BYTES + 5
    bed = Bed(Geometry(nbytes, 2, 1), staging_bytes=SLOTS * nbytes)
    link, engine, _ = bed.link()
    source = torch.randint(0, 256, (nbytes,), dtype=torch.uint8)
    link.write(source, window_extents(bed.geometry, [1], nbytes))
    assert [[length for *_, length in batch] for batch in engine.batches] == [[SLICE_BYTES] * 3 + [5]]
    assert torch.equal(bed.received([1], nbytes), source)


def test_a_batch_ends_where_the_staging_slot_is_full() -> None:
    bed = Bed(Geometry(1000, 10, 1), staging_bytes=SLOTS * 300)
    link, engine, _ = bed.link()
    link.write(torch.ones(1000, dtype=torch.uint8), window_extents(bed.geometry, [4], 1000))
    assert [[length for *_, length in batch] for batch in engine.batches] == [[300], [300], [300], [100]]


@pytest.mark.parametrize("failure", [-1, 7, REFUSED, REFUSED_WITH_A_CODE, RuntimeError("engine")])
def test_after_a_failed_call_the_matter_is_in_doubt_and_the_engine_is_used_no_more(
    failure: int | Exception,
) -> None:
    bed = Bed(Geometry(64, 4, 1))
    link, engine, staging = bed.link()
    engine.codes = [failure]
    extents = window_extents(bed.geometry, [0], 64)
    with pytest.raises((DataPathError, RuntimeError)) as caught:
        link.write(torch.ones(64, dtype=torch.uint8), extents)
    if isinstance(failure, int):
        assert isinstance(caught.value, DataPathError) and caught.value.in_doubt
    assert len(staging._free) == SLOTS - 1
    for _ in range(9):
        link.write(torch.ones(64, dtype=torch.uint8), extents)
    # The next write to that target has an engine of its own; where it goes well, the shared one serves it again.
    assert [len(one.batches) for one in bed.engines] == [1, 1, 8]
    assert len(bed.path._engines) == 1, "engines that are given up are not collected"


def test_a_target_that_fails_again_and_again_does_not_cost_the_others_their_engine() -> None:
    bed = Bed(Geometry(64, 4, 1))
    link, engine, _ = bed.link()
    other = bed.open("2", "10.0.0.2:2")
    extents, source = window_extents(bed.geometry, [0], 64), torch.ones(64, dtype=torch.uint8)
    engine.codes = [-1]
    with pytest.raises(DataPathError):
        link.write(source, extents)
    other.write(source, extents)
    shared = bed.engines[-1]
    bed.codes = [-1]  # of every engine that is made from now on
    for _ in range(3):
        with pytest.raises(DataPathError):
            link.write(source, extents)
        other.write(source, extents)
    assert len(shared.batches) == 4 and set(shared.sessions) == {"10.0.0.2:2"}
    link.close()
    assert not bed.path._failing_targets


def test_a_target_is_not_trusted_again_for_the_batch_behind_the_one_that_failed() -> None:
    bed = Bed(Geometry(1000, 4, 1), staging_bytes=SLOTS * 300)
    link, engine, _ = bed.link()
    extents, source = window_extents(bed.geometry, [0], 1000), torch.ones(1000, dtype=torch.uint8)
    bed.codes = [5, 0]
    engine.codes = [5]
    for _ in range(2):  # through the shared engine, then through one of its own
        with pytest.raises(DataPathError):
            link.write(source, extents)
    assert len(bed.engines[1].batches) == 2 and bed.path._failing_targets == {SESSION}


def test_a_failed_engine_is_destroyed_only_when_its_last_write_has_returned() -> None:
    bed = Bed(Geometry(64, 4, 1))
    link, engine, _ = bed.link()
    other = bed.open("2", "10.0.0.2:2")
    gone = weakref.ref(engine)
    bed.engines.clear()
    extents = window_extents(bed.geometry, [0], 64)
    source = torch.ones(64, dtype=torch.uint8)

    def fail_meanwhile() -> None:
        alive = gone()
        assert alive is not None
        alive.codes = [-1]
        with pytest.raises(DataPathError):
            link.write(source, extents)
        assert len(bed.path._engines) == 1, "a write is still under way"

    engine.during = fail_meanwhile
    other.write(source, extents)
    assert not bed.path._engines, "nobody uses it any more"
    del engine
    deadline = time.monotonic() + 30
    while gone() is not None:
        gc.collect()
        assert time.monotonic() < deadline, "the engine is still there"


def test_write_fails_at_once_and_without_doubt_when_failed_writes_hold_all_slots() -> None:
    staging = Staging(4, 100)
    for _ in range(4):
        staging.take()
    with pytest.raises(DataPathError) as caught:
        staging.take()
    assert not caught.value.in_doubt


def test_as_many_writers_as_there_are_workers_find_a_slot_each() -> None:
    """Writes to destinations that hang do not keep a healthy one waiting for staging memory."""
    staging = Staging(8, 64)
    slots = [staging.take() for _ in range(8)]
    assert len({slot.data_ptr() for slot in slots}) == 8
    staging.give_back(slots[3])
    assert staging.take() is slots[3]


# -- two batches on their way --------------------------------------------------------------------------------------


def test_the_next_batch_is_on_its_way_before_the_last_one_is_waited_for() -> None:
    bed = Bed(Geometry(1000, 10, 1), staging_bytes=SLOTS * 300)
    link, engine, _ = bed.link()
    link.write(torch.ones(1000, dtype=torch.uint8), window_extents(bed.geometry, [4], 1000))
    assert engine.events == ["begin 1", "begin 2", "end 1", "begin 3", "end 2", "begin 4", "end 3", "end 4"]


@pytest.mark.parametrize(
    ("codes", "events"),
    [
        ([5], ["begin 1", "begin 2", "end 1", "end 2"]),
        ([0, 5], ["begin 1", "begin 2", "end 1", "begin 3", "end 2", "end 3"]),
        ([0, 0, 5], ["begin 1", "begin 2", "end 1", "begin 3", "end 2", "begin 4", "end 3", "end 4"]),
        ([0, 0, 0, 5], ["begin 1", "begin 2", "end 1", "begin 3", "end 2", "begin 4", "end 3", "end 4"]),
        ([5, -1], ["begin 1", "begin 2", "end 1", "end 2"]),
    ],
)
def test_a_failed_batch_stops_the_window_when_the_one_behind_it_has_ended_too(
    codes: list[int | Exception], events: list[str]
) -> None:
    bed = Bed(Geometry(1000, 10, 1), staging_bytes=SLOTS * 300)
    link, engine, staging = bed.link()
    engine.codes = list(codes)
    with pytest.raises(DataPathError) as caught:
        link.write(torch.ones(1000, dtype=torch.uint8), window_extents(bed.geometry, [4], 1000))
    assert caught.value.in_doubt
    assert engine.events == events
    assert len(staging._free) == SLOTS - sum(code != 0 for code in codes), "slots of failed batches do not come back"
    # The engine of its own that the target has now bears a window of many batches too.
    source = torch.randint(0, 256, (1000,), dtype=torch.uint8)
    link.write(source, window_extents(bed.geometry, [5], 1000))
    assert torch.equal(bed.received([5], 1000), source)


class FailingCopies(Device):
    """The second copy fails."""

    def __init__(self) -> None:
        self.copies = 0

    def copy(self, pieces: Iterable[Slice]) -> None:
        self.copies += 1
        if self.copies == 2:
            raise MemoryError("copy")
        super().copy(pieces)


@pytest.mark.parametrize("second", ["copy", REFUSED, RuntimeError("engine")])
@pytest.mark.parametrize("first", [0, -1])
def test_a_batch_on_its_way_ends_before_the_failure_of_the_next_one_is_told(
    first: int, second: str | int | Exception
) -> None:
    device = FailingCopies() if second == "copy" else None
    bed = Bed(Geometry(1000, 10, 1), SLOTS * 300, device)
    link, engine, staging = bed.link()
    engine.codes = [first] if isinstance(second, str) else [first, second]
    engine.during = lambda: seen.append(list(bed.path._engines))
    seen: list[list[object]] = []
    with pytest.raises((DataPathError, RuntimeError, MemoryError)) as caught:
        link.write(torch.ones(1000, dtype=torch.uint8), window_extents(bed.geometry, [4], 1000))
    assert engine.under_way == 0 and engine.events[-1] == "end 1"
    assert len(seen[0]) == 1 and not bed.path._engines, "given up, but not before its last batch had ended"
    assert len(staging._free) == SLOTS - (1 if first == 0 else 2)
    if first:
        assert isinstance(caught.value, DataPathError) and caught.value.in_doubt


def test_a_failure_that_leaves_nothing_in_doubt_does_not_hide_one_that_does() -> None:
    """The second batch finds no slot; the first one, on its way meanwhile, fails."""
    bed = Bed(Geometry(1000, 10, 1), SLOTS * 300)
    link, engine, staging = bed.link()
    while len(staging._free) > 1:
        staging.take()
    engine.codes = [-1]
    with pytest.raises(DataPathError) as caught:
        link.write(torch.ones(1000, dtype=torch.uint8), window_extents(bed.geometry, [4], 1000))
    assert caught.value.in_doubt and engine.events == ["begin 1", "end 1"]


def test_a_window_goes_on_through_another_engine_when_a_bystander_has_lost_the_first() -> None:
    bed = Bed(Geometry(1000, 10, 1), SLOTS * 300)
    link, engine, _ = bed.link()
    other = bed.open("2", "10.0.0.2:2")
    source = torch.randint(0, 256, (1000,), dtype=torch.uint8)

    def fail_meanwhile() -> None:
        engine.codes = [-1]
        with pytest.raises(DataPathError):
            other.write(source[:10], [Extent(0, 9000, 10, 0)])

    engine.during = fail_meanwhile
    link.write(source, window_extents(bed.geometry, [4], 1000))
    assert torch.equal(bed.received([4], 1000), source)
    assert [one.under_way for one in bed.engines] == [0, 0]
    assert [len(one.batches) for one in bed.engines] == [3, 2], "two of the window's and the one that failed; the rest"


def test_many_writers_to_one_peer_share_what_the_link_bears_and_none_waits_for_ever() -> None:
    blocks = 1500
    bed = Bed(Geometry(2, 2 * WRITERS * blocks, 1), staging_bytes=1 << 20)
    link, engine, staging = bed.link()
    sources = [torch.randint(0, 256, (blocks,), dtype=torch.uint8) for _ in range(WRITERS)]
    places = [list(range(2 * blocks * n, 2 * blocks * (n + 1), 2)) for n in range(WRITERS)]  # no two are neighbours

    def work(number: int) -> None:
        for _ in range(5):
            link.write(sources[number], window_extents(bed.geometry, places[number], blocks))

    threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(WRITERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert engine.most_pieces <= 1024 and engine.under_way == 0
    assert len(staging._free) == SLOTS
    for place, source in zip(places, sources, strict=True):
        assert torch.equal(bed.received(place, blocks), source)
