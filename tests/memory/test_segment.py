"""Shared segments on the real /dev/shm: proof of one host, locks that end with their process, nothing left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang_mm_conn.core.errors import DataPathUnavailable, MemoryUnavailable, WriterSlotTaken
from sglang_mm_conn.memory import segment as module
from sglang_mm_conn.memory.segment import (
    HEADER_BYTES,
    AttachedSegment,
    Segment,
    free_bytes,
    sweep_stale_segments,
)

PAYLOAD = 8192


@pytest.fixture(autouse=True)
def directory(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A place of this test's own in /dev/shm: every start of a server on this machine sweeps the common one."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="test-segment-") as name:
        monkeypatch.setattr(module, "DIRECTORY", name)
        yield name


def names() -> set[str]:
    return set(os.listdir(module.DIRECTORY))


def at(name: str) -> str:
    return os.path.join(module.DIRECTORY, name)


@pytest.fixture
def segment() -> Iterator[Segment]:
    made = Segment(PAYLOAD)
    yield made
    made.close()


class Child:
    """A real process that runs ``code``, prints one line, and then waits until it is killed."""

    def __init__(self, code: str) -> None:
        program = (
            "import sys\nfrom sglang_mm_conn.memory import segment\nfrom sglang_mm_conn.memory.segment import *\n"
            f"segment.DIRECTORY = {module.DIRECTORY!r}\n{code}\nsys.stdin.read()"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline().strip()
        assert self.line, "the child ended before it said anything"

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def children() -> Iterator[list[Child]]:
    started: list[Child] = []
    yield started
    for child in started:
        child.kill()


def attach_code(segment: Segment, slot: int) -> str:
    return f"a = AttachedSegment({segment.name!r}, {segment.nonce!r}, {PAYLOAD}, {slot}); print('ready', flush=True)"


# -- attaching -----------------------------------------------------------------------------------------------------


def test_what_a_writer_puts_there_the_owner_sees(segment: Segment) -> None:
    attached = AttachedSegment(segment.name, segment.nonce, PAYLOAD, slot=0)
    attached.data[HEADER_BYTES : HEADER_BYTES + 5] = b"hello"
    attached.data[HEADER_BYTES + PAYLOAD - 1 :] = b"!"
    assert segment.data[HEADER_BYTES : HEADER_BYTES + 5] == b"hello"
    assert segment.data[HEADER_BYTES + PAYLOAD - 1 :] == b"!" and len(segment.data) == HEADER_BYTES + PAYLOAD
    attached.close()


@pytest.mark.parametrize("nonce", ["", "almost", "0" * 32, "nonsense"])
def test_a_segment_without_the_announced_nonce_is_not_the_one_that_was_meant(segment: Segment, nonce: str) -> None:
    if nonce == "almost":
        nonce = segment.nonce[:-1] + ("1" if segment.nonce[-1] == "0" else "0")
    with pytest.raises(DataPathUnavailable, match="nonce"):
        AttachedSegment(segment.name, nonce, PAYLOAD, 0)


@pytest.mark.parametrize("payload", [PAYLOAD - 1, PAYLOAD + 1, 0, PAYLOAD * 2])
def test_a_segment_of_another_size_is_refused_naming_both(segment: Segment, payload: int) -> None:
    with pytest.raises(DataPathUnavailable, match=f"{HEADER_BYTES + PAYLOAD}.*{HEADER_BYTES + payload}"):
        AttachedSegment(segment.name, segment.nonce, payload, 0)


def test_a_segment_that_is_not_on_this_host_is_refused() -> None:
    with pytest.raises(DataPathUnavailable, match="cannot be opened here"):
        AttachedSegment("sglang-mm-conn-" + "0" * 32, "0" * 32, PAYLOAD, 0)


@pytest.mark.parametrize(
    "name", ["", "x", "../etc/passwd", "sglang-mm-conn-/../x", "sglang-mm-conn-" + "0" * 31, "/dev/shm/x", "a\0b",
             "sglang-mm-conn-" + "0" * 32 + "\n", "sglang-mm-conn-" + "0" * 32 + "/.."],
)  # fmt: skip
def test_a_name_that_is_no_segments_is_refused_before_anything_is_opened(name: str) -> None:
    with pytest.raises(DataPathUnavailable, match="not the name of a segment"):
        AttachedSegment(name, "nonce", PAYLOAD, 0)


def test_a_symbolic_link_is_not_followed(segment: Segment) -> None:
    name = "sglang-mm-conn-" + os.urandom(16).hex()
    link = at(name)
    os.symlink(at(segment.name), link)
    try:
        with pytest.raises(DataPathUnavailable, match="cannot be opened"):
            AttachedSegment(name, segment.nonce, PAYLOAD, 0)
    finally:
        os.unlink(link)


def test_only_this_user_can_open_a_segment(segment: Segment) -> None:
    assert os.stat(at(segment.name)).st_mode & 0o777 == 0o600


# -- the writer's lock ---------------------------------------------------------------------------------------------


def test_writer_is_seen_until_it_closes_even_while_its_mapping_is_referred_to(segment: Segment) -> None:
    attached = AttachedSegment(segment.name, segment.nonce, PAYLOAD, slot=3)
    view = memoryview(attached.data)
    assert not segment.retire_writer(3) and segment.retire_writer(2) and segment.retire_writer(4)
    attached.close()
    again = AttachedSegment(segment.name, segment.nonce, PAYLOAD, slot=3)  # as after a lost registration
    assert not segment.retire_writer(3)
    again.close()
    assert segment.retire_writer(3)
    view.release()


def test_nobody_attaches_with_a_slot_whose_writer_was_proved_gone(segment: Segment) -> None:
    """A registration that was on its way, and an offer behind it, would write into blocks that are somebody else's."""
    attached = AttachedSegment(segment.name, segment.nonce, PAYLOAD, slot=3)
    attached.close()
    assert segment.retire_writer(3)
    with pytest.raises(WriterSlotTaken, match="slot 3"):
        AttachedSegment(segment.name, segment.nonce, PAYLOAD, slot=3)
    assert segment.retire_writer(3), "it stays so, however often it is asked"
    AttachedSegment(segment.name, segment.nonce, PAYLOAD, slot=4).close()


def test_a_slot_that_is_taken_is_refused(segment: Segment) -> None:
    attached = AttachedSegment(segment.name, segment.nonce, PAYLOAD, slot=1)
    with pytest.raises(WriterSlotTaken, match="slot 1"):
        AttachedSegment(segment.name, segment.nonce, PAYLOAD, slot=1)
    assert not segment.retire_writer(1), "a refused attachment took the lock away"
    attached.close()


def test_a_refused_attachment_leaves_no_lock(segment: Segment) -> None:
    with pytest.raises(DataPathUnavailable):
        AttachedSegment(segment.name, "nonsense", PAYLOAD, slot=1)
    assert segment.retire_writer(1)


def test_a_killed_writer_is_gone_and_a_living_one_is_not(segment: Segment, children: list[Child]) -> None:
    children += [Child(attach_code(segment, slot)) for slot in (5, 6)]
    assert not segment.retire_writer(5) and not segment.retire_writer(6)
    children[0].kill()
    assert segment.retire_writer(5) and not segment.retire_writer(6)


# -- what is left behind -------------------------------------------------------------------------------------------


def test_close_unlinks_the_name_and_may_be_repeated() -> None:
    segment = Segment(PAYLOAD)
    assert segment.name in names()
    segment.close()
    segment.close()
    assert segment.name not in names()


def test_segment_of_a_killed_process_is_swept_by_the_next_start_but_no_living_ones(
    segment: Segment, children: list[Child]
) -> None:
    children.append(Child(f"s = Segment({PAYLOAD}); print(s.name, flush=True)"))
    children.append(Child(f"s = Segment({PAYLOAD}); print(s.name, flush=True)"))
    dead, living = (child.line for child in children)
    children[0].kill()
    assert {dead, living} <= names()
    following = Segment(PAYLOAD)
    assert dead not in names() and {living, segment.name, following.name} <= names()
    following.close()


def test_process_that_ends_in_good_order_leaves_no_segment_after_its_fork_ended() -> None:
    program = (
        f"import os, sys\nfrom sglang_mm_conn.memory import segment\nsegment.DIRECTORY = {module.DIRECTORY!r}\n"
        f"kept = segment.Segment({PAYLOAD})\nchild = os.fork()\nif not child: sys.exit()\nos.waitpid(child, 0)\n"
        "print(os.path.exists(kept._path))"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ended.stdout.split() == ["True"] and names() == set()


def test_a_sweep_names_what_it_removed_and_touches_nothing_else(children: list[Child]) -> None:
    children.append(Child(f"s = Segment({PAYLOAD}); print(s.name, flush=True)"))
    other = at("sglang-mm-conn-test-" + os.urandom(4).hex())
    Path(other).write_bytes(b"somebody else's")
    try:
        children[0].kill()
        removed = sweep_stale_segments()
        assert removed == [children[0].line] and os.path.exists(other)
    finally:
        os.unlink(other)


def test_too_much_memory_is_refused_naming_what_is_free_and_the_setting() -> None:
    before = names()
    with pytest.raises(MemoryUnavailable, match="SGLANG_EMBEDDING_CACHE_BUFFER_SIZE"):
        Segment(1 << 50)
    assert names() == before


def test_pages_are_reserved_at_the_start_so_a_full_filesystem_cannot_kill_a_copy() -> None:
    before = os.statvfs(module.DIRECTORY).f_bfree
    segment = Segment(64 << 20)
    status = os.stat(at(segment.name))
    assert status.st_blocks * 512 >= HEADER_BYTES + (64 << 20)
    segment.close()
    assert before > 0 and free_bytes() > 0
