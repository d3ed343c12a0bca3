"""The fault table itself: it finds what it says it finds, and some of its cells hold on every run of the tests."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from sglang_mm_conn.memory.segment import sweep_stale_segments
from tests.connector.payload import Part
from tests.connector.processes import Encoder, Zygote
from tests.faults import table
from tests.faults.baseline import RSS_MARGIN_KB, Holdings, Segments
from tests.faults.cases import FAULTS, Attempt, Fault, attempt
from tests.faults.network import Cable, why_impossible
from tests.faults.processes import Ground
from tests.faults.stages import STEPS, Step

NO_NETWORK = why_impossible()
HELD = Holdings(rss_kb=100_000, descriptors=50, sockets=20, threads=40, mapped=1)


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    process = Zygote()
    yield process
    process.close()


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    sweep_stale_segments()


def fault_of(name: str) -> Fault:
    return next(fault for fault in FAULTS if fault.name == name)


def step_of(part: str) -> Step:
    return next(step for step in STEPS if part in step.name)


@pytest.mark.parametrize(
    ("path", "fault", "step", "happened"),
    [
        ("shm", "encoder killed", "half written", "error 502"),
        ("shm", "encoder restarted, same port", "before", "right bytes"),
        ("mooncake", "encoder frozen, short", "half written", "right bytes"),
        ("mooncake", "language killed", "waits", "error 504"),
    ],
)
def test_a_fault_ends_as_promised(
    zygote: Zygote, directory: Path, path: str, fault: str, step: str, happened: str
) -> None:
    ground = Ground(zygote, path, directory)
    try:
        result = attempt(ground, fault_of(fault), step_of(step), None)
    finally:
        ground.close()
    assert not result.broken
    assert happened in result.happened and result.bystander_rooms > 0


@pytest.mark.skipif(bool(NO_NETWORK), reason=NO_NETWORK)
def test_a_network_that_is_cut_for_a_moment_costs_nothing(zygote: Zygote, directory: Path) -> None:
    ground = Ground(zygote, "mooncake", directory, with_cable=True)
    try:
        result = attempt(ground, fault_of("network cut, short"), step_of("half written"), None)
    finally:
        ground.close()
    assert (result.broken, result.happened) == ("", "right bytes")
    assert result.seconds >= 0.5, "nothing was cut"


@pytest.mark.skipif(bool(NO_NETWORK), reason=NO_NETWORK)
def test_nothing_passes_a_cable_that_is_cut_and_all_of_it_after_it_was_mended() -> None:
    cable = Cable()

    def ping() -> int:
        near, far = cable.sides
        script = f"import socket; socket.create_connection(('{far.address}', 1), timeout=0.5)"
        run = subprocess.run(
            ["ip", "netns", "exec", near.namespace, "python3", "-c", script], capture_output=True, text=True
        )
        return 1 if "refused" in run.stderr else 0

    try:
        assert ping() == 1  # nobody listens there, and says so
        cable.cut()
        assert ping() == 0
        cable.mend()
        assert ping() == 1
    finally:
        cable.close()


def test_wrong_bytes_are_found(zygote: Zygote, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ground = Ground(zygote, "shm", directory)

    def offer_something_else(encoder: Encoder, part: Part) -> None:
        other = replace(part, seed=part.seed + 1) if part.tokens == step.tokens else part
        encoder.announce(other)
        encoder.send(other)

    step = step_of("waits")
    monkeypatch.setattr(Encoder, "offer", offer_something_else)
    try:
        result = attempt(ground, fault_of("language frozen, short"), step, None)
    finally:
        ground.close()
    assert "WRONG BYTES" in result.broken


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({}, ""),
        ({"rss_kb": HELD.rss_kb + RSS_MARGIN_KB + 1}, "rss_kb"),
        ({"descriptors": 51}, "descriptors"),
        ({"sockets": 21}, "sockets"),
        ({"threads": 41}, "threads"),
        ({"mapped": 2}, "mapped"),
        ({"descriptors": 10, "threads": 3}, ""),
    ],
)
def test_what_a_process_holds_more_than_at_first_is_a_leak(change: dict[str, int], found: str) -> None:
    problems = replace(HELD, **change).growth(HELD, vanished=7, mooncake=False)
    assert [problem.split()[0] for problem in problems] == ([found] if found else [])


def test_over_mooncake_the_connections_to_each_killed_peer_are_no_leak_and_more_are() -> None:
    assert not replace(HELD, descriptors=50 + 8 + 4 * 7).growth(HELD, vanished=7, mooncake=True)
    assert replace(HELD, descriptors=50 + 8 + 4 * 7 + 1).growth(HELD, vanished=7, mooncake=True)


def test_a_segment_that_is_missing_or_left_is_found() -> None:
    segments = Segments()
    try:
        sweep_stale_segments()
        assert not segments.problems([], ["sglang-mm-conn-none"])
        assert segments.problems(["sglang-mm-conn-none"], []) and segments.problems([], [segments.decoy])
    finally:
        segments.close()


def test_the_table_counts_what_happened_and_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    attempts = [
        Attempt("encoder killed", "s", "mooncake", "right bytes", seconds=1),
        Attempt("encoder killed", "s", "shm", "right bytes", seconds=1),
        Attempt("encoder killed", "s", "shm", "error 502: lost", seconds=3),
        Attempt("encoder killed", "s", "shm", "right bytes", seconds=2),
    ]
    first, second = table.rows(attempts)
    assert (first.path, first.happened, first.median, first.longest, first.tried) == (
        "shm", "2x right bytes; 1x error 502: lost", 2, 3, 3,
    )  # fmt: skip
    assert second.happened == "right bytes"
    document = tmp_path / "document.md"
    document.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    table.write(table.in_markdown(attempts, "summary"), document)
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| encoder killed | s | shm | 2x right bytes; 1x error 502: lost | 2.00 / 3.00 | 3 |" in text
    document.write_text("no markers")
    with pytest.raises(ValueError, match="faults:begin"):
        table.write("text", document)
