"""The command: its options, and a run of real processes from end to end."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sglang_mm_conn.__main__ import main
from sglang_mm_conn.bench import markdown_blocks
from sglang_mm_conn.bench.sizes import effort, parse_size, show_size

BEGIN, END = markdown_blocks.markers(markdown_blocks.TRANSFERS)
TRANSPORTS = "memcpy,shm,shm+windows,shm+fragmented,shm+key,zmq_baseline,zmq_baseline+copied,zmq_baseline+windows,tcp"
ROW_FIELDS = {
    "transport", "nbytes", "rooms", "rounds", "median_ms", "p99_ms", "best_ms", "gbytes_per_s", "cpu_s_per_gbyte",
    "of_baseline", "of_baseline_best", "speed_up", "rooms_per_s", "per_room",
}  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--transports", "shm,ftp"], "--transports: 'ftp': no transport is called 'ftp'"),
        (["--transports", "tcp+key"], "--transports: 'tcp+key': only shm, mooncake and zmq_baseline have variations"),
        (
            ["--transports", "zmq_baseline+key"],
            "--transports: 'zmq_baseline+key': zmq_baseline has only the variations windows, copied",
        ),
        (["--transports", "shm+fast"], "--transports: 'shm+fast': 'fast' is none of the variations"),
        (["--sizes", "16M,big"], "--sizes: 'big' is no size"),
        (["--sizes", "10K"], "--sizes: '10K' is not whole rows of 8192 bytes"),
        (
            ["--device", "cuda", "--transports", "shm,tcp"],
            "--transports: tcp cannot be measured with --device cuda, only shm,",
        ),
        (["--transports", "mooncake+gpu_pool"], "--transports: mooncake+gpu_pool needs --device cuda"),
        (["--transports", "shm+gpu_pool"], "shm has only the variations key, fragmented"),
        (["servers", "--device", "cuda"], "--device is an option of `bench transfers`"),
        (["--rounds", "0"], "--rounds must be 1 or more, not 0"),
        (["servers", "--rounds", "0"], "--rounds must be 1 or more, not 0"),
        (["servers", "--sizes", "1M"], "--sizes is an option of `bench transfers`"),
        (["servers", "--transports", "shm"], "--transports: 'shm' is none of the transports of `bench servers`"),
    ],
)
def test_a_bad_value_is_named_with_its_option(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == 1
    assert words in capsys.readouterr().out.replace("\n", " ")


def test_a_gpu_that_is_not_there_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["bench", "--device", "cuda", "--transports", "memcpy"]) == 1
    assert "--device cuda, but torch finds no GPU here" in capsys.readouterr().out


def test_sizes_are_read_as_they_are_shown() -> None:
    for text in ("64 KiB", "16 MiB", "1 GiB"):
        assert show_size(parse_size(text)) == text


def test_every_size_has_rooms_to_measure() -> None:
    for quick in (True, False):
        for nbytes in (4096, 64 << 10, 1 << 20, 512 << 20, 4 << 30):
            work = effort(nbytes, quick=quick)
            assert work.singles >= 1
            assert all(count >= in_flight for in_flight, count in work.concurrent)


def test_tables_go_between_the_markers_and_nothing_else_changes() -> None:
    text = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert markdown_blocks.insert(text, "new") == f"before\n{BEGIN}\n\nnew\n\n{END}\nafter\n"
    assert markdown_blocks.insert(markdown_blocks.insert(text, "new"), "new") == markdown_blocks.insert(text, "new")
    with pytest.raises(ValueError, match="must hold the lines"):
        markdown_blocks.insert("no markers", "new")


def test_a_folder_takes_the_tables_in_the_file_of_their_kind(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    assert markdown_blocks.document(tmp_path, markdown_blocks.STREAMED) == tmp_path / "streamed.md"
    assert markdown_blocks.document(page, markdown_blocks.STREAMED) == page


def test_a_run_measures_every_transport_and_reports_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures, page = tmp_path / "figures.json", tmp_path / "page.md"
    page.write_text(f"# Page\n{BEGIN}\n{END}\nend\n")
    status = main(
        [
            *("bench", "--quick", "--transports", TRANSPORTS, "--sizes", "64K,2M", "--rounds", "1", "--width", "512"),
            *("--block-size", "16", "--no-special", "--json", str(figures), "--plots", str(tmp_path / "plots")),
            *("--write", str(page)),
        ]
    )
    shown = capsys.readouterr().out
    assert status == 0, shown
    told = json.loads(figures.read_text())
    assert {(row["transport"], row["nbytes"]) for row in told["rows"]} == {
        (transport, nbytes) for transport in TRANSPORTS.split(",") for nbytes in (64 << 10, 2 << 20)
    }
    for row in told["rows"]:
        assert set(row) == ROW_FIELDS
        assert row["median_ms"] > 0 and row["of_baseline"] > 0 and row["rooms_per_s"]
    assert told["machine"]["cores"] >= 1 and told["plan"]["rounds"] == 1 and told["runs"]
    for row in told["rows"]:
        if row["transport"].startswith("shm"):
            assert all(number < 0.01 for number in row["per_room"].values()), f"created per room: {row}"
    for name in ("latency", "speed", "cpu", "rooms"):
        assert (tmp_path / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    for text in ("64 KiB", "2 MiB", "shm+windows"):
        assert text in shown and text in page.read_text()
    assert page.read_text().endswith("end\n")


def test_no_process_outlives_a_benchmark_that_is_killed_in_the_middle(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("wb") as file:
        bench = subprocess.Popen(
            [
                *(sys.executable, "-m", "sglang_mm_conn", "bench"),
                *("--transports", "memcpy,shm", "--sizes", "16M", "--rounds", "999"),
            ],
            stdout=file,
            stderr=file,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.getcwd(), "PYTHONUNBUFFERED": "1"},
        )
    try:
        wait_for(lambda: "round 1" in log.read_text(), "the first round")
    finally:
        bench.send_signal(signal.SIGKILL)
        bench.wait(10)
    wait_for(lambda: not group_exists(bench.pid), "all of its processes are gone")


def wait_for(condition: Callable[[], bool], what: str) -> None:
    until = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < until, f"not within 90 s: {what}"
        time.sleep(0.1)


def group_exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_file_without_markers_is_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text("nothing here")
    for what in ("transfers", "servers"):
        assert main(["bench", what, "--quick", "--write", str(page)]) == 1
        assert "must hold the lines" in capsys.readouterr().out
