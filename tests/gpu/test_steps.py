"""The steps of a GPU run: each has its own end, and none stops the others."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from pathlib import Path

import pytest

from tests.gpu.steps import FAILED, NOT_RUN, PASSED, TIMED_OUT, Outcome, Step, read_junit, run_all, run_step, steps

WRITES = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text('[1]')"


def step(code: str, limit: float = 30.0, *, needs_sglang: bool = False) -> Step:
    return Step("one", "a step", ("-c", code, "{out}"), limit, needs_sglang=needs_sglang)


def run(one: Step, folder: Path, seconds: float = 60.0, stand_ins: Path | None = None) -> Outcome:
    return run_step(one, folder / "figures", folder / "log", seconds, os.environ, stand_ins)


def test_a_step_that_passes_leaves_its_figures(tmp_path: Path) -> None:
    outcome = run(step(WRITES), tmp_path)
    assert (outcome.status, outcome.figures, outcome.reason) == (PASSED, [1], "")


def test_a_step_that_fails_says_what_it_printed_last_and_keeps_its_figures(tmp_path: Path) -> None:
    outcome = run(step(f"{WRITES}; sys.exit('the card is gone')"), tmp_path)
    assert (outcome.status, outcome.figures) == (FAILED, [1])
    assert outcome.reason == "exit status 1: the card is gone"


def test_a_step_without_figures_has_failed(tmp_path: Path) -> None:
    outcome = run(step("pass"), tmp_path)
    assert outcome.status == FAILED and outcome.reason.startswith("no figures: ")


def test_a_step_that_hangs_is_ended_with_every_process_that_it_started(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time\n"
        "print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']).pid, flush=True)\n"
        "time.sleep(600)"
    )
    outcome = run(step(code, limit=3.0), tmp_path)
    assert (outcome.status, outcome.reason) == (TIMED_OUT, "not done after 3 s")
    pid = int((tmp_path / "log").read_text().split()[-1])
    until = time.monotonic() + 10
    while Path(f"/proc/{pid}/status").exists() and "zombie" not in Path(f"/proc/{pid}/status").read_text():
        assert time.monotonic() < until, "the child lives on"
        time.sleep(0.05)


def test_a_step_for_which_no_time_is_left_is_not_begun(tmp_path: Path) -> None:
    outcome = run(step(WRITES), tmp_path, seconds=1.0)
    assert (outcome.status, outcome.reason) == (NOT_RUN, "no time was left") and not (tmp_path / "figures").exists()


def test_stand_ins_are_there_only_where_sglang_is_imported(tmp_path: Path) -> None:
    code = "import json, pathlib, sys; pathlib.Path(sys.argv[1]).write_text(json.dumps(sys.path))"
    assert str(tmp_path / "stand") in run(step(code, needs_sglang=True), tmp_path, stand_ins=tmp_path / "stand").figures
    assert str(tmp_path / "stand") not in run(step(code), tmp_path, stand_ins=tmp_path / "stand").figures


def test_a_step_that_fails_stops_no_other(tmp_path: Path) -> None:
    found: list[Outcome] = []
    run_all([step("sys.exit(1)"), step(WRITES)], tmp_path, 60.0, os.environ, None, lambda text: None, found.append)
    assert [outcome.status for outcome in found] == [FAILED, PASSED]


def test_tests_that_were_all_skipped_have_shown_nothing(tmp_path: Path) -> None:
    report = tmp_path / "junit.xml"
    report.write_text(
        '<testsuites><testsuite><testcase name="a"><skipped message="no GPU"/></testcase></testsuite></testsuites>'
    )
    with pytest.raises(ValueError, match="all 1 tests were skipped: no GPU"):
        read_junit(report)
    report.write_text(
        '<testsuites><testsuite><testcase name="a"/><testcase name="b"><failure message="torn\nmore"/></testcase>'
        '<testcase name="c"><skipped message="no GPU"/></testcase></testsuite></testsuites>'
    )
    found = read_junit(report)
    assert (found["passed"], found["skipped"]) == (1, 1) and found["failed"][0].startswith("b: torn")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_step_has_a_command_that_is_there(device: str) -> None:
    for one in steps(device):
        assert one.arguments[0] == "-m" and "{out}" in one.arguments and one.limit <= 90, one.name
        assert importlib.util.find_spec(one.arguments[1]) is not None, one.name


def test_without_a_gpu_a_run_is_refused_and_the_rehearsal_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    from tests.gpu.__main__ import main

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["tests.gpu"])
    assert main() == 1
    assert "--device cpu rehearses without one" in capsys.readouterr().err
