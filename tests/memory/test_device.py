"""A device: copies are in place when ``copy`` returns, whenever they happen, and what cannot be had is refused."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator

import pytest
import torch

from sglang_mm_conn.core.errors import ConnError, MemoryUnavailable
from sglang_mm_conn.core.layout import Geometry
from sglang_mm_conn.core.settings import Settings
from sglang_mm_conn.memory import device as device_module
from sglang_mm_conn.memory.device import CudaDevice, Device, Slice, checksum_in_slices, device_of
from sglang_mm_conn.memory.pool import BlockPool
from tests.memory.asynchronous import GARBAGE, AsynchronousDevice, CarelessDevice

GEOMETRY = Geometry(block_bytes=24, blocks_per_region=5, regions=3)


def bytes_of(count: int, first: int = 0) -> torch.Tensor:
    return torch.arange(first, first + count, dtype=torch.int64).to(torch.uint8)


@pytest.mark.parametrize("make", [Device, AsynchronousDevice, lambda: AsynchronousDevice(0.5)])
def test_every_byte_is_in_place_when_a_copy_returns(make: Callable[[], Device]) -> None:
    source, target = bytes_of(100), torch.zeros(100, dtype=torch.uint8)
    make().copy((target, at, source, at, 10) for at in range(0, 100, 10))
    assert torch.equal(target, source)


def test_a_device_that_does_not_wait_is_noticed() -> None:
    source, target = bytes_of(100), torch.zeros(100, dtype=torch.uint8)
    CarelessDevice().copy([(target, 0, source, 0, 100)])
    assert not target.any()


def test_copies_that_were_asked_for_before_an_error_have_happened_when_it_is_raised() -> None:
    source, target = bytes_of(100), torch.zeros(100, dtype=torch.uint8)

    def slices() -> Iterator[Slice]:
        yield target, 0, source, 0, 50
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        AsynchronousDevice().copy(slices())
    assert torch.equal(target[:50], source[:50]) and not target[50:].any()


@pytest.mark.parametrize("slice_bytes", [1, 7, 100, 1000])
def test_the_checksum_of_device_memory_is_that_of_its_bytes(slice_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_module, "_CHECKSUM_SLICE", slice_bytes)
    source = bytes_of(100)
    expected = zlib.crc32(source.numpy())
    assert checksum_in_slices(AsynchronousDevice(), source) == expected == Device().checksum(source)


def test_a_process_without_a_gpu_refuses_gpu_memory_naming_the_setting() -> None:
    with pytest.raises(MemoryUnavailable, match="SGLANG_MM_CONN_POOL_DEVICE=cuda, but this process computes on cpu"):
        Device().require(Settings(pool_device="cuda"))
    with pytest.raises(MemoryUnavailable, match="EMBEDDING_DEVICE=cuda"):
        Device().require(Settings(embedding_device="cuda"))
    with pytest.raises(MemoryUnavailable):
        BlockPool(GEOMETRY, shared=False, memory_device="cuda")
    with pytest.raises(MemoryUnavailable):
        Device().empty(10, "cuda")


def test_a_process_computes_on_the_gpu_that_it_was_given_or_on_none() -> None:
    for settings in (Settings(pool_device="cuda"), Settings(embedding_device="cuda")):
        assert type(device_of(torch.device("cpu"), settings)) is Device
        assert type(device_of(torch.device("xpu", 0), settings)) is Device
        gpu = device_of(torch.device("cuda", 3), settings)
        assert isinstance(gpu, CudaDevice) and gpu.name == "cuda:3"


def test_settings_that_keep_transfers_off_the_gpu_wait_for_nothing_and_pin_nothing() -> None:
    assert type(device_of(torch.device("cuda", 3), Settings())) is Device


def test_an_embedding_on_a_device_that_nobody_was_told_of_is_refused() -> None:
    with pytest.raises(ConnError, match="an embedding on meta, where embeddings are expected on cpu"):
        Device().mark(torch.empty(3, device="meta"))


# -- the pool ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_device", ["cpu", "cuda"])
def test_a_pool_gives_blocks_back_only_when_their_rows_have_left(memory_device: str) -> None:
    device = AsynchronousDevice()
    pool = BlockPool(GEOMETRY, shared=False, device=device, memory_device=memory_device)
    pool.regions[1][96:120] = bytes_of(24)
    pool.regions[0][48:72] = bytes_of(24, 24)
    target = device.empty(40, memory_device)
    pool.read([9, 2], target, 40)
    for region in pool.regions:
        region.fill_(0xEE)  # the next room's rows
    assert torch.equal(target, bytes_of(40))
    pool.close()


def test_the_same_with_a_device_that_does_not_wait_would_give_other_bytes() -> None:
    device = CarelessDevice()
    pool = BlockPool(GEOMETRY, shared=False, device=device, memory_device="cuda")
    target = device.empty(40, "cuda")
    pool.read([9, 2], target, 40)
    assert bool((target == GARBAGE).all())
    pool.close()


@pytest.mark.parametrize("memory_device", ["cpu", "cuda"])
def test_gpu_pool_is_read_after_what_an_engine_copies_into_it_on_the_default_stream(memory_device: str) -> None:
    class Engine(AsynchronousDevice):
        """Its write lands when the default stream is waited for."""

        def drain(self) -> None:
            pool.regions[0][:24] = bytes_of(24)

    pool = BlockPool(GEOMETRY, shared=False, device=(device := Engine()), memory_device=memory_device)
    target = device.empty(24, memory_device)
    pool.read([0], target, 24)
    assert torch.equal(target, bytes_of(24)) == (memory_device == "cuda")
    pool.close()


@pytest.mark.parametrize("shared", [True, False])
def test_a_host_pool_is_pinned_as_long_as_it_is_open(shared: bool) -> None:
    device = AsynchronousDevice()
    pool = BlockPool(GEOMETRY, shared=shared, device=device)
    assert device.pinned == [pool.regions[0].data_ptr()]
    pool.close()
    assert not device.pinned


def test_a_gpu_pool_is_not_pinned_and_no_segment() -> None:
    device = AsynchronousDevice()
    settings = Settings(pool_device="cuda")
    assert not settings.shared_pool and settings.resolved_embedding_device == "cuda"
    pool = BlockPool(GEOMETRY, shared=settings.shared_pool, device=device, memory_device=settings.pool_device)
    assert not device.pinned and pool.segment is None
    assert [region.numel() for region in pool.regions] == [120] * 3
    pool.close()
