"""The encoder's links: pinned while they are written through, closed only then, never mistaken for one another."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import msgspec
import pytest
import torch

from sglang_mm_conn.connector.encoder.links import LinkBusy, Links
from sglang_mm_conn.core.errors import DataPathError, DataPathUnavailable
from sglang_mm_conn.core.layout import Extent, Geometry
from sglang_mm_conn.core.messages import Memory, OtherMemory, Register
from sglang_mm_conn.datapath.base import WriteLink

SESSION = "10.0.0.1:17001"
REGISTER = Register(
    mooncake_session_id=SESSION, epoch=0, incarnation="1", server="2", rank=0, size=1, block_size=1,
    block_bytes=64, blocks_per_region=4, regions=1, row_bytes=1, dtype="float32", checksum=False,
    max_frame_bytes=1 << 20, max_metadata_bytes=1 << 20, memory=OtherMemory(data_path="fake", content=b"0"),
)  # fmt: skip


@dataclass
class FakeLink:
    memory: Memory
    incarnation: str
    name: str = "fake"
    synchronous: bool = True
    closed: bool = False

    def write(self, source: torch.Tensor, runs: Sequence[Extent]) -> None:
        raise AssertionError("not written here")

    def close(self) -> None:
        self.closed = True


@dataclass
class FakePath:
    """Two attachments of one process to one segment exclude each other, as over shared memory."""

    name: str = "fake"
    links: list[FakeLink] = field(default_factory=list)
    refusal: DataPathUnavailable | None = None

    @property
    def closed(self) -> list[bool]:
        """Of each link that was opened, whether it is closed."""
        return [link.closed for link in self.links]

    def open(self, memory: Memory, geometry: Geometry, incarnation: str) -> FakeLink:
        if self.refusal is not None:
            raise self.refusal
        for link in self.links:
            assert link.closed or (link.memory, link.incarnation) != (memory, incarnation), "attached twice"
        self.links.append(FakeLink(memory, incarnation))
        return self.links[-1]

    def close(self) -> None:
        pass


@pytest.fixture
def path() -> FakePath:
    return FakePath()


@pytest.fixture
def links(path: FakePath) -> Links:
    return Links({"fake": path})


@contextmanager
def using(links: Links, epoch: int) -> Iterator[WriteLink]:
    lease = links.lease(SESSION, epoch)
    try:
        yield lease.link
    finally:
        lease.release()


def changed(*, epoch: int = 0, **change: object) -> Register:
    """Each epoch has another way into the memory."""
    memory = OtherMemory(data_path="fake", content=b"%d" % epoch)
    return msgspec.structs.replace(REGISTER, **{"epoch": epoch, "memory": memory, **change})


def test_a_link_that_is_given_up_in_mid_write_closes_when_the_write_has_returned(links: Links, path: FakePath) -> None:
    links.open(REGISTER)
    with using(links, 0):
        links.close(SESSION)
        assert path.closed == [False], "closing would say that this process cannot write any more"
        assert not links.has(SESSION, 0)
        with pytest.raises(DataPathError):
            links.lease(SESSION, 0)
        with pytest.raises(LinkBusy):
            links.open(REGISTER)
    assert path.closed == [True] and len(links) == 0
    links.open(REGISTER)
    assert links.has(SESSION, 0)


def test_registering_again_the_same_way_goes_on_with_the_same_link(links: Links, path: FakePath) -> None:
    assert links.open(REGISTER) is False
    assert links.open(REGISTER) is True
    assert len(path.links) == 1


def test_a_new_epoch_stands_beside_the_old_one_until_that_is_retired(links: Links, path: FakePath) -> None:
    links.open(REGISTER)
    assert links.open(changed(epoch=1)) is True
    with using(links, 0) as old, using(links, 1) as new:
        assert old is not new
    links.close(SESSION, up_to=0)
    assert path.closed == [True, False] and links.has(SESSION, 1)
    with pytest.raises(DataPathError, match="epoch 0"):
        links.lease(SESSION, 0)


def test_session_presented_by_another_process_without_memory_keeps_its_link(links: Links, path: FakePath) -> None:
    links.open(REGISTER)
    path.refusal = DataPathUnavailable("cannot be opened here")
    with pytest.raises(DataPathUnavailable):
        links.open(changed(incarnation="9"))
    assert links.has(SESSION, 0) and not path.links[0].closed


def test_a_restarted_process_replaces_the_links_of_its_predecessor(links: Links, path: FakePath) -> None:
    links.open(REGISTER)
    links.open(changed(epoch=1))
    assert links.open(changed(incarnation="9", epoch=2)) is False
    assert path.closed == [True, True, False]


def test_other_memory_of_the_same_process_replaces_the_link(links: Links, path: FakePath) -> None:
    links.open(REGISTER)
    assert links.open(changed(memory=OtherMemory(data_path="fake", content=b"another"))) is False
    assert path.closed == [True, False]
    links.close_all()
    assert path.links[1].closed and len(links) == 0
