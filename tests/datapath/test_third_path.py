"""A third data path, added by one line: what docs/extending.md asks of a path, at its simplest.

Both ends are in this process. A description is a token; the pool is found by it in a table. The proof (P2) is a lock:
a writer holds its slot in that table as long as it may write.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

import msgspec
import pytest
import torch

from sglang_mm_conn.connector.encoder.endpoint import EncoderEndpoint
from sglang_mm_conn.connector.language.endpoint import LanguageEndpoint
from sglang_mm_conn.connector.metadata import encode_metadata
from sglang_mm_conn.connector.runtime import Runtime
from sglang_mm_conn.control.bootstrap_server import StandaloneBootstrap
from sglang_mm_conn.core.actions import ProcessLost
from sglang_mm_conn.core.errors import DataPathUnavailable, WriterSlotTaken
from sglang_mm_conn.core.layout import Extent, Geometry
from sglang_mm_conn.core.messages import Memory, OtherMemory
from sglang_mm_conn.core.rooms import new_id, new_room_base
from sglang_mm_conn.core.settings import Settings
from sglang_mm_conn.core.sharding import session_at
from sglang_mm_conn.core.states import Poll
from sglang_mm_conn.datapath import factory
from sglang_mm_conn.datapath.base import DataPath, Description, Doubts, ReceivePath, Revoking
from sglang_mm_conn.memory.device import Device
from sglang_mm_conn.memory.pool import BlockPool
from tests.connector.processes import stays, wait_for

HOST = "127.0.0.1"
WIDTH = 8
ROW_BYTES = WIDTH * 4
BLOCKS, BLOCK_ROWS = 8, 4
TOKENS = 100  # several times what the pool holds: it resumes

# -- the path --------------------------------------------------------------------------------------------------------


class Exposed:
    """A pool that others may write, and who may: slot -> the link that holds it, or the owner that took it."""

    def __init__(self, regions: Sequence[torch.Tensor]) -> None:
        self.regions = regions
        self.lock = threading.Lock()
        self.slots: dict[int, object] = {}


EXPOSED: dict[str, Exposed] = {}  # by token


class Where(msgspec.Struct):
    """What the two halves tell each other; the wire carries it unread."""

    token: str
    slot: int


class TokenLink:
    name = "token"
    synchronous = True

    # A test stops a write here, half-way.
    on_write: Callable[[], None] = staticmethod(lambda: None)

    def __init__(self, exposed: Exposed, slot: int) -> None:
        self._exposed = exposed
        self._slot = slot
        with exposed.lock:
            if slot in exposed.slots:
                raise WriterSlotTaken(f"slot {slot} is taken")
            exposed.slots[slot] = self

    def write(self, source: torch.Tensor, extents: Sequence[Extent]) -> None:
        for number, extent in enumerate(extents):
            if number == len(extents) // 2:
                type(self).on_write()
            region = self._exposed.regions[extent.region]
            region[extent.offset : extent.offset + extent.length] = source[extent.start : extent.start + extent.length]

    def close(self) -> None:
        with self._exposed.lock:
            del self._exposed.slots[self._slot]


class TokenPath:
    name = "token"

    def open(self, memory: Memory, geometry: Geometry, incarnation: str) -> TokenLink:
        assert isinstance(memory, OtherMemory)
        try:
            where = msgspec.msgpack.decode(memory.content, type=Where)
        except msgspec.DecodeError as error:
            raise DataPathUnavailable(f"the token is malformed: {error}") from error
        if where.token not in EXPOSED:
            raise DataPathUnavailable(f"there is no {where.token} here")
        return TokenLink(EXPOSED[where.token], where.slot)

    def close(self) -> None:
        pass


class TokenReceivePath:
    name = "token"
    exclusive_lock = True
    retired_epoch = None

    def __init__(self, pool: BlockPool, host: str, reserve_port: factory.ReservePort) -> None:
        port, self._release_port = reserve_port()
        self.session_id = session_at(host, port)
        self._token = new_id()
        EXPOSED[self._token] = Exposed(pool.regions)

    def start(self) -> None:
        pass

    def describe(self, slot: int) -> Description:
        content = msgspec.msgpack.encode(Where(self._token, slot))
        return Description(OtherMemory(data_path=self.name, content=content))

    def is_current(self, epoch: int) -> bool:
        return epoch == 0

    def prove_writer_gone(self, slot: int) -> bool:
        exposed = EXPOSED[self._token]
        with exposed.lock:
            return exposed.slots.setdefault(slot, self) is self

    def revocation(self, doubts: Doubts) -> Revoking | None:
        return None

    def close(self) -> None:
        del EXPOSED[self._token]
        self._release_port()


def _encoder(settings: Settings, host: str, device: Device) -> DataPath:
    return TokenPath()


def _language(settings: Settings, host: str, pool: BlockPool, reserve_port: factory.ReservePort) -> ReceivePath:
    return TokenReceivePath(pool, host, reserve_port)


# -- between two endpoints -------------------------------------------------------------------------------------------


class Ends:
    """``encoder_path``, ``language_path``: SGLANG_MM_CONN_DATA_PATH of either."""

    def __init__(self, encoder_path: str = "token", language_path: str = "token") -> None:
        def settings(path: str) -> Settings:
            return Settings(
                blocks=BLOCKS, block_size=BLOCK_ROWS, data_path=path, checksum=True, heartbeat=0.1, peer_timeout=1.0
            )

        self.encoder = EncoderEndpoint(
            settings(encoder_path), host=HOST, dtype="float32", widest_row_bytes=ROW_BYTES, send_timeout=60.0,
            data_paths=factory.encoder_data_paths(settings(encoder_path), HOST), runtime=WorkersWrite(),
        )  # fmt: skip
        self._bootstrap = StandaloneBootstrap(HOST, 0, lambda: self.encoder.bootstrap_info)
        self.language = LanguageEndpoint(
            settings(language_path), server=new_id(), host=HOST, dtype="float32", widest_row_bytes=ROW_BYTES
        )

    def begin(self, rows: torch.Tensor) -> str:
        room = new_room_base(self.language.server)
        self.language.expect(room, self._bootstrap.url, 60.0, "")
        self.encoder.announce(room, rows.shape[0], ROW_BYTES, "float32", lambda ended: None)
        self.encoder.add_transfer_request(room, rows, encode_metadata({}, 1 << 20))
        return room

    def transfer(self, rows: torch.Tensor) -> tuple[torch.Tensor, int]:
        """The embedding that arrived, and how often its room resumed."""
        room = self.begin(rows)
        wait_for(lambda: self.language.poll(room) in (Poll.Success, Poll.Failed), f"the end of {room}")
        assert self.language.poll(room) is Poll.Success, self.language.outcome(room)
        embedding, _ = self.language.take(room)
        resumes = self.language.core.rooms[room].resumes
        self.language.forget(room)
        return embedding.clone(), resumes

    def path(self) -> str:
        (peer,) = self.language.core._peers.values()
        return peer.data_path

    def close(self) -> None:
        self.language.close()
        self.encoder.close()
        self._bootstrap.close()


class WorkersWrite(Runtime):
    """A write that is held must not hold the control thread."""

    inline_limit_bytes = uncontended_inline_limit_bytes = 0


@pytest.fixture(autouse=True)
def registry_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that a path needs outside its module."""
    monkeypatch.setitem(factory.PATHS, "token", factory.Halves("a table of tokens", _encoder, _language))


@pytest.fixture
def ends() -> Iterator[Ends]:
    made = Ends()
    yield made
    made.close()


def rows(tokens: int) -> torch.Tensor:
    return torch.rand(tokens, WIDTH)


def test_an_embedding_larger_than_the_pool_arrives_by_resume(ends: Ends) -> None:
    for tokens in (TOKENS, 1, TOKENS):
        sent = rows(tokens)
        arrived, resumes = ends.transfer(sent)
        assert torch.equal(arrived, sent)
        assert (resumes > 0) is (tokens > BLOCKS * BLOCK_ROWS)
    assert ends.path() == "token"


def test_blocks_of_a_silent_writer_are_free_only_when_the_paths_own_proof_is_there(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends.transfer(rows(1))
    reached, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        reached.set()
        go_on.wait(60)

    monkeypatch.setattr(TokenLink, "on_write", staticmethod(hold))
    allocator = ends.language.core.allocator
    try:
        room = ends.begin(rows(BLOCKS * BLOCK_ROWS))
        assert reached.wait(30)
        (incarnation,) = ends.language.core._peers
        # Over the lock the language rank waits for a proof, whatever it hears of the process.
        ends.language._on_encoder_event(ProcessLost(incarnation, "silent"))
        assert ends.language.poll(room) is Poll.Failed and allocator.quarantined_count == BLOCKS
        slot = ends.language._encoders.slot_of(incarnation)
        assert slot is not None
        stays(lambda: allocator.quarantined_count == BLOCKS, "its writer holds the slot", 0.5)
        (exposed,) = EXPOSED.values()
        assert isinstance(exposed.slots[slot], TokenLink)
        # The encoder gives the session up, as after a long silence; its link closes when the write has returned.
        ends.encoder._links.close(next(iter(ends.encoder.core.sessions)))
        stays(lambda: allocator.quarantined_count == BLOCKS, "the write is under way", 0.5)
    finally:
        go_on.set()
    wait_for(lambda: allocator.free_count == BLOCKS, "the proof, and free blocks")


@pytest.mark.parametrize("refused", ["token", "shm"])
def test_first_path_is_the_first_of_the_table_and_the_next_follows_a_refusal(
    refused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = {"token": factory.PATHS["token"], "shm": factory.PATHS["shm"]}
    monkeypatch.setattr(factory, "PATHS", first if refused == "token" else dict(reversed(first.items())))
    both = Ends("auto", "auto")
    try:
        assert next(iter(both.language._sessions.paths)) == refused
        del both.encoder._links._data_paths[refused]  # type: ignore[attr-defined]
        sent = rows(TOKENS)
        arrived, _ = both.transfer(sent)
        assert torch.equal(arrived, sent) and both.path() == {"token": "shm", "shm": "token"}[refused]
    finally:
        both.close()


def test_ends_that_are_told_different_paths_refuse_each_other_naming_both() -> None:
    apart = Ends("shm", "token")
    try:
        room = apart.begin(rows(1))
        wait_for(lambda: apart.language.poll(room) is Poll.Failed, "a refusal")
        assert "DATA_PATH is shm on the encoder, but the language server offers token" in (
            apart.language.outcome(room).reason
        )
    finally:
        apart.close()


def test_a_path_that_is_not_in_the_table_is_refused_at_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(factory.PATHS, "token")
    with pytest.raises(DataPathUnavailable, match=r"no data path 'token' \(there are shm, mooncake\)"):
        factory.encoder_data_paths(Settings(data_path="token"), HOST)
    with pytest.raises(DataPathUnavailable, match="no data path 'token'"):
        LanguageEndpoint(
            Settings(data_path="token"), server="1", host=HOST, dtype="float32", widest_row_bytes=ROW_BYTES
        )


@pytest.mark.parametrize("claimed", ["shm", "mooncake"])
def test_memory_of_another_path_that_claims_to_be_of_this_one_is_refused(claimed: str) -> None:
    memory = OtherMemory(data_path=claimed, content=b"")
    path = factory.PATHS[claimed].encoder(Settings(mooncake_protocol="tcp"), HOST, Device())
    with pytest.raises(DataPathUnavailable, match="language server"):
        path.open(memory, Geometry(64, 4, 1), "1")
