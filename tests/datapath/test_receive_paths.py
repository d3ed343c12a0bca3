"""The language rank's halves of the data paths: what they show, in which order they are tried, what they prove."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch

from sglang_mm_conn.connector.language.sessions import LocalSessions
from sglang_mm_conn.core.errors import DataPathUnavailable, WriterSlotTaken
from sglang_mm_conn.core.layout import Geometry
from sglang_mm_conn.core.messages import MooncakeMemory
from sglang_mm_conn.core.settings import Settings
from sglang_mm_conn.datapath import factory
from sglang_mm_conn.datapath.mooncake.exposure import MooncakeReceivePath
from sglang_mm_conn.datapath.shm import ShmPath, ShmReceivePath
from sglang_mm_conn.memory.pool import BlockPool
from tests.datapath.fake_engine import FakeEngine

GEOMETRY = Geometry(block_bytes=64, blocks_per_region=2, regions=2)
HOST = "10.0.0.1"


class Engine(FakeEngine):
    def __init__(self, port: int) -> None:
        super().__init__()
        self._port = port

    def get_rpc_port(self) -> int:
        return self._port


class Engines:
    def __init__(self) -> None:
        self.made: list[weakref.ref[Engine]] = []

    def __call__(self) -> Engine:
        engine = Engine(17001 + len(self.made))
        self.made.append(weakref.ref(engine))
        return engine

    @property
    def living(self) -> list[int]:
        gc.collect()
        return [number for number, one in enumerate(self.made) if one() is not None]


@pytest.fixture(params=[True, False], ids=["shared", "private"])
def pool(request: pytest.FixtureRequest) -> Iterator[BlockPool]:
    made = BlockPool(GEOMETRY, shared=request.param)
    yield made
    made.close()


@pytest.fixture
def shared() -> Iterator[BlockPool]:
    made = BlockPool(GEOMETRY, shared=True)
    yield made
    made.close()


def reserve() -> tuple[int, object]:
    return 17999, lambda: None


def shm_of(pool: BlockPool) -> ShmReceivePath:
    assert pool.segment is not None
    return ShmReceivePath(pool.segment, HOST, reserve)  # type: ignore[arg-type]


def test_writer_slot_is_proved_free_only_after_its_link_is_closed(shared: BlockPool) -> None:
    path = shm_of(shared)
    assert path.session_id == "10.0.0.1:17999" and path.exclusive_lock and path.retired_epoch is None
    memory = path.describe(3).memory
    link = ShmPath().open(memory, GEOMETRY, "1")
    assert not path.prove_writer_gone(3)
    link.close()
    assert path.prove_writer_gone(3) and path.prove_writer_gone(3)
    with pytest.raises(WriterSlotTaken):
        ShmPath().open(memory, GEOMETRY, "1")
    ShmPath().open(path.describe(4).memory, GEOMETRY, "1").close()


def test_the_mooncake_session_outlives_its_engines_and_an_epoch_ends_with_its_own() -> None:
    engines = Engines()
    regions = [torch.zeros(128, dtype=torch.uint8) for _ in range(2)]
    path = MooncakeReceivePath(engines, HOST, regions)
    assert not engines.made, "on one host none is ever made"
    path.start()
    first = path.describe(0)
    assert path.session_id == "10.0.0.1:17001" and len(engines.made) == 1
    assert first.memory == MooncakeMemory(target="10.0.0.1:17001", addresses=[region.data_ptr() for region in regions])
    assert (first.epoch, first.oldest_epoch, path.retired_epoch) == (0, 0, None) and path.is_current(0)
    assert path.renew() == 0
    second = path.describe(0)
    assert isinstance(second.memory, MooncakeMemory) and second.memory.target == "10.0.0.1:17002"
    assert (second.epoch, second.oldest_epoch, path.retired_epoch) == (1, 0, None)
    assert path.is_current(1) and not path.is_current(0) and engines.living == [0, 1]
    path.revoke(0)
    assert engines.living == [1], "whoever is told that the epoch is over may rely on it"
    assert (path.describe(0).oldest_epoch, path.retired_epoch, path.session_id) == (1, 0, "10.0.0.1:17001")
    assert not path.exclusive_lock and not path.prove_writer_gone(0), "a lock proves nothing here"


@pytest.mark.parametrize("data_path", ["auto", "shm", "mooncake"])
def test_the_paths_that_settings_and_pool_allow_are_tried_in_the_order_of_the_table(
    pool: BlockPool, data_path: str
) -> None:
    expected = [name for name in factory.PATHS if data_path in ("auto", name) and (pool.segment or name != "shm")]
    settings = Settings(data_path=data_path)
    if not expected:
        with pytest.raises(DataPathUnavailable, match="not in shared memory"):
            factory.receive_paths(settings, HOST, pool, reserve)  # type: ignore[arg-type]
        return
    paths = factory.receive_paths(settings, HOST, pool, reserve)  # type: ignore[arg-type]
    assert list(paths) == [path.name for path in paths.values()] == expected


def sessions(*paths: ShmReceivePath | MooncakeReceivePath) -> LocalSessions:
    return LocalSessions(
        Settings(), GEOMETRY, {path.name: path for path in paths}, incarnation="1", server="2", rank=0, size=1,
        widest_row_bytes=4, dtype="float32",
    )  # fmt: skip


def test_after_a_refusal_the_next_path_is_presented_and_after_the_last_none(shared: BlockPool) -> None:
    engines = Engines()
    ours = sessions(shm_of(shared), MooncakeReceivePath(engines, HOST, shared.regions))
    assert ours.first_path == "shm" and ours.other_path("shm") == "mooncake" and ours.other_path("mooncake") is None
    assert ours.register_message("shm", 5, 1).data_path == "shm" and not engines.made
    message = ours.register_message("mooncake", 5, 2)
    assert (message.data_path, message.mooncake_session_id, message.number) == ("mooncake", "10.0.0.1:17001", 2)
    assert message.geometry == GEOMETRY


def test_the_only_path_is_started_at_once_so_that_a_server_without_it_does_not_start() -> None:
    def none() -> Engine:
        raise DataPathUnavailable("Mooncake is missing")

    with pytest.raises(DataPathUnavailable, match="missing"):
        sessions(MooncakeReceivePath(none, HOST, []))


def test_a_slot_is_free_when_every_path_that_has_a_lock_proves_it(shared: BlockPool) -> None:
    class Another(ShmReceivePath):
        name = "another"
        locked = True

        def prove_writer_gone(self, slot: int) -> bool:
            return not self.locked

    assert shared.segment is not None
    another = Another(shared.segment, HOST, reserve)  # type: ignore[arg-type]
    ours = sessions(shm_of(shared), another, MooncakeReceivePath(Engines(), HOST, shared.regions))
    assert not ours.retire_writer(0)
    another.locked = False
    assert ours.retire_writer(0)
