"""Ranks of one host: the leader receives an embedding once, the others read it. Early, late, slow and dead."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator

import pytest
import torch

from sglang_mm_conn.connector.language.follower import FollowerEndpoint
from sglang_mm_conn.connector.runtime import Runtime
from sglang_mm_conn.core.errors import ConnError
from sglang_mm_conn.core.rooms import new_id, new_room_base
from sglang_mm_conn.core.settings import Settings
from sglang_mm_conn.core.states import Poll
from sglang_mm_conn.memory.results import Contents, SharedResult, _name
from sglang_mm_conn.memory.segment import DIRECTORY, sweep_stale_segments
from tests.connector.payload import Part
from tests.connector.processes import BLOCK_SIZE, BLOCKS, Rank, World, wait_for

TOKENS = 3 * BLOCKS * BLOCK_SIZE  # three times the pool: two resumes at least
ENCODER = "http://127.0.0.1:1"


def has_name(part: Part, host_index: int = 0) -> bool:
    return os.path.exists(os.path.join(DIRECTORY, _name(part.room, host_index)))


# -- one follower in this process ------------------------------------------------------------------------------------


class ByHand(Runtime):
    """Time passes when the test says so."""

    now = 100.0

    def clock(self) -> float:
        return self.now


@pytest.fixture
def time() -> ByHand:
    return ByHand()


@pytest.fixture
def follower(time: ByHand) -> Iterator[FollowerEndpoint]:
    endpoint = FollowerEndpoint(Settings(), rank=1, runtime=time)
    yield endpoint
    endpoint.close()


@pytest.fixture
def room() -> str:
    return new_room_base(new_id())


@pytest.fixture
def result(room: str) -> Iterator[SharedResult]:
    """What the leader received, not published yet."""
    made = SharedResult(room, Contents(tokens=3, dtype="float32", nbytes=48, metadata=b"grids"))
    made.rows.copy_(torch.arange(12.0).view(torch.uint8))
    yield made
    made.close()


def test_nothing_is_there_before_the_leader_publishes_and_everything_afterwards(
    follower: FollowerEndpoint, room: str, result: SharedResult
) -> None:
    follower.expect(room, ENCODER, 10, "")
    assert follower.poll(room) is Poll.Bootstrapping
    with pytest.raises(ConnError, match="no embedding"):
        follower.take(room)
    result.publish()
    assert follower.poll(room) is Poll.Success
    embedding, metadata = follower.take(room)
    assert torch.equal(embedding, torch.arange(12.0).reshape(3, 4)) and metadata == b"grids"


def test_after_success_the_leader_may_do_what_it_likes(
    follower: FollowerEndpoint, room: str, result: SharedResult, time: ByHand
) -> None:
    follower.expect(room, ENCODER, 10, "")
    result.publish()
    assert follower.poll(room) is Poll.Success
    result.rows.zero_()
    result.close()
    time.now += 1000
    follower.abort(room, "too late to change anything")
    assert follower.poll(room) is Poll.Success
    embedding, _ = follower.take(room)
    follower.forget(room)
    assert torch.equal(embedding, torch.arange(12.0).reshape(3, 4)), "whoever took the rows keeps them"


def test_a_leader_that_publishes_nothing_costs_a_room_its_deadline_and_no_more(
    follower: FollowerEndpoint, room: str, result: SharedResult, time: ByHand
) -> None:
    follower.expect(room, ENCODER, 10, "")
    time.now += 9.9
    assert follower.poll(room) is Poll.Bootstrapping
    time.now += 0.2
    assert follower.poll(room) is Poll.Failed
    assert (
        follower.outcome(room).code == 408 and "rank 1 got no result from its leader" in follower.outcome(room).reason
    )
    result.publish()
    assert follower.poll(room) is Poll.Failed, "Failed is final"


def test_a_result_that_cannot_be_mapped_fails_the_room_and_says_why(
    follower: FollowerEndpoint, room: str, result: SharedResult
) -> None:
    follower.expect(room, ENCODER, 10, "")
    result.publish()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        assert follower.poll(room) is Poll.Failed
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    outcome = follower.outcome(room)
    assert outcome.code == 598 and "rank 1 cannot read" in outcome.reason and "Too many open files" in outcome.reason


def test_an_aborted_room_is_not_looked_at_again(follower: FollowerEndpoint, room: str, result: SharedResult) -> None:
    follower.expect(room, ENCODER, 10, "")
    follower.abort(room, "the client is gone")
    result.publish()
    assert follower.poll(room) is Poll.Failed and follower.outcome(room).reason == "the client is gone"


def test_rooms_are_known_once_and_nothing_is_kept_of_them(follower: FollowerEndpoint, room: str) -> None:
    follower.expect(room, ENCODER, 10, "")
    with pytest.raises(ConnError, match="expected before"):
        follower.expect(room, ENCODER, 10, "")
    with pytest.raises(ConnError, match="its leader offers"):
        follower.resume_transfer(room, [0], 0, 1)
    follower.forget(room)
    for ask in (follower.poll, follower.outcome, follower.take):
        with pytest.raises(ConnError, match="unknown"):
            ask(room)
    follower.abort(room, "unknown: harmless")
    follower.forget(room)


# -- leader and followers as processes -------------------------------------------------------------------------------


def agreed(part: Part, *ranks: Rank) -> None:
    """What sglang's ranks do when all have ended: nobody needs the room any more."""
    for rank in ranks:
        rank.forget(part)
    assert not has_name(part, 0) and not has_name(part, 1)


def test_one_copy_crosses_and_every_rank_of_the_host_has_it(world: World) -> None:
    encoder = world.encoder()
    leader = world.language(encoder, leads=True)
    followers = [world.follower(leader, rank) for rank in (1, 2)]
    part = world.part(leader, TOKENS)
    for rank in (leader, *followers):
        rank.expect(part, encoder)
    encoder.offer(part)
    for rank in (leader, *followers):
        assert rank.wait_end(part) is Poll.Success, rank.outcome(part)
    for rank in (*followers, leader):
        rank.has(part)  # grids and all
    calls = encoder.calls(part)
    assert len(calls) >= 3
    assert sum(call["bytes"] for call in calls) == TOKENS * part.row_bytes, "one embedding, not three"
    assert encoder.stats()["sessions"] == 1
    leader.forget(part)
    assert not has_name(part)
    for follower in followers:
        follower.succeeds(part)  # the name is gone, what is mapped is not
        assert follower.stats()["rooms"] == 0
    leader.wait_all_free()


def test_two_hosts_get_two_copies_each_in_windows_of_its_own(shm_world: World) -> None:
    encoder = shm_world.encoder()
    server = new_id()
    leaders = [
        shm_world.language(encoder, server=server, rank=rank, size=2, leads=True, blocks=blocks)
        for rank, blocks in ((0, BLOCKS), (1, BLOCKS // 4))
    ]
    followers = [shm_world.follower(leader, rank=2 * index + 1) for index, leader in enumerate(leaders)]
    part = shm_world.part(leaders[0], TOKENS)
    encoder.hold(part, window=1, rank=1)  # in mid-write into the second host's blocks
    for rank in (*leaders, *followers):
        rank.expect(part, encoder)
    encoder.offer(part)
    encoder.wait_held(part, window=1)
    assert followers[1].poll(part) is Poll.Bootstrapping
    encoder.release(part, window=1)
    for rank in (*leaders, *followers):
        assert rank.wait_end(part) is Poll.Success, rank.outcome(part)
        rank.has(part)
    calls = encoder.calls(part)
    for number, windows in ((0, 3), (1, 12)):
        mine = [call["bytes"] for call in calls if call["rank"] == number]
        assert len(mine) == windows and sum(mine) == TOKENS * part.row_bytes
    agreed(part, *leaders, *followers)


def test_a_slow_rank_finds_the_result_as_long_as_the_leader_keeps_it(shm_world: World) -> None:
    encoder = shm_world.encoder()
    leader = shm_world.language(encoder, leads=True)
    slow = shm_world.follower(leader)
    early, late = shm_world.part(leader, TOKENS), shm_world.part(leader, 10)
    slow.expect(early, encoder)
    slow.freeze()
    for part in (early, late):
        leader.expect(part, encoder)
        encoder.offer(part)
        assert leader.wait_end(part) is Poll.Success, leader.outcome(part)
    slow.thaw()
    slow.expect(late, encoder)  # a rank that hears of the request when everything is over
    for part in (early, late):
        assert slow.wait_end(part) is Poll.Success
        slow.has(part)
        leader.has(part)
        agreed(part, leader, slow)
    leader.wait_all_free()


def test_a_rank_that_comes_too_late_fails_and_does_not_hang(shm_world: World) -> None:
    """It cannot come to this in sglang, whose ranks agree before the leader forgets."""
    encoder = shm_world.encoder()
    leader = shm_world.language(encoder, leads=True)
    late = shm_world.follower(leader)
    part = shm_world.part(leader, 10)
    leader.expect(part, encoder)
    encoder.offer(part)
    leader.succeeds(part)
    late.expect(part, encoder, timeout=0.5)
    assert late.fails(part)["code"] == 408


@pytest.mark.parametrize("who", ["encoder", "client"])
def test_what_fails_on_the_leader_is_never_seen_by_the_others(who: str, world: World) -> None:
    encoder = world.encoder()
    leader = world.language(encoder, leads=True)
    follower = world.follower(leader)
    part = world.part(leader, TOKENS)
    for rank in (leader, follower):
        rank.expect(part, encoder)
    encoder.hold(part, window=1)
    encoder.offer(part)
    encoder.wait_held(part, window=1)
    if who == "encoder":
        encoder.call("fail", room=part.room, reason="the model failed", code=500)
    else:
        leader.abort(part)
    leader.fails(part)
    assert follower.poll(part) is Poll.Bootstrapping and not has_name(part)
    follower.abort(part, "failed on another rank")  # what sglang's ranks do when one of them has failed
    assert follower.fails(part)["reason"] == "failed on another rank"
    encoder.release(part, window=1)
    agreed(part, leader, follower)
    leader.wait_all_free()


def test_leader_killed_in_mid_transfer_costs_its_ranks_the_deadline_only(shm_world: World) -> None:
    encoder = shm_world.encoder()
    leader = shm_world.language(encoder, leads=True)
    follower = shm_world.follower(leader)
    done, held = shm_world.part(leader, 10), shm_world.part(leader, TOKENS)
    for part in (done, held):
        leader.expect(part, encoder)
        follower.expect(part, encoder, timeout=3)
    encoder.offer(done)
    assert follower.wait_end(done) is Poll.Success
    encoder.hold(held, window=1)
    encoder.offer(held)
    encoder.wait_held(held, window=1)
    leader.kill()
    follower.has(done)
    assert follower.fails(held)["code"] == 408
    sweep_stale_segments()  # what every server does when it starts, and so may have been done here already
    assert not has_name(done) and not has_name(held)
    follower.succeeds(done)
    encoder.release(held, window=1)
    encoder.wait_ended(held)


def test_a_follower_killed_costs_the_leader_nothing(shm_world: World) -> None:
    encoder = shm_world.encoder()
    leader = shm_world.language(encoder, leads=True)
    follower = shm_world.follower(leader)
    part = shm_world.part(leader, TOKENS)
    for rank in (leader, follower):
        rank.expect(part, encoder)
    encoder.offer(part)
    assert follower.wait_end(part) is Poll.Success
    follower.kill()
    leader.has(part)
    agreed(part, leader)
    shm_world.transfer(encoder, leader)


def test_results_that_come_and_go_leave_nothing_behind_in_any_rank(shm_world: World) -> None:
    encoder = shm_world.encoder()
    leader = shm_world.language(encoder, leads=True)
    follower = shm_world.follower(leader)

    def run(count: int) -> None:
        for _ in range(count):
            part = shm_world.part(leader, 50)
            for rank in (leader, follower):
                rank.expect(part, encoder)
            encoder.offer(part)
            for rank in (leader, follower):
                assert rank.wait_end(part) is Poll.Success
                rank.has(part)
            agreed(part, leader, follower)
            encoder.wait_ended(part)

    run(5)
    before = leader.stats(), follower.stats()
    run(40)
    wait_for(lambda: leader.stats()["results"] == 0, "no result is kept")
    for was, now in zip(before, (leader.stats(), follower.stats()), strict=True):
        assert now["fds"] <= was["fds"] + 2 and now["threads"] <= was["threads"]
        assert now["rss_kb"] - was["rss_kb"] < 16 << 10
