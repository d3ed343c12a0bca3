"""Engines of the Mooncake path: whom they serve, what they register, GPU memory."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

import pytest
import torch

from sglang_mm_conn.core.errors import DataPathError, DataPathUnavailable, MemoryUnavailable
from sglang_mm_conn.core.layout import Geometry, window_extents
from sglang_mm_conn.core.messages import MooncakeMemory, ShmMemory
from sglang_mm_conn.datapath.mooncake import engine as engines
from sglang_mm_conn.datapath.mooncake.staging import Staging
from sglang_mm_conn.datapath.mooncake.writer import (
    MooncakePath,
)
from sglang_mm_conn.memory.device import Device
from tests.datapath.fake_engine import SESSION, Bed, FakeEngine
from tests.memory.asynchronous import AsynchronousDevice, CarelessDevice

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
    assert [len(engine.batches) for engine in bed.engines] == [1, 2, 2]


def test_an_engine_that_another_one_replaces_ends_when_its_last_write_has_returned() -> None:
    bed = Bed(Geometry(64, 4, 1))
    extents, source = window_extents(bed.geometry, [0], 64), torch.ones(64, dtype=torch.uint8)
    _, engine, _ = bed.link()
    other = bed.open("2", "10.0.0.2:2")
    counts: list[int] = []

    def return_with_another_process() -> None:
        bed.open("another process")
        counts.append(len(bed.path._engines))

    engine.during = return_with_another_process
    other.write(source, extents)
    counts.append(len(bed.path._engines))
    other.write(source, extents)  # its link goes on, through the new engine
    assert counts == [2, 1] and [len(one.batches) for one in bed.engines] == [1, 1]


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
