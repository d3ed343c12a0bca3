"""Both cores joined and driven in any order, with the properties after every step and at the end.

In every order the harness asserts: accounts are right; poll values never go back; bytes land only in blocks that their
window owns; rows are copied out only of such blocks; Success means the right bytes; a room ends once.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sglang_mm_conn.core.language.unclaimed import UNCLAIMED_LIMIT
from tests.core.harness import Rank, Wire

Index = st.integers(0, 31)
Choices = st.lists(st.integers(0, 7), min_size=1, max_size=20)
TROUBLE = ["reconnect", "reconnect", "reconnect", "drop", "write", "write", "copy", "encode", "silence", "restart"]


def pick(items: list[str], index: int) -> str:
    return items[index % len(items)]


class JoinedMachine(RuleBasedStateMachine):
    """One encoder, one or two ranks of one language server."""

    @initialize(
        path=st.sampled_from(["shm", "mooncake"]),
        ranks=st.integers(1, 2),
        blocks=st.integers(1, 4),
        first_offer=st.sampled_from([None, 1, 6, 100]),
    )
    def begin(self, path: str, ranks: int, blocks: int, first_offer: int | None) -> None:
        self.wire = Wire(
            path=path, ranks=ranks, blocks=blocks * 2, block_rows=4, row_bytes=4, regions=2, first_offer=first_offer,
            claim_timeout=20.0, send_timeout=100.0,
        )  # fmt: skip
        self.rooms: list[str] = []
        self.to_announce: dict[str, tuple[int, int]] = {}
        self.to_compute: list[str] = []
        self.to_expect: list[tuple[Rank, str]] = []

    def rank(self, index: int) -> Rank:
        return self.wire.ranks[index % len(self.wire.ranks)]

    # -- requests, in any order ----------------------------------------------------------------------------------

    @precondition(lambda self: len(self.rooms) < 12)
    @rule(tokens=st.integers(1, 60), row_bytes=st.sampled_from([3, 4, 16]))
    def new_room(self, tokens: int, row_bytes: int) -> None:
        room = self.wire.room()
        self.rooms.append(room)
        self.to_announce[room] = (tokens, row_bytes)
        self.to_expect += [(rank, room) for rank in self.wire.ranks]

    @precondition(lambda self: len(self.rooms) < 12)
    @rule(tokens=st.integers(1, 60))
    def new_room_at_once(self, tokens: int) -> None:
        self.rooms.append(self.wire.start(tokens, timeout=60.0))

    @precondition(lambda self: self.to_announce)
    @rule(index=Index)
    def announce(self, index: int) -> None:
        room = pick(list(self.to_announce), index)
        self.wire.announce(room, *self.to_announce.pop(room))
        self.to_compute.append(room)

    @precondition(lambda self: self.to_compute)
    @rule(index=Index)
    def compute(self, index: int) -> None:
        room = pick(self.to_compute, index)
        self.to_compute.remove(room)
        self.wire.compute(room)

    @precondition(lambda self: self.to_expect)
    @rule(index=Index)
    def expect(self, index: int) -> None:
        rank, room = self.to_expect.pop(index % len(self.to_expect))
        given_up = room in rank.core.tombstones  # no request claimed it in time, or its encode failed
        self.wire.expect(room, rank)
        if given_up:
            assert not rank.ended[room].success, "the late request fails at once"

    # -- messages, writes, copies: one at a time ------------------------------------------------------------------

    def possible(self) -> list[Callable[[], object]]:
        """Every event that can happen next."""
        wire = self.wire
        events: list[Callable[[], object]] = []
        for rank in wire.ranks:
            if rank.outbox:
                events.append(partial(wire.deliver_to_encoder, rank))
            if rank.inbox:
                events.append(partial(wire.deliver_to_rank, rank))
            if rank.copies:
                events.append(partial(wire.copy_out, rank))
        if any(wire.chunks):
            events.append(wire.begin_write)
        events += [partial(wire.end_write, write) for write in wire.writing]
        return events

    def go_on(self, choices: list[int]) -> None:
        for choice in choices:
            if events := self.possible():
                events[choice % len(events)]()

    # Three times the same, so that progress is drawn as often as faults.
    go_on_1 = rule(choices=Choices)(go_on)
    go_on_2 = rule(choices=Choices)(lambda self, choices: self.go_on(choices))
    go_on_3 = rule(choices=Choices)(lambda self, choices: self.go_on(choices))

    @precondition(lambda self: self.wire.late)
    @rule(index=Index)
    def late_bytes_land(self, index: int) -> None:
        self.wire.land(self.wire.late[index % len(self.wire.late)])

    @rule(seconds=st.sampled_from([0.0, 1.0, 15.0]))
    def time_passes(self, seconds: float) -> None:
        self.wire.tick(seconds)

    # -- what goes wrong -----------------------------------------------------------------------------------------

    @precondition(lambda self: self.rooms)
    @rule(index=Index, rank=Index)
    def abort(self, index: int, rank: int) -> None:
        self.wire.abort(pick(self.rooms, index), self.rank(rank))

    @precondition(lambda self: self.rooms)
    @rule(index=Index, rank=Index)
    def forget(self, index: int, rank: int) -> None:
        self.rank(rank).core.forget(pick(self.rooms, index))

    @rule(what=st.sampled_from(TROUBLE), index=Index)
    def trouble(self, what: str, index: int) -> None:
        wire, rank = self.wire, self.rank(index)
        if what == "drop":
            wire.drop(rank)
        elif what == "reconnect":
            wire.reconnect(rank)
        elif what == "silence":
            wire.silent(rank)
        elif what == "restart":
            wire.late += wire.writing if wire.path == "mooncake" else []
            wire.restart_encoder()
            self.to_compute.clear()  # those encodes died
            for other in wire.ranks:
                wire.reconnect(other)
        elif what == "encode" and self.rooms:
            room = pick(self.rooms, index)
            wire.perform_encoder(wire.encoder.fail(room, "out of memory", 500, wire.now))
        elif what == "write" and wire.writing:
            write = wire.writing[index % len(wire.writing)]
            wire.end_write(write, "broken", in_doubt=wire.path == "mooncake")
        elif what == "copy":
            wire.copy_out(rank, "no memory")

    # -- what holds ----------------------------------------------------------------------------------------------

    @invariant()
    def a_room_that_waits_holds_no_blocks(self) -> None:
        for rank in self.wire.ranks if hasattr(self, "wire") else ():
            rank.core.check_integrity()
            assert len(rank.core.unclaimed) <= UNCLAIMED_LIMIT
            for entry in rank.core.offers.waiting:
                assert not entry.blocks or entry.state.value != "queued"

    def teardown(self) -> None:
        """All faults end. Then every room finishes, and nothing is left but writes in doubt."""
        if not hasattr(self, "wire"):
            return
        wire = self.wire
        # Data calls under way return; embeddings that are not there yet never come.
        for rank in wire.ranks:
            wire.reconnect(rank)
        wire.settle()
        fresh = wire.start(30) if all(rank.core.allocator.free_count for rank in wire.ranks) else None
        for rank in wire.ranks:
            wire.reconnect(rank)
        wire.settle()
        wire.tick(1000.0)
        wire.settle()
        for rank in wire.ranks:
            wire.reconnect(rank)
        wire.settle()
        assert not wire.encoder.rooms and not wire.writing and not any(wire.chunks)
        doubtful = {(late.room, late.session.mooncake_session_id) for late in wire.late}
        for rank in wire.ranks:
            assert rank.core.allocator.held_count == 0 and not rank.core.unclaimed
            for room in list(rank.core.rooms):
                assert rank.core.rooms[room].machine.final and room in rank.ended
                rank.core.forget(room)
            assert not rank.core.rooms
            if wire.path == "shm":
                assert not rank.core.quarantine
            for room, held in rank.core.quarantine.items():
                # Over Mooncake the end of a process proves nothing. A living process left out only windows in doubt.
                assert held.peer.incarnation != wire.incarnation or (room, rank.session_id) in doubtful
        for late in wire.late:
            wire.land(late)
        if fresh:
            assert wire.succeeded(fresh), "a new room did not get through after all that"


JoinedMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
TestJoined = JoinedMachine.TestCase


@pytest.mark.parametrize("path", ["shm", "mooncake"])
@pytest.mark.parametrize("seed", range(25))
def test_long_walks_in_which_most_goes_well(path: str, seed: int) -> None:
    """The same rules over hundreds of steps: rooms overlap, wait for blocks, and meet the remains of other rooms."""
    chance = random.Random(f"{path} {seed}")
    walk = JoinedMachine()
    walk.begin(path, chance.randint(1, 2), chance.randint(1, 4), chance.choice([None, 1, 6, 100]))

    def number() -> int:
        return chance.randrange(1 << 16)

    def newest() -> int:
        return max(0, len(walk.rooms) - 1 - chance.randrange(6))

    steps: list[tuple[int, Callable[[], object]]] = [
        (60, lambda: walk.go_on([number() for _ in range(chance.randint(1, 8))])),
        (8, lambda: walk.rooms.append(walk.wire.start(chance.randint(1, 60), timeout=chance.choice([20.0, 60.0])))),
        (4, lambda: walk.new_room(chance.randint(1, 60), chance.choice([3, 4, 16]))),
        (5, lambda: walk.to_announce and walk.announce(number())),
        (6, lambda: walk.to_compute and walk.compute(number())),
        (8, lambda: walk.to_expect and walk.expect(number())),
        (5, lambda: walk.rooms and walk.abort(newest(), number())),
        (1, lambda: walk.rooms and walk.forget(newest(), number())),
        (3, lambda: walk.trouble(chance.choice(TROUBLE), newest())),
        (3, lambda: walk.wire.late and walk.late_bytes_land(number())),
        (2, lambda: walk.time_passes(chance.choice([0.5, 5.0]))),
    ]
    for _ in range(400):
        chance.choices([step for _, step in steps], [weight for weight, _ in steps])[0]()
        walk.a_room_that_waits_holds_no_blocks()
    walk.teardown()
