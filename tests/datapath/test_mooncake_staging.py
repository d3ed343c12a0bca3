"""The Mooncake path with an engine of our own: batches, staging, doubt, and peers that come back."""

from __future__ import annotations

import ctypes
import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterable

import pytest
import torch

from sglang_mm_conn.core.errors import DataPathError, DataPathUnavailable, MemoryUnavailable
from sglang_mm_conn.core.layout import Extent, Geometry, window_extents
from sglang_mm_conn.core.messages import MooncakeMemory, ShmMemory
from sglang_mm_conn.datapath.mooncake import engine as engines
from sglang_mm_conn.datapath.mooncake.semaphore import FairSemaphore
from sglang_mm_conn.datapath.mooncake.staging import Staging
from sglang_mm_conn.datapath.mooncake.writer import (
    BATCHES,
    MAX_PIECES,
    PIECE_BYTES,
    MooncakeLink,
    MooncakePath,
)
from sglang_mm_conn.memory.device import Device, Piece
from tests.memory.asynchronous import AsynchronousDevice, CarelessDevice

SESSION = "10.0.0.1:17001"
WRITERS = 4
SLOTS = WRITERS * BATCHES
# What the engine says in place of a batch's number, by what a test asks for.
REFUSED, REFUSED_WITH_A_CODE = 1 << 20, 1 << 21
REFUSALS = {REFUSED: 0, REFUSED_WITH_A_CODE: (1 << 64) - 101}


class FakeEngine:
    """Does what the real one would, in this process, as late as it may: it reads the staging memory when it is asked
    for the status of a batch. ``codes`` are the statuses of the next batches; an exception is raised at their
    beginning, one of ``REFUSALS`` is a batch that gets no number."""

    def __init__(self) -> None:
        self.registered: list[tuple[int, int]] = []
        self.batches: list[list[tuple[int, int, int]]] = []
        self.sessions: list[str] = []
        self.codes: list[int | Exception] = []
        self.register_code = 0
        self.during: Callable[[], object] | None = None  # called once, while a batch is waited for
        self.events: list[str] = []
        self.most_pieces = 0
        self._under_way: dict[int, int] = {}  # code by number, which counts from 1
        self._lock = threading.Lock()

    def register_memory(self, address: int, length: int) -> int:
        self.registered.append((address, length))
        return self.register_code

    def batch_transfer_async_write(
        self, session: str, sources: list[int], targets: list[int], lengths: list[int]
    ) -> int:
        with self._lock:
            self.sessions.append(session)
            self.batches.append(list(zip(sources, targets, lengths, strict=True)))
            number = len(self.batches)
            self.events.append(f"begin {number}")
            code = self.codes.pop(0) if self.codes else 0
            if isinstance(code, Exception):
                raise code
            if code in REFUSALS:
                return REFUSALS[code]
            self._under_way[number] = code
            self.most_pieces = max(self.most_pieces, sum(len(self.batches[one - 1]) for one in self._under_way))
            return number

    def get_batch_transfer_status(self, numbers: list[int]) -> int:
        [number] = numbers
        during, self.during = self.during, None
        if during is not None:
            during()
        time.sleep(0)
        with self._lock:
            code = self._under_way.pop(number)  # KeyError where the real one would crash
            if code == 0:
                for source, target, length in self.batches[number - 1]:
                    assert any(start <= source and source + length <= start + size for start, size in self.registered)
                    ctypes.memmove(target, source, length)
            self.events.append(f"end {number}")
            return code

    @property
    def under_way(self) -> int:
        return len(self._under_way)


class Bed:
    """A path, its engines, and memory to write into."""

    def __init__(
        self, geometry: Geometry, staging_bytes: int = 4096, device: Device | None = None, memory_device: str = "cpu"
    ) -> None:
        self.geometry = geometry
        self.engines: list[FakeEngine] = []
        self.codes: list[int | Exception] = []
        self.path = MooncakePath(self.make, staging_bytes, WRITERS, device, memory_device)
        self.regions = [torch.zeros(geometry.region_bytes, dtype=torch.uint8) for _ in range(geometry.regions)]

    def make(self) -> FakeEngine:
        self.engines.append(FakeEngine())
        self.engines[-1].codes = list(self.codes)
        return self.engines[-1]

    def open(self, incarnation: str = "1", session: str = SESSION) -> MooncakeLink:
        memory = MooncakeMemory(target=session, addresses=[region.data_ptr() for region in self.regions])
        return self.path.open(memory, self.geometry, incarnation)

    def link(self) -> tuple[MooncakeLink, FakeEngine, Staging]:
        link = self.open()
        return link, self.engines[0], self.path._engines[0].staging

    def received(self, blocks: list[int], nbytes: int) -> torch.Tensor:
        whole = torch.cat(self.regions).reshape(self.geometry.blocks, -1)
        return whole[blocks].reshape(-1)[:nbytes]


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
    assert [len(batch) for batch in engine.batches] == [*[MAX_PIECES] * 5, 3000 - 5 * MAX_PIECES]
    assert engine.most_pieces == BATCHES * MAX_PIECES == 1024
    assert torch.equal(bed.received(blocks, 6000), source)


def test_a_large_run_travels_in_pieces_side_by_side() -> None:
    nbytes = 3 * PIECE_BYTES + 5
    bed = Bed(Geometry(nbytes, 2, 1), staging_bytes=SLOTS * nbytes)
    link, engine, _ = bed.link()
    source = torch.randint(0, 256, (nbytes,), dtype=torch.uint8)
    link.write(source, window_extents(bed.geometry, [1], nbytes))
    assert [[length for *_, length in batch] for batch in engine.batches] == [[PIECE_BYTES] * 3 + [5]]
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

    def copy(self, pieces: Iterable[Piece]) -> None:
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


def test_a_released_permit_goes_to_the_thread_that_has_waited_longest() -> None:
    permits = FairSemaphore(1)
    assert permits.acquire(wait=False)
    order: list[int] = []
    threads = []
    for number in range(3):
        threads.append(threading.Thread(target=lambda number=number: order.append(number * permits.acquire(wait=True))))
        threads[-1].start()
        deadline = time.monotonic() + 30
        while len(permits._waiting) <= number:
            assert time.monotonic() < deadline
            time.sleep(0.001)
    for number, thread in enumerate(threads):
        permits.release()
        assert not permits.acquire(wait=False), "a thread that releases a permit queues behind the waiting ones"
        thread.join(30)
        assert order == list(range(number + 1))
    permits.release()
    assert permits.acquire(wait=False)


# -- engines -------------------------------------------------------------------------------------------------------


def test_one_engine_serves_all_sessions_and_registers_its_staging_once() -> None:
    bed = Bed(Geometry(64, 4, 1))
    for incarnation, session in (("1", "10.0.0.1:1"), ("2", "10.0.0.2:2"), ("1", "10.0.0.1:1")):
        bed.open(incarnation, session)
    assert len(bed.engines) == 1
    assert bed.engines[0].registered == [(bed.path._engines[0].staging.memory.data_ptr(), 4096)]


def test_a_session_id_that_returns_with_another_process_gets_another_engine() -> None:
    bed = Bed(Geometry(64, 4, 1))
    extents = window_extents(bed.geometry, [0], 64)

    def write(incarnation: str, session: str = SESSION) -> None:
        bed.open(incarnation, session).write(torch.ones(64, dtype=torch.uint8), extents)

    for incarnation in ("1", "2", "2", "3"):
        write(incarnation)
    write("9", "10.0.0.9:9")  # a session that no engine knows needs no new one
    assert [len(engine.batches) for engine in bed.engines] == [2, 2, 1]


def test_server_without_memory_at_mooncake_is_refused_before_an_engine_is_made() -> None:
    bed = Bed(Geometry(64, 4, 1))
    for memory in (
        ShmMemory(segment="name", nonce="nonce", writer_slot=0),
        MooncakeMemory(target=SESSION, addresses=[4096] * 2),  # the pool has one region
    ):
        with pytest.raises(DataPathUnavailable, match="registered no memory"):
            bed.path.open(memory, bed.geometry, "1")
    assert not bed.engines


def test_staging_that_cannot_be_registered_is_an_error_and_not_kept() -> None:
    bed = Bed(Geometry(64, 4, 1))
    engine = FakeEngine()
    engine.register_code = -5
    path = MooncakePath(make_engine=lambda: engine, staging_bytes=4096, writers=4)
    with pytest.raises(MemoryUnavailable, match="4096 bytes returned -5"):
        path.open(MooncakeMemory(target=SESSION, addresses=[4096]), bed.geometry, "1")
    assert not path._engines


class PortOnly:
    def get_rpc_port(self) -> int:
        return 17001


@pytest.mark.parametrize(("host", "session"), [("10.0.0.1", "10.0.0.1:17001"), ("fe80::1", "[fe80::1]:17001")])
def test_a_session_id_brackets_an_ipv6_address(host: str, session: str) -> None:
    assert engines.session_id(PortOnly(), host) == session


# -- GPU memory ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_device", ["cpu", "cuda"])
def test_the_engine_reads_staging_memory_only_when_the_copies_into_it_have_happened(memory_device: str) -> None:
    """The engine knows no streams: what it is given must be there."""
    source = torch.randint(1, 256, (700,), dtype=torch.uint8)
    for device in (AsynchronousDevice(), AsynchronousDevice(0.5), CarelessDevice()):
        bed = Bed(Geometry(64, 50, 2), 44, device, memory_device)
        link, _, _ = bed.link()
        link.write(source, window_extents(bed.geometry, list(range(20)), 700))
        arrived = torch.equal(bed.received(list(range(20)), 700), source)
        assert arrived is not isinstance(device, CarelessDevice), device


def test_host_staging_is_pinned_until_its_engine_is_destroyed() -> None:
    device = AsynchronousDevice()
    bed = Bed(Geometry(64, 50, 2), device=device)
    link, engine, staging = bed.link()
    assert device.pinned == [staging.memory.data_ptr()]
    engine.codes = [5]
    with pytest.raises(DataPathError):
        link.write(torch.ones(64, dtype=torch.uint8), window_extents(bed.geometry, [0], 64))
    deadline = time.monotonic() + 30
    while device.pinned:
        assert time.monotonic() < deadline, "still pinned"
        time.sleep(0.01)


def test_memory_that_cannot_be_registered_does_not_stay_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    device = AsynchronousDevice()
    bed = Bed(Geometry(64, 50, 2), device=device)
    monkeypatch.setattr(FakeEngine, "register_memory", lambda self, address, length: -1)
    with pytest.raises(MemoryUnavailable):
        bed.link()
    assert not device.pinned


def test_the_build_without_cuda_is_refused_for_gpu_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines.metadata, "version", lambda name: "0.3.13")
    with pytest.raises(DataPathUnavailable, match=r"POOL_DEVICE=cuda, but mooncake-transfer-engine-non-cuda"):
        engines.engine_factory("127.0.0.1", protocol="tcp", memory_device="cuda")


@pytest.mark.parametrize("closed", [True, False])
def test_staging_memory_is_unpinned_once_and_before_it_is_unmapped(closed: bool) -> None:
    """A path that is dropped closes nothing; its memory must not go while it is pinned."""
    pinned: list[torch.Tensor] = []

    class Pinning(Device):
        def pin(self, memory: torch.Tensor) -> Callable[[], None]:
            pinned.append(memory)
            return lambda: pinned.remove(memory) if len(pinned) == 1 else pytest.fail("unpinned twice")

    staging = Staging(2, 64, Pinning())
    assert len(pinned) == 1
    if closed:
        staging.close()
        assert not pinned
    del staging
    gc.collect()
    assert not pinned
