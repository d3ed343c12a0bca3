"""GPU memory at both ends, by transport of a device whose copies happen as late as they may (promise P2).

Two endpoints in this process, real sockets; over shared memory, and over a real Mooncake engine to a pool that counts
as GPU memory. On a machine with a GPU, tests/gpu runs the same transfers on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from sglang_mm_conn.connector.language.endpoint import LanguageEndpoint
from sglang_mm_conn.connector.runtime import Runtime
from sglang_mm_conn.core.errors import MemoryUnavailable
from sglang_mm_conn.core.settings import Settings
from sglang_mm_conn.core.states import Poll, ReceiverState
from sglang_mm_conn.datapath.factory import encoder_data_paths
from sglang_mm_conn.datapath.mooncake import engine as mooncake
from sglang_mm_conn.memory.device import Device
from sglang_mm_conn.memory.results import SharedResult
from tests.connector.endpoints import BLOCKS, HOST, ROW_BYTES, TOKENS, TRANSPORTS, Ends
from tests.connector.processes import stays, wait_for
from tests.memory.asynchronous import AsynchronousDevice, CarelessDevice


@pytest.fixture(autouse=True)
def engine_for_any_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory of these devices is the host's, which the build without CUDA reaches."""
    monkeypatch.setenv("MC_FORCE_TCP", "1")
    monkeypatch.setattr(mooncake, "_WITHOUT_CUDA", "none")


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@contextmanager
def opened(transport: str, encoder: Device, language: Device, checksum: bool = True) -> Iterator[Ends]:
    ends = Ends(transport, encoder, language, checksum)
    try:
        yield ends
    finally:
        for device in (encoder, language):
            if isinstance(device, AsynchronousDevice):
                device.let_go()
        ends.close()


@pytest.mark.parametrize("early", [0.0, 0.5])
def test_the_right_bytes_arrive_however_late_copies_happen(transport: str, early: float) -> None:
    encoder, language = AsynchronousDevice(early, 1), AsynchronousDevice(early, 2)
    with opened(transport, encoder, language) as ends:
        for number in range(8):
            rows = torch.full((TOKENS, ROW_BYTES // 4), float("nan"))
            expected = torch.randn(TOKENS, ROW_BYTES // 4)
            encoder.produce(rows, expected)
            assert torch.equal(ends.transfer(rows), expected), number


@pytest.mark.parametrize("careless", ["encoder", "language"])
def test_an_end_that_does_not_wait_for_its_copies_is_noticed(transport: str, careless: str) -> None:
    """Otherwise the tests above would show nothing."""
    devices: dict[str, Device] = {"encoder": Device(), "language": Device()}
    devices[careless] = CarelessDevice()
    with opened(transport, devices["encoder"], devices["language"], checksum=False) as ends:
        rows = torch.ones(TOKENS, ROW_BYTES // 4)
        assert not torch.equal(ends.transfer(rows), rows)


def test_a_source_is_read_only_after_the_event_that_wrote_it(transport: str) -> None:
    encoder = AsynchronousDevice()
    with opened(transport, encoder, Device(), checksum=False) as ends:
        rows, expected = torch.zeros(TOKENS, ROW_BYTES // 4), torch.randn(TOKENS, ROW_BYTES // 4)
        encoder.produce(rows, expected)
        encoder.hold("marks")
        room = ends.begin(rows)  # returns although the model is not done
        assert encoder.waiting.acquire(timeout=60), "no worker waited for the model"
        stays(lambda: ends.language.core.rooms[room].state is ReceiverState.OFFERED, "nothing was confirmed", 0.3)
        encoder.let_go()
        assert torch.equal(ends.finish(room), expected)


def test_neither_done_is_said_nor_a_source_released_before_the_copies_have_happened(transport: str) -> None:
    encoder = AsynchronousDevice()
    with opened(transport, encoder, Device(), checksum=False) as ends:
        encoder.hold("copies")
        room = ends.begin(torch.randn(TOKENS, ROW_BYTES // 4))
        assert encoder.waiting.acquire(timeout=60), "nobody waited for the copies of a window"
        core = ends.language.core
        stays(lambda: core.rooms[room].state is ReceiverState.OFFERED, "nothing was confirmed", 0.3)
        ends.encoder.fail(room, "given up in mid-copy", 500)
        stays(lambda: room in ends.encoder._sources and core.allocator.free_count == 0, "the copy goes on", 0.3)
        encoder.let_go()
        wait_for(lambda: room not in ends.encoder._sources, "the source is released")
        wait_for(lambda: core.allocator.free_count == BLOCKS, "every block is free again")


def test_no_block_is_free_before_the_copies_out_of_it_have_happened(transport: str) -> None:
    language = AsynchronousDevice()
    with opened(transport, Device(), language, checksum=False) as ends:
        rows = torch.randn(TOKENS, ROW_BYTES // 4)
        language.hold("copies")
        room = ends.begin(rows)
        assert language.waiting.acquire(timeout=60), "no copier waited for its copies"
        stays(lambda: ends.language.core.rooms[room].state is ReceiverState.COPYING, "the rows are being copied", 0.3)
        assert ends.language.core.allocator.free_count == 0, "the window had the whole pool"
        ends.language.abort(room, "nobody wants it any more")
        stays(lambda: ends.language.core.allocator.free_count == 0, "the rows are still being copied", 0.3)
        language.let_go()
        wait_for(lambda: ends.language.core.allocator.free_count == BLOCKS, "every block is free again")
        assert torch.equal(ends.transfer(rows), rows)  # and the endpoint goes on


def test_with_a_gpu_results_are_no_views_and_the_control_thread_moves_nothing(transport: str) -> None:
    """A copy from a view may be under transport when its last tensor goes; a copy may wait for the GPU."""
    language = AsynchronousDevice()
    with opened(transport, Device(), language, checksum=False) as ends:
        rows = torch.randn(4, ROW_BYTES // 4)  # in one window, and small
        language.hold("copies")
        room = ends.begin(rows)
        assert language.waiting.acquire(timeout=60), "nothing was copied"
        other = ends.begin(rows + 1)
        wait_for(lambda: ends.language.core.rooms[other].state is ReceiverState.COPYING, "control messages are heard")
        language.let_go()
        arrived = ends.finish(room)
        assert torch.equal(ends.finish(other), rows + 1)
        for region in ends.language.pool.regions:
            region.fill_(0xEE)
        assert torch.equal(arrived, rows)


def test_parts_that_are_joined_on_the_gpu_are_joined_when_the_scheduler_hears_of_it() -> None:
    device = AsynchronousDevice()
    joined = torch.zeros(10)

    def join() -> torch.Tensor:
        device.produce(joined, torch.ones(10))
        return joined

    with opened("shm, host pool, embeddings on the GPU", Device(), device) as ends:
        assert bool((ends.language.submit(join).result(60) == 1).all())


def test_an_embedding_that_could_not_be_computed_fails_its_room_alone(transport: str) -> None:
    class Broken(AsynchronousDevice):
        def mark(self, tensor: torch.Tensor) -> object:  # type: ignore[override]
            broken = bool(tensor.view(torch.float32)[0] == 0)
            mark = super().mark(tensor)

            class Mark:
                def synchronize(self) -> None:
                    if broken:
                        raise RuntimeError("CUDA error: an illegal memory access was encountered")
                    mark.synchronize()

            return Mark()

    with opened(transport, Broken(), Device(), checksum=False) as ends:
        room = ends.begin(torch.zeros(TOKENS, ROW_BYTES // 4))
        wait_for(lambda: ends.language.poll(room) is Poll.Failed, "the room fails")
        assert "was not computed: CUDA error" in ends.language.outcome(room).reason
        wait_for(lambda: ends.language.core.allocator.free_count == BLOCKS, "nothing is in doubt: every block is free")
        rows = torch.ones(TOKENS, ROW_BYTES // 4)
        assert torch.equal(ends.transfer(rows), rows)


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variable", ["pool_device", "embedding_device"])
@pytest.mark.parametrize("make", ["language", "encoder"])
def test_gpu_memory_is_refused_at_start_in_a_process_without_a_gpu(variable: str, make: str) -> None:
    settings = Settings(**{variable: "cuda"})  # type: ignore[arg-type]

    def start() -> None:
        if make == "encoder":
            encoder_data_paths(settings, HOST)
        else:
            LanguageEndpoint(settings, server="1", host=HOST, dtype="float32", widest_row_bytes=ROW_BYTES)

    with pytest.raises(MemoryUnavailable, match=f"SGLANG_MM_CONN_{variable.upper()}=cuda, but this process"):
        start()


def test_ranks_that_share_results_in_host_memory_are_refused_gpu_memory_for_them() -> None:
    with pytest.raises(MemoryUnavailable, match=r"EMBEDDING_DEVICE=cuda.*set it to cpu"):
        LanguageEndpoint(
            Settings(embedding_device="cuda"), server="1", host=HOST, dtype="float32", widest_row_bytes=ROW_BYTES,
            make_result=SharedResult, runtime=Runtime(AsynchronousDevice()),
        )  # fmt: skip
