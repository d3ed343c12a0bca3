"""Registrations: one that waits for each peer, one session for each peer, and nobody takes a living one's."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

import msgspec
import pytest

from sglang_mm_conn.connector.encoder import registration
from sglang_mm_conn.connector.encoder.endpoint import EncoderEndpoint
from sglang_mm_conn.connector.language.encoder_directory import EncoderDirectory, EncoderEvent
from sglang_mm_conn.connector.runtime import Runtime
from sglang_mm_conn.control.bootstrap import BootstrapInfo, Worker
from sglang_mm_conn.core.actions import EncoderRefused, ProcessReady
from sglang_mm_conn.core.errors import ProtocolError, WriterSlotTaken
from sglang_mm_conn.core.messages import (
    PROTOCOL_VERSION,
    Abort,
    Message,
    OtherMemory,
    RefusalKind,
    Refused,
    Register,
    Registered,
    Retire,
    ShmMemory,
    decode_from_encoder,
    decode_from_language,
    encode,
)
from sglang_mm_conn.core.settings import Settings
from tests.connector.test_links import REGISTER, FakePath

SETTINGS = Settings(
    block_size=1, heartbeat=1.0, peer_timeout=10.0, max_frame_bytes=REGISTER.max_frame_bytes,
    max_metadata_bytes=REGISTER.max_metadata_bytes,
)  # fmt: skip


class Later(Executor):
    """Work that is done when the test says so."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], Any]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.waiting.append(lambda: fn(*args, **kwargs))
        return Future()

    def run(self) -> None:
        waiting, self.waiting = self.waiting, []
        for work in waiting:
            work()


class FakeControl:
    """Both kinds of control connections: keeps what is sent."""

    port = 1

    def __init__(self) -> None:
        self.sent: list[tuple[str, bytes]] = []

    def send(self, peer: str, frame: bytes) -> None:
        self.sent.append((peer, frame))

    def call(self, work: Callable[[], None]) -> None:
        work()

    def connect(self, key: str, address: str) -> None:
        pass

    def disconnect(self, key: str) -> None:
        pass

    def stop(self) -> None:
        pass


class FakeRuntime(Runtime):
    def __init__(self) -> None:
        self.now = 100.0
        self.later = Later()
        self.control = FakeControl()

    def clock(self) -> float:
        return self.now

    def start_thread(self, target: Callable[[], None], name: str) -> Any:
        return None

    def executor(self, threads: int, name: str) -> Executor:
        return self.later

    def control_server(self, host: str, *_: Any, **__: Any) -> Any:
        return self.control

    def look_up(self, encoder_url: str, key: Any, *, insecure: bool) -> BootstrapInfo:
        return BootstrapInfo(PROTOCOL_VERSION, [Worker("encoder", 1)])


# -- the encoder's end -------------------------------------------------------------------------------------------------


class Ground:
    def __init__(self) -> None:
        self.runtime = FakeRuntime()
        self.path = FakePath()
        self.endpoint = EncoderEndpoint(
            SETTINGS, host="127.0.0.1", dtype="float32", widest_row_bytes=1, send_timeout=60.0,
            data_paths={"fake": self.path}, runtime=self.runtime,
        )  # fmt: skip
        # Settings name one of the real data paths; here it is a fake one.
        self.endpoint._registrar._mismatch = lambda message: ""

    def say(self, peer: str, message: Message) -> None:
        self.endpoint._on_frame(peer, encode(message))

    def register(self, peer: str, **changes: Any) -> Message:
        """Register, and what is answered."""
        self.say(peer, msgspec.structs.replace(REGISTER, **changes))
        self.runtime.later.run()
        return self.heard(peer)[-1]

    def heard(self, peer: str) -> list[Message]:
        return [decode_from_encoder(frame, 1 << 20) for to, frame in self.runtime.control.sent if to == peer]


@pytest.fixture
def ground() -> Ground:
    return Ground()


def test_of_a_peer_that_registers_over_and_over_only_the_newest_registration_waits(ground: Ground) -> None:
    for number in range(1000):
        ground.say("flood", msgspec.structs.replace(REGISTER, number=number))
    ground.say("healthy", msgspec.structs.replace(REGISTER, mooncake_session_id="10.0.0.2:1", incarnation="other"))
    assert len(ground.runtime.later.waiting) == 2
    ground.runtime.later.run()
    assert len(ground.heard("flood")) == len(ground.heard("healthy")) == 1
    assert ground.endpoint.core.sessions[REGISTER.mooncake_session_id].number == 999
    assert not ground.endpoint._registrar.registering and not ground.endpoint._registrar.waiting
    ground.register("flood", number=1000)
    assert ground.endpoint.core.sessions[REGISTER.mooncake_session_id].number == 1000


def test_more_peers_than_may_wait_are_told_to_come_again(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "_WAITING_REGISTRATIONS", 3)
    for number in range(5):
        ground.say(str(number), REGISTER)
    assert len(ground.runtime.later.waiting) == 3
    for peer in ("3", "4"):
        (answer,) = ground.heard(peer)
        assert isinstance(answer, Refused) and answer.kind is RefusalKind.REGISTER_FIRST


def test_a_peer_speaks_for_one_session_the_one_it_registered_before_ends(ground: Ground) -> None:
    for number in range(1, 50):
        answer = ground.register("mad", mooncake_session_id=f"10.0.0.1:{number}", incarnation=str(number))
        assert isinstance(answer, Registered)
    assert list(ground.endpoint.core.sessions) == ["10.0.0.1:49"]
    assert len(ground.endpoint._links) == 1 and [link.closed for link in ground.path.links] == [True] * 48 + [False]


def test_a_session_whose_process_lives_is_not_given_to_another(ground: Ground) -> None:
    ground.register("victim")
    thief = {"incarnation": "thief", "server": "thief"}
    answer = ground.register("thief", **thief)
    assert (
        isinstance(answer, Refused) and answer.kind is RefusalKind.REGISTER_FIRST and "which is alive" in answer.reason
    )
    assert ground.endpoint.core.sessions[REGISTER.mooncake_session_id].peer == "victim"
    assert len(ground.path.links) == 1 and not ground.path.links[0].closed
    ground.say("victim", Abort(room=f"{'0' * 16}-{'0' * 16}", mooncake_session_id="10.9.9.9:1", reason=""))
    ground.runtime.now += 5.0  # a process that is gone has left its port to another
    assert isinstance(ground.register("thief", **thief), Registered)


def test_of_registrations_that_wait_the_newest_counts_also_where_it_came_first(ground: Ground) -> None:
    for number in (2, 1):
        ground.say("rank", msgspec.structs.replace(REGISTER, number=number))
    ground.runtime.later.run()
    assert ground.endpoint.core.sessions[REGISTER.mooncake_session_id].number == 2


def test_a_writer_slot_that_is_taken_is_asked_for_again_and_the_path_is_not_given_up(ground: Ground) -> None:
    ground.path.refusal = WriterSlotTaken("writer slot 0 is taken")
    answer = ground.register("rank")
    assert isinstance(answer, Refused) and answer.kind is RefusalKind.REGISTER_FIRST


def test_epochs_of_one_session_that_are_not_revoked_are_bounded(ground: Ground) -> None:
    def memory(number: int) -> OtherMemory:
        return OtherMemory(data_path="fake", content=str(number).encode())

    answers = [ground.register("rank", number=number, epoch=number, memory=memory(number)) for number in range(1, 50)]
    assert [type(answer) for answer in answers] == [Registered] * 4 + [Refused] * 45
    assert len(ground.endpoint._links) == 4
    assert isinstance(ground.register("rank", number=50, epoch=50, oldest_epoch=49, memory=memory(50)), Registered)
    assert len(ground.endpoint._links) == 1


# -- the language rank's end -------------------------------------------------------------------------------------------


class FakeReceivePath:
    name = "shm"
    exclusive_lock = True
    session_id = REGISTER.mooncake_session_id
    retired_epoch: int | None = None

    def is_current(self, epoch: int) -> bool:
        return epoch == 0


class FakeSessions:
    first_path = "shm"

    def __init__(self) -> None:
        self.locked: set[int] = set()  # by writers
        self.paths = {"shm": FakeReceivePath()}

    def retire_writer(self, slot: int) -> bool:
        return slot not in self.locked

    def register_message(self, path: str, slot: int, number: int) -> Register:
        memory = ShmMemory(segment="name", nonce="nonce", writer_slot=slot)
        return msgspec.structs.replace(REGISTER, number=number, memory=memory)

    def other_path(self, refused: str) -> str | None:
        return None


class Rank:
    def __init__(self) -> None:
        self.runtime = FakeRuntime()
        self.ready: list[ProcessReady] = []
        self.refused: list[str] = []
        self.sessions = FakeSessions()
        self.encoders = EncoderDirectory(
            self.sessions, self.runtime.control, None, "rank",  # type: ignore[arg-type]
            insecure=False, peer_timeout=10.0, heartbeat=1.0, on_event=self.hear, runtime=self.runtime,
        )  # fmt: skip
        self.encoders.use("http://127.0.0.1:1")
        self.runtime.later.run()
        self.encoders.on_connected("encoder")
        self.runtime.later.run()

    def hear(self, event: EncoderEvent) -> None:
        if isinstance(event, ProcessReady):
            self.ready.append(event)
        elif isinstance(event, EncoderRefused):
            self.refused.append(event.reason)

    def registrations(self) -> int:
        return len(self.slots())

    def slots(self) -> list[int]:
        """Of all registrations."""
        messages = [decode_from_language(frame, 1 << 20) for _, frame in self.runtime.control.sent]
        memories = [message.memory for message in messages if isinstance(message, Register)]
        return [memory.writer_slot for memory in memories if isinstance(memory, ShmMemory)]


GRANT = Registered(mooncake_session_id=REGISTER.mooncake_session_id, epoch=0, incarnation="encoder")


def test_a_grant_that_was_not_asked_for_changes_nothing_however_often_it_is_said() -> None:
    rank = Rank()
    for _ in range(100):
        rank.encoders.on_registered("encoder", GRANT)
    assert len(rank.ready) == 1


def test_a_refusal_that_was_not_asked_for_changes_nothing_however_often_it_is_said() -> None:
    rank = Rank()
    rank.encoders.on_registered("encoder", GRANT)
    for number in range(100):
        rank.encoders.on_refused("encoder", Refused(reason=f"no {number}", kind=RefusalKind.MISMATCH))
    assert not rank.refused
    for _ in range(100):
        rank.encoders.on_refused("encoder", Refused(reason="again", kind=RefusalKind.REGISTER_FIRST))
    rank.encoders.tick()
    rank.runtime.later.run()
    assert rank.registrations() == 2


def test_the_grant_of_a_session_that_is_not_this_ranks_is_refused() -> None:
    rank = Rank()
    with pytest.raises(ProtocolError, match=r"10\.9\.9\.9:1"):
        rank.encoders.on_registered("encoder", msgspec.structs.replace(GRANT, mooncake_session_id="10.9.9.9:1"))
    assert not rank.ready


def test_grants_of_an_epoch_older_than_the_newest_are_answered_at_the_next_tick_only() -> None:
    rank = Rank()
    for _ in range(100):
        rank.encoders.on_registered("encoder", msgspec.structs.replace(GRANT, epoch=7))
    assert not rank.ready and not rank.runtime.later.waiting
    rank.encoders.tick()
    rank.runtime.later.run()
    assert rank.registrations() == 2


def test_process_registering_while_an_epoch_is_revoked_is_told_when_it_is_ready() -> None:
    """Those that were ready are told at that moment; this one would keep its old link for ever."""
    rank = Rank()
    rank.sessions.paths["shm"].retired_epoch = 3
    rank.encoders.on_registered("encoder", GRANT)
    frames = [frame for _, frame in rank.runtime.control.sent]
    told = [message for frame in frames if isinstance(message := decode_from_language(frame, 1 << 20), Retire)]
    assert told == [Retire(mooncake_session_id=REGISTER.mooncake_session_id, epoch=3)] and len(rank.ready) == 1


def test_a_process_whose_writer_slot_was_taken_from_it_registers_with_another() -> None:
    rank = Rank()
    rank.encoders.on_registered("encoder", GRANT)
    first = rank.encoders.slot_of("encoder")
    rank.encoders.replace_slot("encoder")
    rank.encoders.on_refused("encoder", Refused(reason="slot taken", kind=RefusalKind.REGISTER_FIRST))
    rank.encoders.tick()
    rank.runtime.later.run()
    assert rank.slots() == [first, rank.encoders.slot_of("encoder")] and len(set(rank.slots())) == 2


def test_writer_slot_of_a_lost_process_is_kept_while_it_can_write_or_is_suspected() -> None:
    rank = Rank()
    slot = rank.encoders.slot_of("encoder")
    assert slot is not None
    rank.runtime.now += 60.0
    rank.encoders.tick()  # it was silent
    rank.encoders.forget_slots(keep={"encoder"})
    assert rank.encoders.slot_of("encoder") == slot
    rank.sessions.locked.add(slot)
    rank.encoders.forget_slots(keep=set())
    assert rank.encoders.slot_of("encoder") == slot
    rank.sessions.locked.clear()
    rank.encoders.forget_slots(keep=set())
    assert rank.encoders.slot_of("encoder") is None
