"""docs/results/gpu.md is what a run's JSON says: figures with the card's name, or that there were none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.gpu import __main__ as command
from tests.gpu.document import DOCUMENT, NO_GPU, render, write
from tests.gpu.steps import FAILED, PASSED


def step(name: str, figures: Any, status: str = PASSED, reason: str = "") -> dict[str, Any]:
    return {"name": name, "what": name, "status": status, "seconds": 2.0, "reason": reason, "figures": figures}


def row(transport: str, median_ms: float) -> dict[str, Any]:
    return {"transport": transport, "nbytes": 16 << 20, "median_ms": median_ms, "p99_ms": 9.0, "gbytes_per_s": 1.25}


@pytest.fixture
def run() -> dict[str, Any]:
    held = {"descriptors": 40, "pinned_bytes": 0, "torch_bytes": 0, "gpu_bytes": 600 << 20}
    return {
        "device": "cuda",
        "machine": {
            "gpu": "Card 9000", "gpu_mib": 81559, "driver": "1.2.3", "cores": 16, "cpu": "", "kernel": "6.1",
            "python": "3.12.3", "packages": {"torch": "2.11.0"},
        },
        "steps": [
            step("tests", {"passed": 20, "failed": ["test_x: torn | apart"], "skipped": 1, "skipped_because": ["why"]}),
            step("rates", [
                {"transport": "plain a", "plain": "plain a", "bytes_per_second": 50e9, "right": True},
                {"transport": "into the pool", "plain": "plain a", "bytes_per_second": 40e9, "right": False},
            ]),
            step("connector", {"rows": [row("memcpy", 1.0), row("shm", 1.5)]}),
            step("endurance", [{
                "transport": "shm", "rooms": 1000, "wrong": 0, "seconds": 3.0, "before": held, "after": held,
                "most_pinned_bytes": 3 << 20, "problems": [],
            }]),
            step("mooncake_builtin", None, FAILED, "exit status 1: no engine"),
        ],
    }  # fmt: skip


def test_figures_come_with_the_cards_name_and_what_failed(run: dict[str, Any]) -> None:
    text = render(run)
    for expected in (
        "**Card 9000** (81559 MiB, driver 1.2.3), 16 cores, Linux 6.1",
        "| `tests` | tests | passed; 20 passed, 1 failed, 1 skipped; test_x: torn \\| apart; why | 2 |",
        "| into the pool | 40.0 | 80% of plain a | **WRONG** |",
        "| `connector` | shm | 16 MiB | 1.50 | 9.00 | 1.25 | 1.50 of memcpy |",
        "| shm | 1000 | 0 | 3.0 | 40 → 40 | 600 → 600 MiB | 3.0 MiB | none |",
        "| `mooncake_builtin` | mooncake_builtin | failed: exit status 1: no engine | 2 |",
    ):
        assert expected in text
    assert NO_GPU not in text


def test_a_rehearsal_says_that_no_gpu_was_there_and_gives_no_figure(run: dict[str, Any]) -> None:
    run["device"] = "cpu"
    text = render(run)
    assert text.startswith(NO_GPU) and "ms" not in text.split() and "Card" not in text and "GB/s" not in text


def test_the_page_is_changed_between_its_markers_only(run: dict[str, Any], tmp_path: Path) -> None:
    page = tmp_path / "gpu.md"
    page.write_text("before\n<!-- gpu: begin -->\nold\n<!-- gpu: end -->\nafter\n")
    write(run, page)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "Card 9000" in text and "old" not in text


def test_the_page_in_docs_takes_the_tables() -> None:
    text = DOCUMENT.read_text()
    assert text.count("<!-- gpu: begin -->") == text.count("<!-- gpu: end -->") == 1


def test_a_file_that_is_no_run_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps({"device": "cuda"}))
    monkeypatch.setattr("sys.argv", ["tests.gpu", "--write", str(file)])
    before = DOCUMENT.read_text()
    assert command.main() == 1
    assert str(file) in capsys.readouterr().err and DOCUMENT.read_text() == before
