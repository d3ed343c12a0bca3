"""On a machine with a GPU: the transfers of tests/connector/test_gpu_memory.py on it, and what only a GPU can show.

docs/gpu.md says where it was run.
"""

from __future__ import annotations

import pytest
import torch

from sglang_mm_conn.cli.rates import measure
from sglang_mm_conn.datapath.mooncake import engine as mooncake
from sglang_mm_conn.memory.device import CudaDevice, Device
from tests.connector.endpoints import ROW_BYTES, TOKENS, TRANSPORTS, Ends

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU on this machine")
EVERY_TRANSPORT = [
    pytest.param(transport, marks=pytest.mark.gpu_pool if "GPU pool" in transport else ()) for transport in TRANSPORTS
]
CYCLES = 200_000_000  # about 0.1 s


@pytest.fixture
def device() -> CudaDevice:
    return CudaDevice(torch.cuda.current_device())


def slow_rows(values: torch.Tensor) -> torch.Tensor:
    """``values`` on the GPU, as they will be when its stream has come to it; NaN before."""
    rows = torch.full_like(values, float("nan"), device="cuda")
    torch.cuda.synchronize()
    torch.cuda._sleep(CYCLES)
    rows.copy_(values.pin_memory(), non_blocking=True)
    return rows


@pytest.mark.parametrize("transport", EVERY_TRANSPORT)
@pytest.mark.parametrize("gpu_at", ["both ends", "the encoder", "the language server"])
def test_the_right_bytes_arrive(
    transport: str, gpu_at: str, device: CudaDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MC_FORCE_TCP", "1")
    if "GPU pool" in transport and mooncake._is_installed(mooncake._WITHOUT_CUDA):
        pytest.skip("the Mooncake engine that is installed is the build without CUDA")
    encoder = device if gpu_at != "the language server" else Device()
    language = CudaDevice(torch.cuda.current_device()) if gpu_at != "the encoder" else Device()
    ends = Ends(transport, encoder, language, checksum=False)
    try:
        for number in range(4):
            expected = torch.randn(TOKENS, ROW_BYTES // 4)
            arrived = ends.transfer(slow_rows(expected) if encoder is device else expected)
            place = ends.language.settings.resolved_embedding_device
            assert arrived.device.type == place and torch.equal(arrived.cpu(), expected), number
    finally:
        ends.close()


@pytest.mark.parametrize("side_stream", [False, True])
def test_a_source_is_read_only_when_the_model_has_written_it(side_stream: bool, device: CudaDevice) -> None:
    ends = Ends("shm, host pool, embeddings on the GPU", device, Device(), checksum=True)
    try:
        expected = torch.randn(TOKENS, ROW_BYTES // 4)
        with torch.cuda.stream(torch.cuda.Stream() if side_stream else torch.cuda.default_stream()):
            room = ends.begin(slow_rows(expected))
        assert torch.equal(ends.finish(room), expected)
    finally:
        ends.close()


def test_memory_that_kernels_still_read_is_not_written_by_the_next_result(device: CudaDevice) -> None:
    """The caching allocator's hazard: memory.device says what is done about it."""
    for _ in range(20):
        first = device.empty(1 << 20, "cuda")
        device.copy([(first, 0, torch.full((1 << 20,), 1, dtype=torch.uint8), 0, 1 << 20)])
        torch.cuda._sleep(CYCLES // 10)
        reader = first.clone()
        del first
        second = device.empty(1 << 20, "cuda")
        device.copy([(second, 0, torch.full((1 << 20,), 2, dtype=torch.uint8), 0, 1 << 20)])
        assert bool((reader == 1).all()) and bool((second == 2).all())


def test_pinned_memory_is_pinned_and_unpinned(device: CudaDevice) -> None:
    memory = torch.zeros(1 << 20, dtype=torch.uint8)
    unpin = device.pin(memory)
    assert memory.is_pinned()
    unpin()
    assert not memory.is_pinned()


def test_memory_that_cannot_be_pinned_is_a_warning(device: CudaDevice, caplog: pytest.LogCaptureFixture) -> None:
    memory = torch.zeros(1 << 20, dtype=torch.uint8)
    unpin = device.pin(memory)
    device.pin(memory)()  # twice: an error, and nothing to undo
    assert "could not be pinned" in caplog.text and memory.is_pinned()
    assert int(torch.ones(4, device="cuda").sum()) == 4  # the error does not come back
    unpin()


def test_every_copy_gives_the_right_bytes_at_a_rate_that_is_printed(device: CudaDevice) -> None:
    found = measure(device, 64 << 20, 896 << 10, 3)
    for rate in found:
        print(f"{rate.way}: {rate.bytes_per_second / 1e9:.2f} GB/s")
    assert all(rate.right for rate in found)
