"""Owns bench-serving: sglang's own benchmark with several images a request, beside sglang's transport, in turns."""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sglang_mm_conn.bench.measurement import quantile
from sglang_mm_conn.demo.launch import OUR_BACKEND, Launch
from sglang_mm_conn.demo.servers import ServerGroup
from tests.connector.processes import ROOT
from tests.fleet.fleet import LANGUAGE_FLAGS, Fleet, FleetError
from tests.fleet.load import CLIENTS
from tests.fleet.outcome import Outcome, at_least, at_most
from tests.fleet.tally import Reply, Tally

NAME = "bench-serving"
WHAT = "python -m sglang.bench_serving, three images a request, two encoders, beside sglang's transport, in turns"
BUILT_IN = "zmq_to_scheduler"
BACKENDS = (OUR_BACKEND, BUILT_IN)
TURNS = 6  # of each
MOST_OF_SLOWEST = 0.85
IMAGES = 3
SERVERS = "2 encoders"
_LIMIT_SECONDS = 900.0
_STAND_IN = ROOT / "tests" / "fleet" / "stand_in"


def run(fleet: Fleet) -> list[Outcome]:
    fleet.reset()
    count = max(2 * CLIENTS, fleet.options.requests // 5)
    with ExitStack() as stack:
        groups = {name: _group(fleet, name) for name in BACKENDS}
        for name, group in groups.items():
            fleet.story.say(f"{name}: two encoders and a language server: starting")
            stack.enter_context(group)
        results: dict[str, list[dict[str, Any]]] = {name: [] for name in BACKENDS}
        for number in range(TURNS):
            for name in BACKENDS if number % 2 == 0 else BACKENDS[::-1]:
                # The same prompts for both, other ones each turn: no cache of the language server knows them.
                result = measured(fleet, groups[name], name, count, seed=number + 1)
                results[name].append(result)
                fleet.story.say(f"turn {number + 1}: {name}: {result['request_throughput']:.2f} requests/s")
    ours, theirs = results[OUR_BACKEND], results[BUILT_IN]
    pairs = [replies(mine, other) for mine, other in zip(ours, theirs, strict=True)]
    tally = Tally(tuple(reply for some in pairs for reply in some))
    failed = sum(bool(error) for one in theirs for error in one["errors"])
    if failed or tally.failed:  # nothing to compare
        return [fleet.outcome(NAME, SERVERS, tally, [at_most(f"failed of {BUILT_IN}:", failed, 0, "")])]
    rate = [statistics.median(one["request_throughput"] for one in results) for results in (ours, theirs)]
    first = [[ttft for one in results for ttft in one["ttfts"]] for results in (ours, theirs)]
    goals = [
        at_least(f"requests/s, times those of {BUILT_IN}:", rate[0] / rate[1], 1.0),
        at_most(
            f"time to the first token of the slowest 1 %, times that of {BUILT_IN}:",
            quantile(first[0], 0.99) / quantile(first[1], 0.99), MOST_OF_SLOWEST, "",
        ),
    ]  # fmt: skip
    figures = [f"requests/s: {rate[0]:.2f}, {BUILT_IN} {rate[1]:.2f}"]
    for share in (0.5, 0.9, 0.99):
        mine, other = (1000 * quantile(some, share) for some in first)
        figures.append(f"time to the first token, {100 * share:g} %: {mine:.0f} ms, {BUILT_IN} {other:.0f} ms")
    return [fleet.outcome(NAME, SERVERS, tally, goals, figures)]


def replies(mine: dict[str, Any], other: dict[str, Any]) -> list[Reply]:
    """Of one turn: right where both transports lead to the same text."""
    return [
        Reply(f"prompt {number}", IMAGES, 0.0, ttft + sum(itls), 500 if error else 200, text == expected != "", error)
        for number, (ttft, itls, error, text, expected) in enumerate(
            zip(
                mine["ttfts"], mine["itls"], mine["errors"], mine["generated_texts"], other["generated_texts"],
                strict=True,
            )
        )
    ]  # fmt: skip


def measured(fleet: Fleet, group: ServerGroup, name: str, count: int, seed: int) -> dict[str, Any]:
    """What one run of the benchmark wrote. Raises FleetError where it failed."""
    out = fleet.directory / f"bench-serving-{name}-{seed}.jsonl"
    command = [
        *(sys.executable, "-m", "sglang.bench_serving", "--backend", "sglang-oai-chat"),
        *("--base-url", group.language.url, "--model", str(fleet.model), "--dataset-name", "image"),
        *("--num-prompts", str(count), "--max-concurrency", str(CLIENTS), "--warmup-requests", "4"),
        *("--image-count", str(IMAGES), "--image-resolution", "84x112", "--image-format", "png"),
        *("--image-content", "random", "--random-input-len", "16", "--random-output-len", "8"),
        *("--random-range-ratio", "1", "--temperature", "0", "--seed", str(seed)),
        *("--output-file", str(out), "--output-details", "--disable-tqdm"),
    ]
    done = subprocess.run(
        command, env=environment(fleet.model), capture_output=True, text=True, check=False, timeout=_LIMIT_SECONDS
    )
    if done.returncode != 0 or not out.exists():
        raise FleetError(f"sglang.bench_serving ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    result: dict[str, Any] = json.loads(out.read_text().splitlines()[-1])
    return result


def environment(model: Path) -> dict[str, str]:
    """That of a server on a CPU. sglang imports `datasets` for other benchmarks than this one."""
    found = Launch("language", model).environment()
    if importlib.util.find_spec("datasets") is None:
        paths = [str(_STAND_IN), *filter(None, [found.get("PYTHONPATH")])]
        found["PYTHONPATH"] = os.pathsep.join(paths)
    return found


def _group(fleet: Fleet, backend: str) -> ServerGroup:
    env = dict(fleet.env)
    if backend != OUR_BACKEND:
        del env["CPU_BED_FORBID_BUILTIN_TRANSPORT"]
    directory = fleet.directory / f"bench-{backend}"
    return ServerGroup(fleet.model, directory, backend=backend, encoders=2, env=env, language_flags=LANGUAGE_FLAGS)
