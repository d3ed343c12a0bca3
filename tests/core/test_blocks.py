"""The allocator: no block ever has two owners, and none is lost."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from sglang_mm_conn.core.blocks import BlockAllocator
from sglang_mm_conn.core.errors import AllocatorError


def snapshot(allocator: BlockAllocator) -> tuple[object, ...]:
    return allocator.free_blocks(), dict(allocator._held), dict(allocator._quarantined)


def test_a_pool_without_blocks_is_refused() -> None:
    with pytest.raises(AllocatorError, match="0"):
        BlockAllocator(0)


def test_the_shortest_run_that_is_long_enough_is_taken_so_that_long_ones_stay() -> None:
    allocator = BlockAllocator(16)
    for owner, count in (("a", 4), ("b", 1), ("c", 2), ("d", 1), ("e", 3), ("f", 1)):  # the free run: 12...15
        allocator.allocate(owner, count)
    for owner, blocks in (("a", [0, 1, 2, 3]), ("c", [5, 6]), ("e", [10, 8, 9])):
        allocator.release(owner, blocks)
    assert allocator.allocate("two", 2) == [5, 6]
    assert allocator.allocate("three", 3) == [8, 9, 10]
    assert allocator.allocate("four", 4) == [0, 1, 2, 3]
    allocator.release("four", [3, 2, 1, 0])
    # No run is long enough: the longest first, so that there are few of them.
    assert allocator.allocate("six", 6) == [0, 1, 2, 3, 12, 13]
    allocator.check_integrity()


def test_the_lowest_free_blocks_come_first_so_that_windows_are_runs() -> None:
    allocator = BlockAllocator(8)
    assert allocator.allocate("a", 3) == [0, 1, 2]
    assert allocator.allocate("b", 2) == [3, 4]
    allocator.release("a", [2, 0, 1])
    assert allocator.allocate("c", 4) == [0, 1, 2, 5]


@pytest.mark.parametrize("count", [0, -1, 5])
def test_more_than_is_free_or_nothing_is_refused_and_takes_nothing(count: int) -> None:
    allocator = BlockAllocator(4)
    with pytest.raises(AllocatorError):
        allocator.allocate("a", count)
    assert allocator.free_count == 4 and allocator.held_count == 0


Operation = Callable[[BlockAllocator], None]


@pytest.mark.parametrize(
    "operation",
    [
        lambda a: a.release("other", [0]),
        lambda a: a.release("owner", [0, 0]),
        lambda a: a.release("owner", [0, 9]),
        lambda a: a.release("owner", [0, 4]),  # the second is another's
        lambda a: a.release("owner", [0, 7]),  # the second is free
        lambda a: a.release("owner", [3]),  # in quarantine
        lambda a: a.quarantine("other", [0]),
        lambda a: a.quarantine("owner", [3]),  # a second time
        lambda a: a.quarantine("owner", [0, 3]),
        lambda a: a.release_quarantined("owner", [0]),  # not in quarantine
        lambda a: a.release_quarantined("other", [3]),
        lambda a: a.release_quarantined("owner", [3, 3]),
        lambda a: a.release_quarantined("owner", [3, 0]),
    ],
)
def test_a_wrong_owner_or_a_second_time_is_refused_and_changes_nothing(operation: Operation) -> None:
    allocator = BlockAllocator(8)
    assert allocator.allocate("owner", 4) == [0, 1, 2, 3]
    assert allocator.allocate("third", 1) == [4]
    allocator.quarantine("owner", [3])
    before = snapshot(allocator)
    with pytest.raises(AllocatorError):
        operation(allocator)
    assert snapshot(allocator) == before


def test_blocks_freed_twice_are_not_shared_by_two_requests() -> None:
    allocator = BlockAllocator(2)
    blocks = allocator.allocate("first", 2)
    allocator.release("first", blocks)
    taken = allocator.allocate("second", 2)
    with pytest.raises(AllocatorError):
        allocator.release("first", blocks)  # a late abort
    assert allocator.free_count == 0 and taken == blocks


def test_quarantined_blocks_are_counted_and_not_handed_out() -> None:
    allocator = BlockAllocator(2)
    allocator.quarantine("a", allocator.allocate("a", 2))
    assert (allocator.free_count, allocator.held_count, allocator.quarantined_count) == (0, 0, 2)
    with pytest.raises(AllocatorError):
        allocator.allocate("b", 1)
    allocator.release_quarantined("a", [1, 0])
    assert allocator.allocate("b", 2) == [0, 1]


@pytest.mark.parametrize(
    "damage",
    [
        lambda a: a._add_run(0, 1),
        lambda a: a._remove_run(2),
        lambda a: a._held.clear(),
        lambda a: a._lengths.update({2: 1, 3: 1}),
        lambda a: a._by_length.clear(),
        lambda a: setattr(a, "_free_count", 3),
    ],
)
def test_check_integrity_sees_a_double_and_a_lost_block(damage: Operation) -> None:
    allocator = BlockAllocator(4)
    allocator.allocate("a", 2)
    allocator.check_integrity()
    damage(allocator)
    with pytest.raises(AllocatorError):
        allocator.check_integrity()


class AllocatorMachine(RuleBasedStateMachine):
    """Any order of calls, right and wrong, against a model of plain sets."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = BlockAllocator(12)
        self.held: dict[str, set[int]] = {name: set() for name in "abc"}
        self.doubtful: dict[str, set[int]] = {name: set() for name in "abc"}

    owners = st.sampled_from("abc")
    subset = st.lists(st.integers(-1, 12), min_size=1, max_size=4)

    @rule(owner=owners, count=st.integers(0, 13))
    def allocate(self, owner: str, count: int) -> None:
        free = 12 - sum(map(len, self.held.values())) - sum(map(len, self.doubtful.values()))
        if not 1 <= count <= free:
            with pytest.raises(AllocatorError):
                self.allocator.allocate(owner, count)
            return
        blocks = self.allocator.allocate(owner, count)
        assert len(set(blocks)) == count
        for others in (*self.held.values(), *self.doubtful.values()):
            assert not others & set(blocks), "a block was handed out twice"
        self.held[owner] |= set(blocks)

    def _try(
        self, call: Callable[[str, list[int]], None], owner: str, blocks: list[int], table: dict[str, set[int]]
    ) -> bool:
        legal = len(set(blocks)) == len(blocks) and set(blocks) <= table[owner]
        if legal:
            call(owner, blocks)
            table[owner] -= set(blocks)
        else:
            with pytest.raises(AllocatorError):
                call(owner, blocks)
        return legal

    @rule(owner=owners, blocks=subset)
    def release(self, owner: str, blocks: list[int]) -> None:
        self._try(self.allocator.release, owner, blocks, self.held)

    @rule(owner=owners)
    def release_all(self, owner: str) -> None:
        self._try(self.allocator.release, owner, sorted(self.held[owner]), self.held)

    @rule(owner=owners, blocks=subset)
    def quarantine(self, owner: str, blocks: list[int]) -> None:
        if self._try(self.allocator.quarantine, owner, blocks, self.held):
            self.doubtful[owner] |= set(blocks)

    @rule(owner=owners, blocks=subset)
    def release_quarantined(self, owner: str, blocks: list[int]) -> None:
        self._try(self.allocator.release_quarantined, owner, blocks, self.doubtful)

    @invariant()
    def nothing_is_doubled_or_lost(self) -> None:
        self.allocator.check_integrity()
        assert self.allocator.held_count == sum(map(len, self.held.values()))
        assert self.allocator.quarantined_count == sum(map(len, self.doubtful.values()))


AllocatorMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAllocator = AllocatorMachine.TestCase
