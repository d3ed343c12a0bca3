"""Transfers that succeed, between real processes: many rooms, more than the pool holds, several peers and ranks."""

from __future__ import annotations

import random

import pytest

from sglang_mm_conn.core.states import Poll
from tests.connector.payload import Part
from tests.connector.processes import BLOCK_SIZE, BLOCKS, WIDTH, Encoder, Language, World, wait_for

POOL_TOKENS = BLOCKS * BLOCK_SIZE


def send_all(encoder: Encoder, language: Language, parts: list[Part]) -> None:
    for part in parts:
        language.expect(part, encoder)
    for part in parts:
        encoder.offer(part)


def receive_all(language: Language, parts: list[Part]) -> None:
    for part in parts:
        language.succeeds(part)
    language.wait_all_free()


@pytest.mark.parametrize("inline", [False, True], ids=["by workers", "at once"])
def test_rooms_of_mixed_sizes_at_once_keep_their_bytes_apart(world: World, inline: bool) -> None:
    encoder = world.encoder(inline=inline)
    language = world.language(encoder, inline=inline)
    sizes = random.Random(1)
    parts = [
        world.part(language, sizes.choice([1, 7, 100, 333, POOL_TOKENS, POOL_TOKENS + 1]), sizes.choice([8, 96, WIDTH]))
        for _ in range(60)
    ]
    send_all(encoder, language, parts)
    receive_all(language, parts)
    assert all(encoder.wait_ended(part)["success"] for part in parts)


def test_an_embedding_five_times_the_pool_passes_through_it(world: World) -> None:
    encoder = world.encoder()
    language = world.language(encoder)
    part, other = world.part(language, 5 * POOL_TOKENS), world.part(language, 10)
    send_all(encoder, language, [part, other])
    receive_all(language, [part, other])
    calls = encoder.calls(part)
    assert [call["window"] for call in calls] == list(range(len(calls))) and len(calls) >= 5
    assert sum(call["bytes"] for call in calls) == part.tokens * part.row_bytes


def test_an_announcement_may_come_before_the_request_that_claims_it(world: World) -> None:
    encoder = world.encoder()
    language = world.language(encoder)
    part = world.part(language, 40)
    encoder.offer(part)
    wait_for(lambda: language.stats()["unclaimed"] == 1, "the announcement is unclaimed")
    language.expect(part, encoder)
    language.succeeds(part)


def test_a_language_process_that_registers_late_still_hears_the_announcement(world: World) -> None:
    encoder = world.encoder(claim_timeout=20)
    language = world.language()
    part = world.part(language, 40)
    encoder.offer(part)
    language.expect(part, encoder)
    language.succeeds(part)


def test_several_encoders_share_one_language_process(world: World) -> None:
    encoders = [world.encoder() for _ in range(3)]
    language = world.language(*encoders)
    parts = [(encoder, world.part(language, 300)) for encoder in encoders for _ in range(8)]
    for encoder, part in parts:
        language.expect(part, encoder)
    for encoder, part in parts:
        encoder.offer(part)
    receive_all(language, [part for _, part in parts])


def test_several_language_processes_share_one_encoder(world: World) -> None:
    encoder = world.encoder()
    languages = [world.language(encoder) for _ in range(2)]
    parts = [[world.part(language, 700) for _ in range(8)] for language in languages]
    for language, mine in zip(languages, parts, strict=True):
        send_all(encoder, language, mine)
    for language, mine in zip(languages, parts, strict=True):
        receive_all(language, mine)


def test_language_process_short_of_blocks_does_not_starve_another_at_its_encoder(world: World) -> None:
    encoder = world.encoder(queues=1)  # both on one queue
    poor, rich = world.language(encoder), world.language(encoder)
    taken = poor.call("take_blocks", count=BLOCKS)
    waiting = [world.part(poor, 50) for _ in range(10)]
    send_all(encoder, poor, waiting)
    wait_for(lambda: poor.poll(waiting[-1]) is Poll.WaitingForInput, "all wait for blocks")
    for _ in range(5):
        world.transfer(encoder, rich, timeout=5)
    assert {poor.poll(part) for part in waiting} == {Poll.WaitingForInput}
    poor.call("give_blocks", blocks=taken)
    receive_all(poor, waiting)


def test_both_ranks_of_a_language_server_get_all_rows_without_awaiting_each_other(
    world: World,
) -> None:
    encoder = world.encoder()
    first = world.language(encoder, rank=0, size=2)
    # Half the pool: the windows of the two ranks do not match.
    second = world.language(encoder, server=first.config["server"], rank=1, size=2, blocks=BLOCKS // 2)
    for tokens in (1, POOL_TOKENS // 2 + 5, 2 * POOL_TOKENS):
        part = world.part(first, tokens)
        first.expect(part, encoder)
        encoder.offer(part)
        assert first.poll(part) is not Poll.Success  # the room is not complete
        second.expect(part, encoder)
        first.succeeds(part)
        second.succeeds(part)
        assert encoder.wait_ended(part)["success"]
    assert {call["thread"].rpartition(".")[0] for call in encoder.calls(part)} == {
        encoder.calls(part)[0]["thread"].rpartition(".")[0]
    }, "one shard for all windows of all ranks"


def test_a_resume_of_one_rank_writes_nothing_to_a_rank_whose_resume_has_not_come(world: World) -> None:
    encoder = world.encoder()
    first = world.language(encoder, rank=0, size=2, first_offer=100)
    proxy = world.proxy(encoder)
    second = world.language(encoder, server=first.config["server"], rank=1, size=2, first_offer=100)
    part = world.part(first, 300)
    encoder.hold(part, window=0, rank=1)
    first.expect(part, encoder)
    second.expect(part, encoder)
    encoder.offer(part)
    encoder.wait_held(part, window=0)
    proxy.mute("to_encoder")  # the resume of rank 1 stays on its way
    encoder.release(part, window=0)

    first.succeeds(part)
    assert second.poll(part) is Poll.Transferring
    assert [call["window"] for call in encoder.calls(part) if call["rank"] == 1] == [0]
    room = encoder.room(part)
    assert room is not None and room["state"] == "transferring"

    proxy.mute()
    second.succeeds(part)
    assert encoder.wait_ended(part)["success"]
    second.wait_all_free()


def test_one_token_rooms(world: World) -> None:
    encoder = world.encoder()
    language = world.language(encoder)
    parts = [world.part(language, 1, width) for width in (1, 3, WIDTH) for _ in range(10)]
    send_all(encoder, language, parts)
    receive_all(language, parts)


def test_wide_rows_and_narrow_rows_share_the_pool(world: World) -> None:
    wide = 8192
    encoder = world.encoder(width=wide, blocks=8, block_size=4)
    language = world.language(encoder, width=wide, blocks=8, block_size=4)
    parts = [world.part(language, tokens, width) for tokens, width in ((33, wide), (500, 24), (40, 4097), (1, wide))]
    send_all(encoder, language, parts)
    receive_all(language, parts)


def test_bfloat16_arrives_as_bfloat16(world: World) -> None:
    encoder = world.encoder(dtype="bfloat16")
    language = world.language(encoder, dtype="bfloat16")
    part = world.part(language, 1000, 255, dtype="bfloat16")
    send_all(encoder, language, [part])
    receive_all(language, [part])


def test_metadata_with_tensors_comes_once_and_is_that_of_its_own_room_after_resumes(world: World) -> None:
    encoder = world.encoder()
    language = world.language(encoder, first_offer=BLOCK_SIZE)
    parts = [world.part(language, 4 * POOL_TOKENS), world.part(language, 5), world.part(language, 5, metadata=False)]
    send_all(encoder, language, parts)
    receive_all(language, parts)  # compares metadata too


def test_token_order_is_allocation_order_when_the_free_blocks_lie_in_pieces(world: World) -> None:
    encoder = world.encoder()
    language = world.language(encoder)
    taken = language.call("take_blocks", count=BLOCKS)
    odd = [block for block in taken if block % 2]
    language.call("give_blocks", blocks=[block for block in reversed(taken) if block % 2 == 0])
    part = world.part(language, 3 * POOL_TOKENS)
    send_all(encoder, language, [part])
    language.succeeds(part)
    language.call("give_blocks", blocks=odd)
    language.wait_all_free()


@pytest.mark.parametrize("spelling", ["http://localhost:{port}", "http://127.0.0.1:{port}/"])
def test_an_encoder_may_go_by_two_urls(shm_world: World, spelling: str) -> None:
    encoder = shm_world.encoder()
    language = shm_world.language(encoder)
    shm_world.transfer(encoder, language)
    part = shm_world.part(language, 100)
    language.call("expect", room=part.room, url=spelling.format(port=encoder.port), timeout=10)
    encoder.offer(part)
    language.succeeds(part)
    shm_world.transfer(encoder, language)


def test_auto_takes_shared_memory_on_one_host(shm_world: World) -> None:
    encoder = shm_world.encoder(data_path="auto")
    language = shm_world.language(encoder, data_path="auto")
    shm_world.transfer(encoder, language)
    assert [process["path"] for process in language.call("processes")] == ["shm"]
