"""Owns affinity: encoders that keep embeddings (--enable-prefix-mm-cache) get an image again that they have had.

sglang counts what its cache answers in the encoder's metrics; an image is a request's only one here, since the cache
knows whole requests.
"""

from __future__ import annotations

import re

import requests

from sglang_mm_conn.demo.servers import Server
from tests.fleet.fleet import Fleet
from tests.fleet.load import one_image_each, play
from tests.fleet.outcome import Outcome, at_least, at_most
from tests.fleet.tally import Tally

NAME = "affinity"
WHAT = "three encoders with --enable-prefix-mm-cache, 100 images ten times from two language servers"
ENCODERS, LANGUAGES = 3, 2
IMAGES, ROUNDS = 100, 10
LEAST_HITS = 0.95  # of the repeats
MOST_LOAD = 1.3  # times the mean
HITS, ALL = "sglang:encoder_cache_hit_files_total", "sglang:encoder_cache_total_files_total"


def run(fleet: Fleet) -> list[Outcome]:
    asked = one_image_each(IMAGES)
    fleet.learn(asked)
    group = fleet.servers(
        ENCODERS, LANGUAGES,
        env={"SGLANG_ENCODER_MAX_BATCH_SIZE": "1"},  # sglang's cache leaves batches of several requests out
        encoder_flags=("--enable-prefix-mm-cache", "--enable-metrics"),
    )  # fmt: skip
    urls = [server.url for server in group.languages]
    before = [counted(encoder) for encoder in group.encoders]
    tally = Tally(())
    for number in range(ROUNDS):
        # Each image is asked from the other language server in the next round.
        turned = urls[number % 2 :] + urls[: number % 2]
        tally += play(turned, asked, fleet.right, count=IMAGES)
        fleet.story.say(f"round {number + 1} of {ROUNDS}: {tally}")
    after = [counted(encoder) for encoder in group.encoders]
    hits = sum(new[0] - old[0] for old, new in zip(before, after, strict=True))
    loads = [new[1] - old[1] for old, new in zip(before, after, strict=True)]
    repeats = IMAGES * (ROUNDS - 1)
    mean = sum(loads) / len(loads)
    goals = [
        at_least("of the repeats hit the cache:", hits / repeats * 100, LEAST_HITS * 100, " %"),
        at_most("the busiest encoder got", max(loads) / max(mean, 1e-9), MOST_LOAD, " times the mean"),
    ]
    figures = [f"images per encoder: {', '.join(f'{load:.0f}' for load in loads)}"]
    servers = f"{ENCODERS} encoders, {LANGUAGES} language servers"
    return [fleet.outcome(NAME, servers, tally, goals, figures)]


def counted(encoder: Server) -> tuple[float, float]:
    """(images that its cache answered, images that it was asked for) so far."""
    answer = requests.get(f"{encoder.url}/metrics", timeout=30)
    answer.raise_for_status()
    return total(answer.text, HITS), total(answer.text, ALL)


def total(metrics: str, name: str) -> float:
    """Of all label values of one counter, in the text form of Prometheus."""
    found = re.findall(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", metrics, re.MULTILINE)
    return sum(map(float, found))
