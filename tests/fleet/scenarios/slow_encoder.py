"""Owns slow-encoder: one of two encoders is three times slower; requests/s and p99 beside sglang's even split.

Both deployments run all the while and are asked in turns. The encoders are slow by sleeping (CPU_BED_ENCODE_SLEEP of
ci/cpu_bed), as if an accelerator were busy: so the two of them do not take each other's cores.
"""

from __future__ import annotations

import statistics
from contextlib import ExitStack
from dataclasses import replace

from sglang_mm_conn.demo.launch import OUR_BACKEND
from sglang_mm_conn.demo.servers import ServerGroup
from tests.fleet.fleet import LANGUAGE_FLAGS, Fleet
from tests.fleet.load import CLIENTS, play, questions
from tests.fleet.outcome import Outcome, at_least, at_most
from tests.fleet.tally import Tally

NAME = "slow-encoder"
WHAT = "one of two encoders is three times slower: requests/s and p99 beside sglang's even split, in turns"
EVEN_SPLIT = "zmq_to_scheduler"
BACKENDS = (OUR_BACKEND, EVEN_SPLIT)
SECONDS_PER_IMAGE = (0.1, 0.3)
TURNS = 3  # of each
LEAST_RATIO = 1.3


# With images only: what is asked of the encoders is compared.
ASKED = tuple(replace(one, max_tokens=4) for one in questions(30, seed=3000) if one.images)


def play_in_turns(fleet: Fleet, groups: dict[str, ServerGroup], count: int) -> dict[str, list[Tally]]:
    turns: dict[str, list[Tally]] = {name: [] for name in groups}
    for name, group in groups.items():
        warm = play([group.language.url], ASKED, fleet.right, count=2 * CLIENTS)
        fleet.story.say(f"{name}, not counted: {warm}")
    for number in range(TURNS):
        for name, group in groups.items():
            turns[name].append(play([group.language.url], ASKED, fleet.right, count=count))
            last = turns[name][-1]
            fleet.story.say(f"turn {number + 1}: {name}: {last.rate:.2f} requests/s, p99 {last.p99:.2f} s; {last}")
    return turns


def run(fleet: Fleet) -> list[Outcome]:
    fleet.learn(ASKED)
    fleet.reset()
    with ExitStack() as stack:
        groups = {name: _group(fleet, name) for name in BACKENDS}
        for name, group in groups.items():
            fleet.story.say(f"{name}: two encoders and a language server: starting")
            stack.enter_context(group)
        turns = play_in_turns(fleet, groups, count=max(2 * CLIENTS, fleet.options.requests // 10))
    ours, even = turns[OUR_BACKEND], turns[EVEN_SPLIT]
    ratio = statistics.median(mine.rate / theirs.rate for mine, theirs in zip(ours, even, strict=True))
    all_ours, all_even = (sum(tallies[1:], tallies[0]) for tallies in (ours, even))
    goals = [
        at_least("requests/s, times those of the even split:", ratio, LEAST_RATIO),
        at_most("p99", all_ours.p99, all_even.p99),
    ]
    rates = {name: statistics.median(one.rate for one in tallies) for name, tallies in turns.items()}
    figures = [f"{name}: {rate:.2f} requests/s" for name, rate in rates.items()]
    figures.append(f"{EVEN_SPLIT}: {all_even.failed_text()} failed, {len(all_even.wrong)} wrong")
    slow = " and ".join(f"{seconds:g} s" for seconds in SECONDS_PER_IMAGE)
    return [fleet.outcome(NAME, f"2 encoders, {slow} per image", all_ours, goals, figures)]


def _group(fleet: Fleet, backend: str) -> ServerGroup:
    # One request after the other, in both: a batch would wait for all of its images.
    env = {**fleet.env, "SGLANG_ENCODER_MAX_BATCH_SIZE": "1"}
    if backend != OUR_BACKEND:
        del env["CPU_BED_FORBID_BUILTIN_TRANSPORT"]
    group = ServerGroup(
        fleet.model, fleet.directory / f"slow-{backend}", backend=backend, encoders=2, env=env,
        language_flags=LANGUAGE_FLAGS,
    )  # fmt: skip
    for encoder, seconds in zip(group.encoders, SECONDS_PER_IMAGE, strict=True):
        slow = {**encoder.launch.env, "CPU_BED_ENCODE_SLEEP": f"{seconds:g}"}
        encoder.launch = replace(encoder.launch, env=slow)
    return group
