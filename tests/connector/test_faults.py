"""What goes wrong between real processes: right bytes or a clear failure, and nobody else is hurt."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import zmq

from sglang_mm_conn.core.messages import Init, Refused, decode_from_encoder, encode
from sglang_mm_conn.core.rooms import new_id, new_room_base
from sglang_mm_conn.core.states import Poll
from sglang_mm_conn.memory.segment import DIRECTORY
from tests.connector.payload import Part
from tests.connector.processes import (
    BLOCK_SIZE,
    BLOCKS,
    HEARTBEAT,
    PEER_TIMEOUT,
    Encoder,
    Language,
    World,
    stays,
    wait_for,
)

# A failure that is noticed, not waited out: well below the rooms' own time.
NOTICED = PEER_TIMEOUT + 8
TOKENS = 100
ROOM_BLOCKS = -(-TOKENS // BLOCK_SIZE)
# As short as Mooncake allows; its own are 30 s.
SHORT_TIMEOUTS = {
    "MC_TCP_STATUS_TIMEOUT_SEC": "5", "MC_TCP_PROGRESS_TIMEOUT_SEC": "5", "MC_TRANSFER_TIMEOUT": "5",
}  # fmt: skip


@dataclass
class Bystander:
    """A room in mid-write while something happens to others."""

    encoder: Encoder
    language: Language
    part: Part

    def unharmed(self) -> None:
        self.encoder.release(self.part)
        self.language.succeeds(self.part)


def bystander(world: World, encoder: Encoder, language: Language) -> Bystander:
    part = world.part(language, TOKENS)
    start_and_hold(encoder, language, part)
    return Bystander(encoder, language, part)


def start_and_hold(encoder: Encoder, language: Language, part: Part, window: int = 0) -> None:
    """Start a transfer and stop it in the middle of the data call of ``window``."""
    encoder.hold(part, window)
    language.expect(part, encoder)
    encoder.offer(part)
    encoder.wait_held(part, window)


def still_quarantined(language: Language, blocks: list[int], seconds: float = 0.5) -> None:
    """Assert that nobody gets ``blocks`` for a while."""
    assert blocks
    stays(lambda: language.call("quarantine") == blocks, f"{blocks} stay in quarantine", seconds)
    free = language.stats()["free"]
    if free:
        spare = language.call("take_blocks", count=free)
        assert not set(spare) & set(blocks)
        language.call("give_blocks", blocks=spare)


# -- the encoder dies --------------------------------------------------------------------------------------------------


def test_room_whose_encoder_dies_before_announcing_fails_at_its_deadline(world: World) -> None:
    encoder, other = world.encoder(), world.encoder()
    language = world.language(encoder, other)
    safe = bystander(world, other, language)
    part = world.part(language, TOKENS)
    language.expect(part, encoder, timeout=2.5)
    encoder.kill()
    language.fails(part, timeout=5)
    safe.unharmed()
    language.wait_all_free()


@pytest.mark.parametrize("moment", ["announced", "mid_write"])
def test_a_room_whose_encoder_dies_fails_soon_and_names_the_encoder(world: World, moment: str) -> None:
    encoder, other = world.encoder(), world.encoder()
    language = world.language(encoder, other)
    safe = bystander(world, other, language)
    part = world.part(language, TOKENS)
    if moment == "announced":
        language.expect(part, encoder)
        encoder.announce(part)
        wait_for(lambda: language.room(part)["state"] == "offered", "blocks are offered")
    else:
        start_and_hold(encoder, language, part)
    encoder.kill()
    outcome = language.fails(part, timeout=NOTICED)
    assert encoder.url in outcome["reason"] and outcome["code"] == 502
    safe.unharmed()
    language.wait_all_free()
    world.transfer(other, language)


def test_a_room_that_waits_to_resume_when_its_encoder_dies_leaves_no_quarantine(world: World) -> None:
    encoder, other = world.encoder(), world.encoder()
    language = world.language(encoder, other, blocks=ROOM_BLOCKS, regions=1)
    part, ahead = world.part(language, 3 * TOKENS), world.part(language, TOKENS)
    start_and_hold(encoder, language, part)  # it has the whole pool
    other.hold(ahead)
    language.expect(ahead, other)
    other.offer(ahead)
    wait_for(lambda: language.poll(ahead) is Poll.WaitingForInput, "the other room waits for blocks")
    encoder.release(part)
    other.wait_held(ahead)  # first come, first served: now `part` waits, and holds nothing
    assert language.poll(part) is Poll.Transferring and not language.room(part)["blocks"]
    encoder.kill()
    language.fails(part, timeout=NOTICED)
    assert language.quarantined == 0
    other.release(ahead)
    language.succeeds(ahead)
    language.wait_all_free()


def test_an_encoder_restarted_on_the_same_port_is_a_new_one(world: World) -> None:
    encoder, other = world.encoder(), world.encoder()
    language = world.language(encoder, other)
    safe = bystander(world, other, language)
    old, not_announced = world.part(language, TOKENS), world.part(language, TOKENS)
    start_and_hold(encoder, language, old)
    language.expect(not_announced, encoder)
    encoder.kill()
    again = world.encoder(port=encoder.port)
    assert again.url == encoder.url
    language.fails(old, timeout=NOTICED)
    language.wait_ready(again, timeout=NOTICED)
    again.offer(old)  # the name of a room that failed serves nobody
    assert not again.wait_ended(old, timeout=NOTICED)["success"]
    again.offer(not_announced)
    language.succeeds(not_announced)
    for _ in range(3):
        world.transfer(again, language)
    safe.unharmed()
    language.wait_all_free()
    assert language.stats()["processes"] == 2


def test_a_restart_that_no_look_up_can_see_is_noticed_by_the_new_incarnation(world: World) -> None:
    encoder = world.encoder(peer_timeout=20)
    language = world.language(encoder, peer_timeout=20)
    old = world.part(language, TOKENS)
    language.expect(old, encoder)
    encoder.announce(old)
    wait_for(lambda: language.poll(old) is Poll.Transferring, "blocks are offered")
    encoder.hello = encoder.call("restart")
    assert "restarted" in language.fails(old, timeout=5)["reason"]
    language.wait_ready(encoder)
    world.transfer(encoder, language)


# -- the encoder freezes -----------------------------------------------------------------------------------------------


def test_an_encoder_frozen_for_less_than_the_peer_timeout_goes_on_in_mid_write(world: World) -> None:
    encoder, other = world.encoder(peer_timeout=20), world.encoder(peer_timeout=20)
    language = world.language(encoder, other, peer_timeout=20)
    safe = bystander(world, other, language)
    part = world.part(language, 5 * BLOCKS * BLOCK_SIZE)
    start_and_hold(encoder, language, part, window=1)
    encoder.freeze()
    stays(lambda: language.poll(part) is Poll.Transferring, "the room waits", 5 * HEARTBEAT)
    safe.unharmed()
    encoder.thaw()
    encoder.release(part, window=1)
    language.succeeds(part)
    language.wait_all_free()


@pytest.mark.parametrize("ending", ["killed", "thawed"])
def test_blocks_of_a_writer_frozen_in_mid_write_wait_until_it_answers_or_is_gone(world: World, ending: str) -> None:
    encoder, other = world.encoder(), world.encoder()
    language = world.language(encoder, other)
    safe = bystander(world, other, language)
    part = world.part(language, TOKENS)
    start_and_hold(encoder, language, part)
    blocks = sorted(language.room(part)["blocks"])
    encoder.freeze()
    outcome = language.fails(part, timeout=NOTICED)
    assert encoder.url in outcome["reason"]
    still_quarantined(language, blocks)
    safe.unharmed()
    for _ in range(3):
        world.transfer(other, language)
    assert language.call("quarantine") == blocks
    if ending == "killed":
        encoder.kill()
        language.wait_all_free()
    else:
        encoder.thaw()
        still_quarantined(language, blocks, 1.0)  # its data call has not returned
        encoder.release(part)
        language.wait_all_free()
        assert not encoder.wait_ended(part)["success"]
        world.transfer(encoder, language)


# -- the language process dies or freezes ------------------------------------------------------------------------------


def test_a_language_process_killed_in_mid_write_costs_the_encoder_that_room_only(world: World) -> None:
    encoder = world.encoder()
    language, other = world.language(encoder), world.language(encoder)
    safe = bystander(world, encoder, other)
    part = world.part(language, 5 * BLOCKS * BLOCK_SIZE)
    start_and_hold(encoder, language, part, window=1)
    language.kill()
    ended = encoder.wait_ended(part, timeout=NOTICED)
    assert not ended["success"] and ended["reason"]
    again = world.language(encoder)
    world.transfer(encoder, again)
    encoder.release(part, window=1)
    safe.unharmed()
    for target in (again, other):
        world.transfer(encoder, target)
    wait_for(lambda: encoder.stats()["sessions"] == 2, "the dead process's session is dropped")
    wait_for(lambda: encoder.stats()["links"] == 2, "the dead process's link is closed")
    assert encoder.stats()["sources"] == 0
    other.wait_all_free()


def test_a_segment_whose_owner_was_killed_is_unlinked_by_the_next_process(shm_world: World) -> None:
    encoder = shm_world.encoder()
    language, living = shm_world.language(encoder), shm_world.language(encoder)
    files = [Path(DIRECTORY, item.hello["segment"]) for item in (language, living)]
    language.kill()
    assert all(file.exists() for file in files)
    shm_world.language()
    assert [file.exists() for file in files] == [False, True]


def test_an_encoder_outlives_many_language_processes_killed_in_mid_write(world: World) -> None:
    encoder = world.encoder()
    survivor = world.language(encoder)
    for _ in range(6):
        language = world.language(encoder)
        part = world.part(language, TOKENS)
        language.expect(part, encoder)
        encoder.hold(part)
        encoder.offer(part)
        wait_for(partial(encoder.calls, part), "the data call has begun")
        language.kill()
        encoder.release(part)
        encoder.wait_ended(part, timeout=NOTICED)  # on shared memory the write may well have been a success
    world.transfer(encoder, survivor, timeout=10)


def test_a_language_process_frozen_for_longer_than_the_peer_timeout_comes_back(world: World) -> None:
    encoder = world.encoder()
    language, other = world.language(encoder), world.language(encoder)
    safe = bystander(world, encoder, other)
    part = world.part(language, TOKENS)
    language.expect(part, encoder)
    encoder.announce(part)
    encoder.wait_init(part)
    language.freeze()
    ended = encoder.wait_ended(part, timeout=NOTICED)
    assert not ended["success"] and "silent" in ended["reason"]
    safe.unharmed()
    language.thaw()
    language.fails(part, timeout=NOTICED)
    language.wait_all_free()
    world.transfer(encoder, language)


def freeze_in_mid_write(world: World, encoder: Encoder, language: Language, rooms: int) -> list[Part]:
    """Start data calls to a language process that does not run: to Mooncake they hang, more than sockets buffer."""
    world.transfer(encoder, language)  # a first contact would hang for a minute, whatever the settings
    parts = [world.part(language, 16 * 1024) for _ in range(rooms)]  # 16 MiB each
    for part in parts:
        language.expect(part, encoder)
        encoder.announce(part)
        encoder.wait_init(part)
    language.freeze()
    for part in parts:
        encoder.send(part)
    wait_for(lambda: encoder.calls(parts[0]), "the first data call has begun")
    return parts


def test_a_frozen_destination_does_not_hold_up_another_one_on_the_same_queue(world: World) -> None:
    encoder = world.encoder(queues=1, workers=2, env=SHORT_TIMEOUTS)
    frozen, other = world.language(encoder, blocks=4096), world.language(encoder)
    freeze_in_mid_write(world, encoder, frozen, rooms=4)
    for _ in range(3):
        world.transfer(encoder, other, timeout=4)


def test_an_encoder_still_serves_others_after_a_destination_froze_in_mid_write(world: World) -> None:
    encoder = world.encoder(queues=1, env=SHORT_TIMEOUTS)
    frozen, other = world.language(encoder, blocks=4096), world.language(encoder)
    parts = freeze_in_mid_write(world, encoder, frozen, rooms=4)
    wait_for(lambda: encoder.stats()["rooms"] < len(parts), "a data call has returned")
    for _ in range(3):
        world.transfer(encoder, other, timeout=6)
    frozen.thaw()
    frozen.wait_ready(encoder)
    for part in parts:
        frozen.wait_end(part)  # on shared memory the write may well have been a success
    world.transfer(encoder, frozen)
    wait_for(lambda: frozen.quarantined == 0, "no quarantine is left")


# -- the language side gives up ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["expected", "waiting", "offered", "mid_write", "resumed", "success"])
def test_abort_in_any_phase_ends_the_encode_and_frees_blocks_that_nobody_writes(world: World, phase: str) -> None:
    encoder = world.encoder()
    language = world.language(encoder)
    safe = bystander(world, encoder, language)
    part = world.part(language, 5 * BLOCKS * BLOCK_SIZE if phase == "resumed" else TOKENS)
    taken: list[int] = []
    if phase == "waiting":
        taken = language.call("take_blocks", count=language.stats()["free"])
    if phase in ("mid_write", "resumed"):
        start_and_hold(encoder, language, part, window=int(phase == "resumed"))
    else:
        language.expect(part, encoder)
    if phase == "waiting":
        encoder.offer(part)
        wait_for(lambda: language.poll(part) is Poll.WaitingForInput, "waits for blocks")
    elif phase == "offered":
        encoder.announce(part)
        wait_for(lambda: language.poll(part) is Poll.Transferring, "blocks are offered")
    elif phase == "success":
        encoder.offer(part)
        wait_for(lambda: language.poll(part) is Poll.Success, "arrives")
    blocks = sorted(language.room(part)["blocks"])

    language.abort(part)
    if phase == "success":
        language.succeeds(part)
        assert encoder.wait_ended(part)["success"]
    else:
        assert language.fails(part)["reason"] == "the client is gone"
        if phase == "expected":
            encoder.offer(part)
        ended = encoder.wait_ended(part, timeout=NOTICED)
        assert not ended["success"] and ended["code"] == 499
    if phase in ("mid_write", "resumed"):
        still_quarantined(language, blocks)
        if phase == "mid_write":  # the other one has the whole pool
            world.transfer(encoder, language)
        assert language.call("quarantine") == blocks
        encoder.release(part, window=int(phase == "resumed"))
    wait_for(lambda: language.quarantined == 0, "no quarantine is left")
    language.call("give_blocks", blocks=taken)
    safe.unharmed()
    language.wait_all_free()
    wait_for(lambda: encoder.stats()["sources"] == 0, "no source is left")


def test_an_encode_that_nobody_claims_is_released_after_the_claim_timeout(world: World) -> None:
    encoder = world.encoder()
    language = world.language(encoder)
    safe = bystander(world, encoder, language)
    part = world.part(language, TOKENS)
    encoder.offer(part)
    ended = encoder.wait_ended(part, timeout=NOTICED)
    assert not ended["success"] and "claimed" in ended["reason"]
    late = world.part(language, TOKENS)
    safe.unharmed()
    stats = encoder.stats()
    assert (stats["rooms"], stats["sources"], stats["listeners"]) == (0, 0, 0)
    assert language.stats()["unclaimed"] == 0
    language.expect(late, encoder)
    encoder.offer(late)
    language.succeeds(late)


def test_encode_for_an_absent_language_server_is_released_after_the_claim_timeout(world: World) -> None:
    encoder = world.encoder()
    language = world.language(encoder)
    safe = bystander(world, encoder, language)
    gone = Part(new_room_base(new_id()), TOKENS, 8, 99)
    encoder.offer(gone)
    assert not encoder.wait_ended(gone, timeout=NOTICED)["success"]
    safe.unharmed()


def test_a_room_that_outlives_its_deadline_fails_on_both_sides_in_time(world: World) -> None:
    encoder = world.encoder()
    language = world.language(encoder)
    safe = bystander(world, encoder, language)
    part = world.part(language, TOKENS)
    started = time.monotonic()
    language.expect(part, encoder, timeout=2)
    encoder.announce(part)  # and the embedding never comes
    encoder.wait_ended(part, timeout=4)
    outcome = language.fails(part, timeout=4)
    assert time.monotonic() - started < 4
    assert outcome["code"] in (408, 504) and "not finished" in outcome["reason"]
    safe.unharmed()
    language.wait_all_free()


def test_deadline_in_mid_write_quarantines_the_blocks_until_the_write_is_over(world: World) -> None:
    encoder = world.encoder()
    language = world.language(encoder)
    safe = bystander(world, encoder, language)
    part = world.part(language, TOKENS)
    encoder.hold(part)
    language.expect(part, encoder, timeout=2)
    encoder.offer(part)
    encoder.wait_held(part)
    blocks = sorted(language.room(part)["blocks"])
    language.fails(part, timeout=4)
    still_quarantined(language, blocks)
    encoder.release(part)
    safe.unharmed()
    language.wait_all_free()


# -- the encode or the data call fails ---------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["not_announced", "announced", "resumed"])
def test_a_failed_encode_tells_the_language_side_its_code_and_reason(world: World, moment: str) -> None:
    encoder = world.encoder()
    language = world.language(encoder)
    safe = bystander(world, encoder, language)
    part = world.part(language, TOKENS)
    language.expect(part, encoder)
    if moment == "announced":
        encoder.announce(part)
        wait_for(lambda: language.poll(part) is Poll.Transferring, "blocks are offered")
    encoder.call("fail", room=part.room, reason="the image is no image", code=422)
    assert language.fails(part, timeout=NOTICED) == {"reason": "the image is no image", "code": 422}
    safe.unharmed()
    language.wait_all_free()


def test_failure_before_the_language_process_registers_reaches_it_when_it_does(world: World) -> None:
    encoder = world.encoder(claim_timeout=20)
    language = world.language()
    part = world.part(language, TOKENS)
    encoder.call("fail", room=part.room, reason="the image is no image", code=422)
    language.expect(part, encoder)
    assert language.fails(part, timeout=NOTICED)["code"] == 422


@pytest.mark.parametrize("failure", ["not_in_doubt", "in_doubt", "unexpected"])
def test_a_failed_data_call_ends_its_room_and_the_worker_lives_on(world: World, failure: str) -> None:
    encoder = world.encoder(queues=1, workers=4)
    language = world.language(encoder)
    safe = bystander(world, encoder, language)
    parts = [world.part(language, TOKENS) for _ in range(2)]
    for part in parts:
        encoder.call("gate", room=part.room, window=0, action=failure)
        language.expect(part, encoder)
        encoder.offer(part)
        outcome = language.fails(part, timeout=NOTICED)
        assert "data call" in outcome["reason"] and not encoder.wait_ended(part)["success"]
    safe.unharmed()
    for _ in range(3):
        world.transfer(encoder, language)
    if failure == "not_in_doubt" or (failure == "unexpected" and world.path == "shm"):
        language.wait_all_free()  # a copy is synchronous: however it ended, nothing more lands
        return
    blocks = language.call("quarantine")
    assert len(blocks) == 2 * ROOM_BLOCKS
    for part in parts:
        language.abort(part)
    still_quarantined(language, blocks)
    encoder.kill()
    language.wait_all_free()


# -- two sides that do not fit -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoder_has", "language_has", "named"),
    [
        ({"block_size": 16}, {"block_size": 32}, ("16", "32", "SGLANG_EMBEDDING_CACHE_BLOCK_SIZE")),
        ({"dtype": "bfloat16"}, {"dtype": "float32"}, ("bfloat16", "float32")),
        ({"width": 512}, {"width": 256}, ("2048", "1024")),
        ({"checksum": False}, {"checksum": True}, ("False", "True", "SGLANG_MM_CONN_CHECKSUM")),
        ({"data_path": "mooncake"}, {"data_path": "shm"}, ("mooncake", "shm", "SGLANG_MM_CONN_DATA_PATH")),
        ({"data_path": "shm"}, {"data_path": "mooncake"}, ("mooncake", "shm", "SGLANG_MM_CONN_DATA_PATH")),
    ],
)
def test_two_sides_that_do_not_fit_refuse_at_once_and_name_both_values(
    shm_world: World, encoder_has: dict[str, Any], language_has: dict[str, Any], named: tuple[str, ...]
) -> None:
    encoder, fitting = shm_world.encoder(**encoder_has), shm_world.encoder(**language_has)
    language = shm_world.language(fitting, **language_has)
    safe = bystander(shm_world, fitting, language)
    for _ in range(2):  # the second request hears it too
        part = shm_world.part(language, TOKENS)
        language.expect(part, encoder)
        reason = language.fails(part, timeout=3)["reason"]
        assert all(value in reason for value in named), reason
    safe.unharmed()
    language.wait_all_free()


def test_encoder_restarted_with_the_right_settings_is_not_refused_for_the_old_ones(world: World) -> None:
    wrong = world.encoder(block_size=2 * BLOCK_SIZE)
    language = world.language()
    part = world.part(language, TOKENS)
    language.expect(part, wrong)
    language.fails(part, timeout=3)
    wrong.kill()
    wait_for(lambda: not language.call("processes"), "it is noticed that the encoder is gone")
    right = world.encoder(port=wrong.port)
    world.transfer(right, language, timeout=10)


@pytest.mark.parametrize("fault", [{"tamper": ("shm",)}, {"refusals": {"shm": "another mount namespace"}}])
def test_a_forced_shared_memory_that_cannot_be_had_is_an_error(shm_world: World, fault: dict[str, Any]) -> None:
    encoder, other = shm_world.encoder(**fault), shm_world.encoder()
    language = shm_world.language(other)
    safe = bystander(shm_world, other, language)
    part = shm_world.part(language, TOKENS)
    language.expect(part, encoder)
    reason = language.fails(part, timeout=3)["reason"]
    assert "another mount namespace" in reason or "nonce" in reason
    safe.unharmed()


@pytest.mark.parametrize("fault", [{"tamper": ("shm",)}, {"refusals": {"shm": "another mount namespace"}}])
def test_auto_takes_mooncake_where_the_segment_cannot_be_opened(shm_world: World, fault: dict[str, Any]) -> None:
    remote, local = shm_world.encoder(data_path="auto", **fault), shm_world.encoder(data_path="auto")
    language = shm_world.language(local, remote, data_path="auto")
    paths = {process["incarnation"]: process["path"] for process in language.call("processes")}
    assert paths == {local.hello["incarnation"]: "shm", remote.hello["incarnation"]: "mooncake"}
    for encoder in (local, remote):
        part = shm_world.part(language, 3 * BLOCKS * BLOCK_SIZE)
        language.expect(part, encoder)
        encoder.offer(part)
        language.succeeds(part)
        assert {call["path"] for call in encoder.calls(part)} == {paths[encoder.hello["incarnation"]]}


# -- the control connection --------------------------------------------------------------------------------------------


# Rows confirmed after each window of the part that is cut: the first offer, all free blocks, the rest.
CUT_WINDOWS = (TOKENS, TOKENS + ROOM_BLOCKS * BLOCK_SIZE, 3 * TOKENS)


@dataclass
class Cut:
    """An encoder behind a proxy, a language process, a bystander that does not go through the proxy."""

    world: World

    def __post_init__(self) -> None:
        # Only the connection is lost, no process: nobody shall be silent for too long.
        self.other = self.world.encoder()
        self.encoder = self.world.encoder(peer_timeout=20)
        self.proxy = self.world.proxy(self.encoder)
        # The bystander has one half of the pool; the other half makes three windows of the part.
        self.language = self.world.language(
            self.other, self.encoder, peer_timeout=20, first_offer=TOKENS, blocks=2 * ROOM_BLOCKS, regions=1
        )
        self.safe = bystander(self.world, self.other, self.language)
        self.part = self.world.part(self.language, 3 * TOKENS)

    def wait_reconnected(self) -> None:
        wait_for(lambda: self.proxy.connections >= 2, "a new connection")
        wait_for(lambda: self.encoder.log.read_text().count(" registered: ") >= 2, "registered again")

    def sent_tokens(self) -> int:
        room = self.encoder.room(self.part)
        return sum(info["sent_tokens"] for info in room["infos"].values()) if room is not None else -1

    def finish(self) -> None:
        self.language.succeeds(self.part)
        self.safe.unharmed()
        ended = self.encoder.wait_ended(self.part)
        assert ended["success"], ended
        assert [call["window"] for call in self.encoder.calls(self.part)] == [0, 1, 2], "no window is written twice"
        self.language.wait_all_free()


@pytest.mark.parametrize("window", [0, 1, 2])
def test_a_connection_lost_and_found_in_mid_write_hurts_no_room(world: World, window: int) -> None:
    cut = Cut(world)
    start_and_hold(cut.encoder, cut.language, cut.part, window)
    cut.proxy.cut()
    cut.wait_reconnected()
    stays(lambda: cut.language.poll(cut.part) is Poll.Transferring, "goes on", 0.3)
    cut.encoder.release(cut.part, window)
    cut.finish()


@pytest.mark.parametrize("window", [0, 1, 2])
def test_a_confirmation_lost_with_the_connection_is_said_again(world: World, window: int) -> None:
    cut = Cut(world)
    start_and_hold(cut.encoder, cut.language, cut.part, window)
    cut.proxy.mute("to_language")
    cut.encoder.release(cut.part, window)
    if window < 2:
        wait_for(lambda: cut.sent_tokens() == CUT_WINDOWS[window], "the window is confirmed")
    else:
        cut.encoder.wait_ended(cut.part)
    assert cut.language.room(cut.part)["state"] == "offered"
    cut.proxy.cut()
    cut.finish()


def test_an_announcement_lost_with_the_connection_is_said_again(world: World) -> None:
    cut = Cut(world)
    cut.language.expect(cut.part, cut.encoder)
    cut.proxy.mute("to_language")
    cut.encoder.offer(cut.part)
    cut.proxy.cut()
    cut.finish()


def test_an_init_lost_with_the_connection_is_said_again(world: World) -> None:
    cut = Cut(world)
    cut.language.expect(cut.part, cut.encoder)
    cut.proxy.mute("to_encoder")
    cut.encoder.offer(cut.part)
    wait_for(lambda: cut.language.room(cut.part)["state"] == "offered", "Init is on its way")
    cut.proxy.cut()
    cut.finish()


def test_a_resume_lost_with_the_connection_is_said_again(world: World) -> None:
    cut = Cut(world)
    start_and_hold(cut.encoder, cut.language, cut.part)
    cut.proxy.mute("to_encoder")
    cut.encoder.release(cut.part)
    wait_for(lambda: cut.language.room(cut.part)["window"] == 1, "Resume is on its way")
    cut.proxy.cut()
    cut.finish()


@pytest.mark.parametrize("lost", ["abort", "drained"])
def test_an_abort_lost_with_the_connection_does_not_leave_the_blocks_in_quarantine(world: World, lost: str) -> None:
    cut = Cut(world)
    start_and_hold(cut.encoder, cut.language, cut.part)
    blocks = sorted(cut.language.room(cut.part)["blocks"])
    cut.proxy.mute("to_encoder" if lost == "abort" else "to_language")
    cut.language.abort(cut.part)
    if lost == "abort":
        cut.proxy.cut()
        cut.wait_reconnected()
    assert not cut.encoder.wait_ended(cut.part)["success"]
    still_quarantined(cut.language, blocks)
    cut.encoder.release(cut.part)
    if lost == "drained":
        wait_for(lambda: cut.encoder.room(cut.part) is None, "the write is over")
        still_quarantined(cut.language, blocks)
        cut.proxy.cut()
    cut.safe.unharmed()
    cut.language.wait_all_free()


@pytest.mark.parametrize("announced", [False, True])
def test_a_failed_encode_lost_with_the_connection_is_said_again(world: World, announced: bool) -> None:
    cut = Cut(world)
    cut.language.expect(cut.part, cut.encoder)
    if announced:
        cut.encoder.announce(cut.part)
        cut.encoder.wait_init(cut.part)
    cut.proxy.mute("to_language")
    cut.encoder.call("fail", room=cut.part.room, reason="the image is no image", code=422)
    cut.proxy.cut()
    assert cut.language.fails(cut.part, timeout=NOTICED)["code"] == 422
    cut.safe.unharmed()
    cut.language.wait_all_free()


def test_a_connection_that_breaks_again_and_again_loses_no_row(world: World) -> None:
    cut = Cut(world)
    part = world.part(cut.language, 12 * ROOM_BLOCKS * BLOCK_SIZE)
    for window in range(1, 11):
        cut.encoder.hold(part, window)
    cut.language.expect(part, cut.encoder)
    cut.encoder.offer(part)
    for window in range(1, 11):
        cut.encoder.wait_held(part, window)
        cut.proxy.cut()
        cut.encoder.release(part, window)  # the confirmation may be lost, or the Resume, or nothing
    cut.language.succeeds(part)
    windows = [call["window"] for call in cut.encoder.calls(part)]
    assert windows == sorted(set(windows))
    cut.safe.unharmed()
    cut.language.wait_all_free()


def test_silent_network_fails_rooms_and_quarantines_their_blocks(
    world: World,
) -> None:
    encoder, other = world.encoder(), world.encoder()
    proxy = world.proxy(encoder)
    language = world.language(encoder, other)
    safe = bystander(world, other, language)
    parts = [world.part(language, TOKENS) for _ in range(2)]
    for part in parts:
        start_and_hold(encoder, language, part)
    blocks = sorted(block for part in parts for block in language.room(part)["blocks"])
    proxy.open = False
    proxy.mute("to_encoder", "to_language")
    for part in parts:
        assert encoder.url in language.fails(part, timeout=NOTICED)["reason"]
        encoder.wait_ended(part, timeout=NOTICED)
    still_quarantined(language, blocks)  # the encoder still writes
    encoder.release(parts[0])
    still_quarantined(language, blocks)  # the other room, through the same link
    safe.unharmed()
    proxy.cut()
    proxy.open = True
    still_quarantined(language, blocks)
    encoder.release(parts[1])
    language.wait_all_free()
    world.transfer(encoder, language)


# -- strangers ---------------------------------------------------------------------------------------------------------


def test_a_stranger_s_frames_hurt_nobody_and_move_nothing(world: World) -> None:
    encoder = world.encoder()
    language = world.language(encoder)
    safe = bystander(world, encoder, language)
    room = encoder.room(safe.part)
    assert room is not None
    (session,) = room["infos"]
    forged = Init(
        epoch=0, room=safe.part.room, mooncake_session_id=session, dst_embedding_indices=[0], allocated_tokens=1,
        required_dst_info_num=1, deadline=0.0,
    )  # fmt: skip
    with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.setsockopt(zmq.LINGER, 0)
        stranger.connect(f"tcp://127.0.0.1:{encoder.hello['control_port']}")
        for frames in ([b""], [b"\x80\x04pickle"], [b"\x01\xc1"], [b"a", b"b", b"c"], [encode(forged)], [b"\x09"]):
            stranger.send_multipart(frames)
        assert stranger.poll(5000)
        answer = decode_from_encoder(stranger.recv(), 1 << 20)
        assert isinstance(answer, Refused)
    safe.unharmed()
    world.transfer(encoder, language)
    language.wait_all_free()


def test_a_room_of_one_language_server_is_never_announced_to_another(world: World) -> None:
    encoder = world.encoder()
    language, other = world.language(encoder), world.language(encoder)
    safe = bystander(world, encoder, language)
    other.call("expect", room=safe.part.room, url=encoder.url, timeout=1.0)
    other.fails(safe.part, timeout=3)
    safe.unharmed()
