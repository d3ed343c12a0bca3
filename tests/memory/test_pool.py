"""The pool: what a writer puts into scattered blocks comes out in order."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sglang_mm_conn.core.errors import ProtocolError
from sglang_mm_conn.core.layout import Geometry, window_extents
from sglang_mm_conn.core.messages import ShmMemory
from sglang_mm_conn.core.settings import Settings
from sglang_mm_conn.datapath.shm import ShmLink, ShmPath
from sglang_mm_conn.memory import pool as pool_module
from sglang_mm_conn.memory.pool import BlockPool, pool_geometry
from sglang_mm_conn.memory.results import Contents, PrivateResult

GEOMETRY = Geometry(block_bytes=24, blocks_per_region=5, regions=3)


@pytest.fixture(scope="module")
def pool() -> Iterator[BlockPool]:
    made = BlockPool(GEOMETRY, shared=True)
    yield made
    made.close()


def attach(pool: BlockPool, slot: int) -> ShmLink:
    assert pool.segment is not None
    memory = ShmMemory(segment=pool.segment.name, nonce=pool.segment.nonce, writer_slot=slot)
    return ShmPath().open(memory, GEOMETRY, "1")


@pytest.fixture(scope="module")
def link(pool: BlockPool) -> Iterator[ShmLink]:
    made = attach(pool, 7)
    yield made
    made.close()


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(blocks=st.permutations(range(GEOMETRY.blocks)), count=st.integers(1, GEOMETRY.blocks), less=st.integers(0, 23))
def test_what_is_read_is_what_was_written_for_scattered_blocks(
    pool: BlockPool, link: ShmLink, blocks: list[int], count: int, less: int
) -> None:
    blocks = blocks[:count]
    nbytes = count * GEOMETRY.block_bytes - less
    for region in pool.regions:
        region.fill_(0xEE)
    source = torch.randint(0, 255, (nbytes,), dtype=torch.uint8)
    link.write(source, window_extents(GEOMETRY, blocks, nbytes))
    target = torch.zeros(nbytes, dtype=torch.uint8)
    pool.read(blocks, target, nbytes)
    assert torch.equal(target, source)
    # Nothing was written beside it.
    touched = torch.cat([region.reshape(GEOMETRY.blocks_per_region, -1) for region in pool.regions])
    others = [block for block in range(GEOMETRY.blocks) if block not in blocks]
    assert bool((touched[others] == 0xEE).all())
    assert bool((touched[blocks[-1]][GEOMETRY.block_bytes - less :] == 0xEE).all())


def test_a_window_is_read_into_the_middle_of_a_result(pool: BlockPool, link: ShmLink) -> None:
    result = torch.zeros(100, dtype=torch.uint8)
    source = torch.arange(40, dtype=torch.uint8)
    link.write(source, window_extents(GEOMETRY, [9, 2], 40))
    pool.read([9, 2], result, 40, 30)
    assert torch.equal(result[30:70], source) and not result[:30].any() and not result[70:].any()


def test_a_window_is_written_from_the_middle_of_an_embedding(pool: BlockPool, link: ShmLink) -> None:
    embedding, result = torch.arange(100, dtype=torch.uint8), torch.zeros(40, dtype=torch.uint8)
    link.write(embedding, window_extents(GEOMETRY, [9, 2], 40, 30))
    pool.read([9, 2], result, 40)
    assert torch.equal(result, embedding[30:70])


def test_rows_copied_out_are_no_view_of_blocks_that_the_next_room_is_written_to(pool: BlockPool, link: ShmLink) -> None:
    result = PrivateResult("room", Contents(5, "float32", 40, b"")).rows
    link.write(torch.full((40,), 1, dtype=torch.uint8), window_extents(GEOMETRY, [9, 2], 40))
    pool.read([9, 2], result, 40)
    link.write(torch.full((40,), 2, dtype=torch.uint8), window_extents(GEOMETRY, [9, 2], 40))
    assert bool((result == 1).all())


def test_a_writer_that_comes_and_goes_changes_no_byte_of_the_pool(pool: BlockPool) -> None:
    for region in pool.regions:
        region.fill_(0xEE)
    attach(pool, 8).close()
    assert all(bool((region == 0xEE).all()) for region in pool.regions)


def test_more_than_the_result_holds_is_not_read(pool: BlockPool) -> None:
    result = torch.zeros(60, dtype=torch.uint8)
    with pytest.raises(ValueError, match="do not go to 54 of 60"):
        pool.read([9, 2], result, 40, 30)
    assert not result.any()


def test_more_than_the_blocks_hold_is_not_read(pool: BlockPool) -> None:
    with pytest.raises(ProtocolError):
        pool.read([1], torch.zeros(25, dtype=torch.uint8), 25)


def test_a_private_pool_has_its_regions_side_by_side_and_no_segment() -> None:
    pool = BlockPool(GEOMETRY, shared=False)
    assert pool.segment is None
    assert [region.numel() for region in pool.regions] == [120] * 3
    assert [region.data_ptr() for region in pool.regions] == [
        pool.regions[0].data_ptr() + 120 * index for index in range(3)
    ]
    pool.close()


# -- its size ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("blocks", "regions", "expected"),
    [(16, 4, (4, 4)), (17, 4, (5, 4)), (2, 4, (1, 2)), (1, 4, (1, 1)), (9, 1, (9, 1))],
)
def test_a_set_number_of_blocks_is_never_rounded_down(blocks: int, regions: int, expected: tuple[int, int]) -> None:
    geometry = pool_geometry(Settings(blocks=blocks, regions=regions, block_size=10), 8, shared=True)
    assert (geometry.blocks_per_region, geometry.regions) == expected and geometry.blocks >= blocks
    assert geometry.block_bytes == 80


@pytest.mark.parametrize(("free", "expected"), [(10_000, 5_000), (1 << 40, 256 << 20)])
def test_an_unset_pool_takes_half_of_what_is_free_and_at_most_256_mib(
    free: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "free_bytes", lambda: free)
    geometry = pool_geometry(Settings(block_size=10), 8, shared=True)
    size = geometry.blocks * geometry.block_bytes
    assert expected - geometry.regions * geometry.block_bytes < size <= expected


def test_a_widest_row_that_fills_everything_still_gives_one_block_a_region(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "free_bytes", lambda: 100)
    assert pool_geometry(Settings(regions=2), 1000, shared=True) == Geometry(128_000, 1, 2)
