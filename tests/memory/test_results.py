"""Shared results: one rank receives, the others of its host read; nothing is seen before every row is there."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sglang_mm_conn.core.errors import ProtocolError
from sglang_mm_conn.core.rooms import new_id, new_room_base
from sglang_mm_conn.memory.results import Contents, PrivateResult, SharedResult, fault_in, read_result
from sglang_mm_conn.memory.segment import DIRECTORY, HEADER_BYTES, PREFIX, Segment, sweep_stale_segments

CONTENTS = Contents(tokens=3, dtype="float32", nbytes=48, metadata=b"grids")


def names() -> set[str]:
    return {name for name in os.listdir(DIRECTORY) if name.startswith(PREFIX)}


def resident(rows: torch.Tensor) -> dict[str, int]:
    """What the kernel says of the mapping that ``rows`` lie in, in bytes."""
    address, found = rows.data_ptr(), False
    numbers: dict[str, int] = {}
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            low, high = (int(end, 16) for end in first.split("-"))
            found = low <= address < high
        elif found and rest[-1] == "kB":
            numbers[first[:-1]] = int(rest[0]) << 10
    return numbers


@pytest.fixture
def room() -> str:
    return new_room_base(new_id())


@pytest.fixture
def result(room: str) -> Iterator[SharedResult]:
    made = SharedResult(room, CONTENTS)
    made.rows.copy_(torch.arange(48, dtype=torch.uint8))
    yield made
    made.close()


def test_nobody_sees_a_result_before_it_is_published(result: SharedResult, room: str) -> None:
    assert read_result(room) is None
    result.publish()
    assert read_result(room) is not None


def test_a_reader_gets_every_byte_and_the_metadata(result: SharedResult, room: str) -> None:
    result.publish()
    answer = read_result(room)
    assert answer is not None
    rows, contents = answer
    assert torch.equal(rows, torch.arange(48, dtype=torch.uint8)) and contents == CONTENTS


def test_another_process_reads_it_too(result: SharedResult, room: str) -> None:
    result.publish()
    code = f"from sglang_mm_conn.memory.results import read_result; print(read_result({room!r})[0].tolist())"
    root = Path(__file__).resolve().parents[2]
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    assert answer.stdout.strip() == str(list(range(48)))


def test_what_a_reader_changes_reaches_nobody_else(result: SharedResult, room: str) -> None:
    result.publish()
    first, second = read_result(room), read_result(room)
    assert first is not None and second is not None
    first[0].zero_()
    assert torch.equal(second[0], torch.arange(48, dtype=torch.uint8)) and torch.equal(result.rows, second[0])


def test_what_the_owner_changes_after_publishing_reaches_no_reader(result: SharedResult, room: str) -> None:
    result.publish()
    answer = read_result(room)
    assert answer is not None
    result.rows.zero_()
    assert torch.equal(answer[0], torch.arange(48, dtype=torch.uint8))


def test_reading_makes_no_copy(room: str) -> None:
    """The kernel counts a page that belongs to this process alone as anonymous: there is none until one is written."""
    nbytes = 1 << 20
    made = SharedResult(room, Contents(nbytes, "uint8", nbytes, b""))
    made.rows.fill_(7)
    made.publish()
    answer = read_result(room)
    assert answer is not None
    fault_in(answer[0])
    assert bool((answer[0] == 7).all()) and bool((made.rows == 7).all())
    for rows in (answer[0], made.rows):
        assert resident(rows)["Rss"] >= nbytes and resident(rows)["Anonymous"] == 0
    answer[0][: nbytes // 2] = 8
    assert nbytes // 2 <= resident(answer[0])["Anonymous"] < nbytes, "what is changed is copied, and nothing else"
    made.close()


def test_two_hosts_that_share_a_directory_have_results_of_their_own(room: str) -> None:
    results = [SharedResult(room, CONTENTS, host_index=index) for index in (0, 1)]
    for index, result in enumerate(results):
        result.rows.fill_(index)
        result.publish()
    for index, result in enumerate(results):
        answer = read_result(room, host_index=index)
        assert answer is not None and bool((answer[0] == index).all())
        result.close()


def test_a_damaged_result_is_an_error_and_not_an_embedding(result: SharedResult, room: str) -> None:
    result.publish()
    with open(os.path.join(DIRECTORY, result._segment.name), "r+b") as file:
        file.truncate(HEADER_BYTES + 50)
    with pytest.raises(ProtocolError, match="damaged"):
        read_result(room)


def test_a_reader_keeps_its_rows_after_the_owner_has_closed_and_no_name_is_left(room: str) -> None:
    before = names()
    result = SharedResult(room, CONTENTS)
    result.rows.fill_(7)
    result.publish()
    answer = read_result(room)
    result.close()
    del result
    assert names() == before and read_result(room) is None
    assert answer is not None and bool((answer[0] == 7).all())


def test_a_result_that_was_never_published_leaves_no_name(room: str) -> None:
    before = names()
    SharedResult(room, CONTENTS).close()
    assert names() == before


def test_a_living_owner_s_result_is_not_swept_and_a_dead_one_s_is(room: str) -> None:
    code = (
        "import sys\nfrom sglang_mm_conn.memory.results import Contents, SharedResult\n"
        f"r = SharedResult({room!r}, Contents(1, 'float32', 4, b''))\nr.publish()\nprint('there', flush=True)\n"
        "sys.stdin.read()"
    )
    root = Path(__file__).resolve().parents[2]
    owner = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    try:
        assert owner.stdout is not None and owner.stdout.readline() == "there\n"
        sweep_stale_segments()
        assert read_result(room) is not None
    finally:
        owner.kill()
        owner.communicate()
    assert sweep_stale_segments()
    assert read_result(room) is None


def test_metadata_of_any_length_travels(room: str) -> None:
    contents = Contents(1, "bfloat16", 2, os.urandom(100_000))
    result = SharedResult(room, contents)
    result.publish()
    answer = read_result(room)
    result.close()
    assert answer is not None and answer[1] == contents


def test_results_that_come_and_go_leave_no_descriptor(room: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        result = SharedResult(room, CONTENTS)
        result.publish()
        read_result(room)
        result.close()
        del result
    assert len(os.listdir("/proc/self/fd")) <= before


def test_a_private_result_has_no_name(room: str) -> None:
    before = names()
    result = PrivateResult(room, CONTENTS)
    result.publish()
    assert result.rows.numel() == 48 and names() == before and read_result(room) is None


def test_a_shared_result_that_cannot_be_made_keeps_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Segment) -> None:
        raise OSError("too many open files")

    monkeypatch.setattr(Segment, "map_private", fails)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(OSError, match="too many"):
            SharedResult(new_room_base(new_id()), CONTENTS)
    assert len(os.listdir("/proc/self/fd")) == before
