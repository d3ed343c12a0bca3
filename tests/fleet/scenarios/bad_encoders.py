"""Owns bad-encoders: beside a good encoder, the list names something that is none, from the beginning or in the middle
of the load."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import requests

from sglang_mm_conn.demo.servers import Server, ServerGroup, free_port
from tests.fleet.fleet import Fleet
from tests.fleet.outcome import Outcome
from tests.fleet.strangers import STRANGERS

NAME = "bad-encoders"
WHAT = "an encoder URL that answers 500, never answers, or belongs to a web server; a good encoder replaced by each"
ENCODERS = 2

Stranger = Callable[[int], AbstractContextManager[None]]


def run(fleet: Fleet) -> list[Outcome]:
    group = fleet.servers(ENCODERS)
    outcomes = []
    with _left_out(group, group.encoders[-1]):
        for name, stranger in STRANGERS.items():
            outcomes.append(beside(fleet, group, name, stranger))
    for name, stranger in STRANGERS.items():
        outcomes.append(replaced(fleet, group, name, stranger))
    return outcomes


def beside(fleet: Fleet, group: ServerGroup, name: str, stranger: Stranger) -> Outcome:
    """The stranger is on the list from the beginning."""
    port = free_port()
    with stranger(port), listed(group.language, f"http://127.0.0.1:{port}"):
        fleet.story.event(f"on the list of encoders: {name}")
        with fleet.load(group) as load:
            time.sleep(3 * fleet.options.seconds)
    fleet.story.event(f"off the list: {name}")
    return fleet.outcome(f"{NAME}: on the list, {name}", "1 encoder and the stranger", load.tally())


def replaced(fleet: Fleet, group: ServerGroup, name: str, stranger: Stranger) -> Outcome:
    """The stranger takes the port of an encoder that is killed, and gives it back."""
    victim = group.encoders[-1]
    with fleet.load(group) as load:
        time.sleep(fleet.options.seconds)
        fleet.kill(victim)
        with stranger(victim.port):
            fleet.story.event(f"in place of {victim.name}: {name}")
            time.sleep(2 * fleet.options.seconds)
        fleet.story.event(f"gone: {name}")
        fleet.seconds_until_used(victim, fleet.start(victim), load)
        time.sleep(fleet.options.seconds)
    return fleet.outcome(f"{NAME}: in place of a good one, {name}", f"{ENCODERS} encoders", load.tally())


@contextmanager
def listed(language: Server, url: str) -> Iterator[None]:
    """An encoder URL on the list of a language server."""
    route = f"http://127.0.0.1:{language.bootstrap_port}"
    requests.post(f"{route}/register_encoder_url", json={"url": url}, timeout=10).raise_for_status()
    try:
        yield
    finally:
        requests.delete(f"{route}/unregister_encoder_url", json={"url": url}, timeout=10).raise_for_status()


@contextmanager
def _left_out(group: ServerGroup, encoder: Server) -> Iterator[None]:
    """An encoder off the list of the language server, and on it again."""
    route = f"http://127.0.0.1:{group.language.bootstrap_port}"
    requests.delete(f"{route}/unregister_encoder_url", json={"url": encoder.url}, timeout=10).raise_for_status()
    try:
        yield
    finally:
        requests.post(f"{route}/register_encoder_url", json={"url": encoder.url}, timeout=10).raise_for_status()
