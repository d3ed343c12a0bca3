"""Which bytes of which region a window occupies."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_mm_conn.core.errors import ProtocolError
from sglang_mm_conn.core.layout import Extent, Geometry, window_extents


@st.composite
def windows(draw: st.DrawFn) -> tuple[Geometry, list[int], int]:
    geometry = Geometry(draw(st.integers(1, 9)), draw(st.integers(1, 6)), draw(st.integers(1, 4)))
    count = draw(st.integers(1, geometry.blocks))
    blocks = draw(st.permutations(range(geometry.blocks)))[:count]
    if draw(st.booleans()):
        blocks = sorted(blocks)  # extents that can be merged
    return geometry, blocks, draw(st.integers(0, count * geometry.block_bytes))


@given(windows())
def test_runs_cover_exactly_the_bytes_in_token_order_whatever_the_blocks_numbers(
    window: tuple[Geometry, list[int], int],
) -> None:
    geometry, blocks, nbytes = window
    extents = window_extents(geometry, blocks, nbytes)
    places = [
        (extent.region * geometry.region_bytes + extent.offset + byte, extent.start + byte)
        for extent in extents
        for byte in range(extent.length)
    ]
    # Byte i of the window is byte i % block_bytes of the block that was allocated (i // block_bytes)-th.
    assert places == [
        (blocks[i // geometry.block_bytes] * geometry.block_bytes + i % geometry.block_bytes, i) for i in range(nbytes)
    ]
    assert len({place for place, _ in places}) == nbytes  # no overlap
    for extent in extents:
        assert extent.length > 0 and extent.offset >= 0 and extent.offset + extent.length <= geometry.region_bytes
    for before, after in itertools.pairwise(extents):
        assert before.region != after.region or before.offset + before.length != after.offset, "could be merged"


def test_neighbours_are_merged_within_a_region_and_never_across_regions() -> None:
    geometry = Geometry(block_bytes=10, blocks_per_region=4, regions=2)
    assert window_extents(geometry, [2, 3, 4, 5, 0], 43) == [
        Extent(0, 20, 20, 0),
        Extent(1, 0, 20, 20),
        Extent(0, 0, 3, 40),
    ]


def test_a_later_window_begins_where_the_one_before_it_ended() -> None:
    extents = window_extents(Geometry(10, 8, 1), [5, 1], 15, 20)
    assert extents == [Extent(0, 50, 10, 20), Extent(0, 10, 5, 30)]


def test_blocks_out_of_order_keep_the_order_of_allocation() -> None:
    assert window_extents(Geometry(10, 8, 1), [5, 1, 0], 30) == [
        Extent(0, 50, 10, 0),
        Extent(0, 10, 10, 10),
        Extent(0, 0, 10, 20),
    ]


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 500))
def test_blocks_for_and_capacity_agree_also_for_rows_that_straddle_blocks(
    block_bytes: int, row_bytes: int, tokens: int
) -> None:
    geometry = Geometry(block_bytes, 1 << 20, 1)
    count = geometry.blocks_for(tokens, row_bytes)
    assert geometry.capacity(count, row_bytes) >= tokens > geometry.capacity(count - 1, row_bytes)


def test_a_row_may_straddle_two_blocks_that_are_not_neighbours() -> None:
    geometry = Geometry(block_bytes=10, blocks_per_region=8, regions=1)
    assert geometry.capacity(2, 6) == 3
    assert window_extents(geometry, [7, 2], 18) == [Extent(0, 70, 10, 0), Extent(0, 20, 8, 10)]  # row 1: 4 bytes and 2


@pytest.mark.parametrize(
    ("blocks", "nbytes", "named"),
    [([0, 8], 1, "8"), ([-1], 1, "-1"), ([3, 3], 1, "twice"), ([0, 1], 21, "21"), ([], 1, "1")],
)
def test_bad_blocks_and_lengths_are_refused_before_a_byte_moves(blocks: list[int], nbytes: int, named: str) -> None:
    with pytest.raises(ProtocolError, match=named):
        window_extents(Geometry(block_bytes=10, blocks_per_region=4, regions=2), blocks, nbytes)


def test_a_bad_block_behind_the_last_byte_is_refused_too() -> None:
    with pytest.raises(ProtocolError, match="99"):
        window_extents(Geometry(10, 4, 2), [0, 99], 5)
