"""Fresh schedules in every test run; proof that the simulator finds bugs; replay."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.simulator.mutations import MUTATIONS

ROOT = Path(__file__).resolve().parents[2]


def simulate(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.simulator", *options],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=500,
    )  # fmt: skip


def result(*options: str) -> dict[str, Any]:
    done = simulate("--json", *options)
    assert done.stdout, done.stderr[-4000:]
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_no_promise_is_broken_in_fresh_schedules_and_every_kind_of_fault_is_in_them() -> None:
    answer = result("--schedules", "5000")
    assert not answer["broken"], "replay with python -m tests.simulator --replay NAME: " + str(answer["broken"])
    assert answer["schedules"] == 5000
    kinds = {
        "abort some", "freeze some", "obstruct some", "cut some", "kill encoder", "kill server", "fail write",
        "duplicate some", "twist some", "prompt rejected", "encode fails", "late pieces", "revocations", "resumes",
        "arrived", "failed", "written inline", "left to the control thread", "drain some", "refused while draining",
        "refuse some", "fail encodes", "lie some", "break post", "kill after answer", "forget some", "redispatched",
        "given up",
    }  # fmt: skip
    assert not {kind for kind in kinds if answer["seen"].get(kind, 0) < 20}, answer["seen"]


def test_the_simulator_notices_when_any_protection_is_taken_away() -> None:
    missed = result("--prove", "--schedules", "20000")
    assert missed.keys() == MUTATIONS.keys()
    assert not [protection for protection, (_, problem) in missed.items() if not problem]


def test_a_schedule_replays_exactly() -> None:
    first, second = simulate("--replay", "again:3"), simulate("--replay", "again:3")
    assert first.returncode == 0 and first.stdout == second.stdout and "part 1" in first.stdout


def test_a_violation_replays_as_the_same_violation() -> None:
    without = ("--without", "quarantine")
    name, problem = result("--schedules", "20000", "--most", "1", *without)["broken"][0]
    replayed = simulate("--replay", name, *without)
    assert replayed.returncode == 1 and problem.partition(" (")[0] in replayed.stdout
