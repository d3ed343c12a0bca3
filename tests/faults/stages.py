"""How far a room has come when the fault strikes: how to get it there, and what still has to be done to it then."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

from sglang_mm_conn.core.states import Poll
from tests.connector.payload import Part
from tests.connector.processes import Child, Encoder, Language, wait_for
from tests.faults.processes import FIRST_OFFER, Ground
from tests.faults.traffic import Route


@dataclass(frozen=True)
class Rest:
    """What one process has yet to do for the room. ``successor``: one that is started in its place does it too."""

    role: str
    do: Callable[[Child], object]
    successor: bool = False


Reach = Callable[[Ground, Part, list[Route]], list[Rest]]


@dataclass(frozen=True)
class Step:
    """``reach`` brings a room that the language process expects to this step and returns the rest."""

    name: str
    tokens: int
    reach: Reach


def _offer(part: Part) -> Callable[[Child], object]:
    def do(encoder: Child) -> None:
        assert isinstance(encoder, Encoder)
        encoder.offer(part)

    return do


def _before_announce(ground: Ground, part: Part, routes: list[Route]) -> list[Rest]:
    return [Rest("encoder", _offer(part), successor=True)]


def _waiting(ground: Ground, part: Part, routes: list[Route]) -> list[Rest]:
    """Somebody else has all blocks, so the room gets none and Init is not sent; they are given back after the fault."""
    language = ground.language
    with ExitStack() as stack:
        for route in routes:
            if route.language is language:
                stack.enter_context(route.paused())
        taken = language.call("take_blocks", count=language.stats()["free"])
        ground.encoder.offer(part)
        wait_for(lambda: language.poll(part) is Poll.WaitingForInput, "the room waits for blocks")

    def give_back(child: Child) -> None:
        assert isinstance(child, Language)
        child.call("give_blocks", blocks=taken)

    return [Rest("language", give_back)]


def _held(window: int, action: str) -> Reach:
    def reach(ground: Ground, part: Part, routes: list[Route]) -> list[Rest]:
        ground.encoder.hold(part, window, action=action)
        ground.encoder.offer(part)
        ground.encoder.wait_held(part, window)
        return [Rest("encoder", lambda child: child.call("release", room=part.room, window=window))]

    return reach


def _complete(ground: Ground, part: Part, routes: list[Route]) -> list[Rest]:
    ground.encoder.offer(part)
    wait_for(lambda: ground.language.poll(part) is Poll.Success, "the room arrives")
    ground.encoder.wait_ended(part)
    return []


STEPS = (
    Step("before the announcement", FIRST_OFFER, _before_announce),
    Step("announced, waits for blocks", FIRST_OFFER, _waiting),
    Step("second window half written", 4 * FIRST_OFFER, _held(1, "hold")),
    Step("all written, not yet said", FIRST_OFFER, _held(0, "hold_written")),
    Step("complete, not yet taken", 2 * FIRST_OFFER, _complete),
)
