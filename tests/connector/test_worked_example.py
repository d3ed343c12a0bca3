"""The worked example of docs/protocol.md between two processes: 2000 tokens, 1024 offered at first."""

from __future__ import annotations

from typing import Any

from sglang_mm_conn.core.sharding import port_sum_queue_index
from sglang_mm_conn.core.states import Poll
from tests.connector.processes import World, wait_for

TOKENS, FIRST, REST = 2000, 1024, 976
QUEUES = 5


def test_2000_tokens_arrive_in_windows_of_1024_and_976_by_one_resume_on_one_queue(world: World) -> None:
    settings: dict[str, Any] = {"block_size": 128, "blocks": 16, "first_offer": FIRST, "queues": QUEUES}
    encoder = world.encoder(**settings)
    language = world.language(encoder, **settings)
    part = world.part(language, TOKENS)
    encoder.hold(part, window=0)
    encoder.hold(part, window=1)
    language.call("expect", room=part.room, url=encoder.url, timeout=30)
    language.call("watch", room=part.room)
    assert language.poll(part) is Poll.Bootstrapping

    encoder.offer(part)  # T0, T1: the first offer is written
    encoder.wait_held(part, window=0)
    assert language.room(part)["allocated_tokens"] == FIRST
    assert language.poll(part) is Poll.Transferring
    first = encoder.room(part)
    assert first is not None and first["state"] == "transferring"
    encoder.release(part, window=0)

    encoder.wait_held(part, window=1)  # T2, T3: 1024 are confirmed, the resume put a new chunk on the same shard
    assert language.poll(part) is Poll.Transferring
    room = language.room(part)
    assert (room["window"], room["sent_tokens"], room["allocated_tokens"]) == (1, FIRST, REST)
    assert len(room["blocks"]) == 8  # which hold 1024: allocated_tokens is what is offered and still needed
    second = encoder.room(part)
    assert second is not None and [info["sent_tokens"] for info in second["infos"].values()] == [FIRST]
    encoder.release(part, window=1)

    language.wait_end(part)  # T4
    ended = encoder.wait_ended(part)
    assert ended["success"], ended
    wait_for(lambda: language.call("history", room=part.room)[-1] == Poll.Success, "the history is complete")
    history = language.call("history", room=part.room)
    assert history == sorted(history) and history[-2:] == [Poll.Transferring, Poll.Success]

    calls = encoder.calls(part)
    assert [call["bytes"] for call in calls] == [FIRST * part.row_bytes, REST * part.row_bytes]
    assert {call["path"] for call in calls} == {world.path}
    (session,) = second["infos"]
    index = port_sum_queue_index([session], QUEUES)
    assert first["queue_idx"] == second["queue_idx"] == index
    assert {call["thread"].rpartition(".")[0] for call in calls} == {f"mm-conn-transfer-{index}"}
    logged = encoder.log_matches(r"Resume transfer triggered: room=(?P<room>\S+), (?P<rest>.*)$")
    assert logged == [{"room": part.room, "rest": f"queue_idx={index}, src_blocks=16"}]

    language.succeeds(part)
    language.wait_all_free()
