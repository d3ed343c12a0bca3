"""What is run on a machine with a GPU, one process after the other, each with a time limit of its own.

A step that fails, hangs or cannot start is recorded and stops no other. Its figures are read from the file that it
wrote, as far as it came.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent.parent
PASSED, FAILED, TIMED_OUT, NOT_RUN = "passed", "failed", "timed out", "not run"
_LEAST_SECONDS = 5.0  # what is left must be worth starting a process
_GRACE_SECONDS = 5.0
_LAST_LINES = 3

Reader = Callable[[Path], Any]


@dataclass(frozen=True)
class Step:
    """``arguments`` of the Python interpreter; ``{out}`` is the file for the figures, which ``read`` reads."""

    name: str
    what: str
    arguments: tuple[str, ...]
    limit: float  # seconds
    read: Reader = lambda path: json.loads(path.read_text())
    needs_sglang: bool = False  # sglang's own transports import its kernels


@dataclass
class Outcome:
    name: str
    what: str
    status: str
    seconds: float = 0.0
    reason: str = ""
    figures: Any = None
    command: str = ""


def read_junit(path: Path) -> dict[str, Any]:
    """Counts of a pytest run, and the names of what failed. Raises ValueError where nothing ran: that shows nothing."""
    cases = list(ElementTree.parse(path).getroot().iter("testcase"))
    bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    reasons = sorted({str(case.find("skipped").get("message")) for case in skipped})  # type: ignore[union-attr]
    if len(skipped) == len(cases):
        raise ValueError(f"all {len(cases)} tests were skipped: {'; '.join(reasons)}")
    return {
        "passed": len(cases) - len(bad) - len(skipped),
        "failed": [f"{case.get('name')}: {_message(case)}" for case in bad],
        "skipped": len(skipped),
        "skipped_because": reasons,
    }


def _message(case: ElementTree.Element) -> str:
    found = case.find("failure")
    found = case.find("error") if found is None else found
    return "" if found is None else str(found.get("message")).splitlines()[0][:200]


def steps(device: str) -> list[Step]:
    """In the order of what is worth most where time runs out. On a CPU the same, smaller: a rehearsal."""
    gpu = device == "cuda"
    sizes, rounds = ("1M,16M,128M", "3") if gpu else ("1M,16M", "1")

    def bench(*transports: str, sizes: str = sizes, rounds: str = rounds) -> tuple[str, ...]:
        device_option = ("--device", "cuda") if gpu else ()
        return (
            "-m", "sglang_mm_conn", "bench", "--quick", "--no-special", *device_option,
            "--transports", ",".join(transports), "--sizes", sizes, "--rounds", rounds, "--json", "{out}",
        )  # fmt: skip

    # Without a GPU the tests of the same copies, on a device that is late on purpose, stand for its own.
    tests = ("tests/gpu/test_gpu.py", "-m", "not gpu_pool") if gpu else ("tests/connector/test_gpu_memory.py",)
    pytest = ("-m", "pytest", "-q", "-W", "default", "-p", "no:cacheprovider", "--junitxml", "{out}")
    large = sizes.removeprefix("1M,")
    found = [
        Step(
            "tests", tests[0] + ", host memory pool" * gpu, (*pytest, *tests), 75, read_junit,
        ),
        Step(
            "rates", "each copy of a transfer beside a plain one",
            ("-m", "sglang_mm_conn", "rates", "--device", device, "--mib", "256" if gpu else "16", "--json", "{out}"),
            30,
        ),
        Step(
            "connector", "this connector over shared memory, between two processes",
            bench("memcpy", "shm"), 50,
        ),
        Step("mooncake", "this connector over Mooncake, host memory pool", bench("memcpy", "mooncake"), 50),
        Step(
            "endurance", "a thousand rooms over each transport, with checksums, beside a busy device",
            ("-m", "tests.gpu.endurance", "--device", device, "--seconds", "6", "--json", "{out}"), 70,
        ),
    ]  # fmt: skip
    if gpu:
        found += [
            Step(
                "tests_gpu_pool", "tests/gpu/test_gpu.py, pool on the GPU",
                (*pytest, "tests/gpu/test_gpu.py", "-m", "gpu_pool"), 45, read_junit,
            ),
            Step(
                "gpu_pool", "this connector over Mooncake, the pool on the GPU", bench("memcpy", "mooncake+gpu_pool"),
                45,
            ),
        ]  # fmt: skip
    for transport in ("zmq_to_scheduler", "mooncake_builtin"):
        found.append(
            Step(
                transport, f"sglang's own {transport.removesuffix('_builtin')} beside this connector",
                bench("shm", transport, sizes=large, rounds="2" if gpu else rounds), 75, needs_sglang=True,
            )
        )  # fmt: skip
    return found


def run_step(
    step: Step, out: Path, log: Path, seconds: float, environment: Mapping[str, str], stand_ins: Path | None = None
) -> Outcome:
    """Run ``step`` for at most its limit and ``seconds``. Its output is added to ``log``, its figures stay in ``out``.

    ``stand_ins``: goes to the end of the PYTHONPATH of steps that import sglang's kernels.
    """
    limit = min(step.limit, seconds)
    command = [sys.executable, *(argument.replace("{out}", str(out)) for argument in step.arguments)]
    shown = "python " + " ".join(argument.replace("{out}", out.name) for argument in step.arguments)
    outcome = Outcome(step.name, step.what, NOT_RUN, command=shown)
    if limit < min(_LEAST_SECONDS, step.limit):
        outcome.reason = "no time was left"
        return outcome
    environment = dict(environment)
    if step.needs_sglang and stand_ins is not None:
        paths = [environment.get("PYTHONPATH", ""), str(stand_ins)]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    out.unlink(missing_ok=True)
    began = time.monotonic()
    with log.open("ab") as file:
        file.write(f"\n==== {step.name}: {shown}\n".encode())
        file.flush()
        start = file.tell()
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        _end(process)
    outcome.seconds = time.monotonic() - began
    words = [line.strip() for line in log.read_bytes()[start:].decode(errors="replace").splitlines() if line.strip()]
    if code is None:
        outcome.status, outcome.reason = TIMED_OUT, f"not done after {limit:.0f} s"
    elif code:
        outcome.status = FAILED
        outcome.reason = f"exit status {code}: " + " / ".join(_plain(line) for line in words[-_LAST_LINES:])
    else:
        outcome.status = PASSED
    try:
        outcome.figures = step.read(out)
    except (OSError, ValueError, ElementTree.ParseError) as error:
        if outcome.status == PASSED:
            outcome.status, outcome.reason = FAILED, f"no figures: {error}"
    return outcome


def _plain(line: str) -> str:
    return re.sub(r"\s+", " ", line)[:300]


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the step's processes, those that it started too: they share its session."""
    with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(_GRACE_SECONDS)
    with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(_GRACE_SECONDS)


def run_all(
    chosen: Sequence[Step], out: Path, seconds: float, environment: Mapping[str, str], stand_ins: Path | None,
    say: Callable[[str], None], add: Callable[[Outcome], None],
) -> None:  # fmt: skip
    """Every step, as long as ``seconds`` last. ``add`` is told of each one when it has ended."""
    until = time.monotonic() + seconds
    (out / "steps").mkdir(exist_ok=True)
    for step in chosen:
        say(f"{step.name}: {step.what}")
        outcome = run_step(
            step, out / "steps" / step.name, out / "gpu.log", until - time.monotonic(), environment, stand_ins
        )
        say(f"{step.name}: {outcome.status} in {outcome.seconds:.0f} s {outcome.reason}".rstrip())
        add(outcome)
