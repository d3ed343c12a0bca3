"""Owns the servers of a run: groups that scenarios share, the right answers, and what is done to a server."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sglang_mm_conn.demo.chat import Answer
from sglang_mm_conn.demo.questions import Question
from sglang_mm_conn.demo.servers import READY_TIMEOUT, Server, ServerGroup
from tests.fleet.load import CLIENTS, Load, questions
from tests.fleet.outcome import Goal, Outcome, no_failure, no_wrong_answer
from tests.fleet.tally import Event, Tally, troubles
from tests.servers.observe import encodes_begun

PEER_TIMEOUT = 10.0
USED_AGAIN_SECONDS = 5.0  # from readiness to the first request
END_SECONDS = 120.0  # an encoder that drains ends within this
# An idle scheduler spins otherwise, and takes a core from the encoders.
LANGUAGE_FLAGS = ("--sleep-on-idle",)
ENV = {
    "CPU_BED_FORBID_BUILTIN_TRANSPORT": "1",
    "SGLANG_MM_CONN_CHECKSUM": "1",
    "SGLANG_MM_CONN_PEER_TIMEOUT_SECONDS": f"{PEER_TIMEOUT:g}",
}


class FleetError(RuntimeError):
    """A run cannot go on."""


@dataclass(frozen=True)
class Options:
    """What the command line says.

    Attributes:
        data_path: shm or mooncake.
        requests: of rolling-restart at least, and of turns.
        seconds: of load before and after what is done to a server.
        frozen: seconds that an encoder is frozen.
        baseline: an older checkout to compare with.
    """

    data_path: str = "shm"
    requests: int = 1000
    seconds: float = 10.0
    frozen: float = 30.0
    baseline: Path | None = None


@dataclass
class Story:
    """What happened, in order: each line is printed, and those that may explain a failure are kept."""

    show: Callable[[str], None]
    events: list[Event] = field(default_factory=list)

    def say(self, text: str) -> None:
        self.show(text)

    def event(self, text: str) -> float:
        """Returns the moment."""
        now = time.monotonic()
        self.events.append(Event(now, text))
        self.show(text)
        return now


@dataclass
class Fleet:
    """What a scenario has to work with.

    Attributes:
        group: options of ServerGroup -> a running group, the same one while the same options are asked for.
        reset: stops the groups that run, and the colocated server.
        right: what a colocated server of the same model answers.
        options: of the run.
        story: of the run.
        directory: for logs.
        model: of all servers.
    """

    group: Callable[..., ServerGroup]
    reset: Callable[[], None]
    right: Callable[[Question], Answer]
    options: Options
    story: Story
    directory: Path
    model: Path
    asked: tuple[Question, ...] = field(default_factory=questions)

    @property
    def env(self) -> dict[str, str]:
        return {**ENV, "SGLANG_MM_CONN_DATA_PATH": self.options.data_path}

    def servers(
        self,
        encoders: int,
        languages: int = 1,
        env: dict[str, str] | None = None,
        encoder_flags: Sequence[str] = (),
        language_flags: Sequence[str] = (),
    ) -> ServerGroup:
        """A running group, once it is known what is right. The caller leaves all of its servers as they were."""
        names = f"{encoders} encoders and {languages} language server{'s' if languages > 1 else ''}"
        self.learn(self.asked)
        self.story.say(f"{names}: starting, unless they run")
        options: dict[str, Any] = {"encoder_flags": tuple(encoder_flags)} if encoder_flags else {}
        group = self.group(
            encoders=encoders, languages=languages, env={**self.env, **(env or {})},
            language_flags=(*LANGUAGE_FLAGS, *language_flags), **options,
        )  # fmt: skip
        self.story.event(f"{names} are ready")
        return group

    def load(self, group: ServerGroup, asked: Sequence[Question] | None = None, clients: int = CLIENTS) -> Load:
        """Every question is answered by a colocated server first, so that clients need not wait for it."""
        asked = self.asked if asked is None else asked
        self.learn(asked)
        return Load([server.url for server in group.languages], asked, self.right, clients=clients)

    def learn(self, asked: Sequence[Question]) -> None:
        for question in asked:
            self.right(question)

    # -- what is done to a server ------------------------------------------------------------------------------------

    def kill(self, *servers: Server) -> float:
        """SIGKILL to all their processes. Returns the moment."""
        for server in servers:
            server.signal(signal.SIGKILL)
        moment = self.story.event(f"{' and '.join(server.name for server in servers)} killed")
        for server in servers:
            server.stop()  # its guard has ended, too
        return moment

    def terminate(self, server: Server) -> tuple[float, bool]:
        """SIGTERM to its main process alone, as an orchestrator sends it. Returns (seconds until it had ended, whether
        it ended by itself)."""
        os.kill(server.pid, signal.SIGTERM)
        began = self.story.event(f"{server.name} gets SIGTERM")
        while server.alive and time.monotonic() - began < END_SECONDS:
            time.sleep(0.05)
        took, by_itself = time.monotonic() - began, not server.alive
        server.stop()
        how = "has ended" if by_itself else f"had not ended after {END_SECONDS:.0f} s, and was killed"
        self.story.event(f"{server.name} {how}" + (f" after {took:.1f} s" if by_itself else ""))
        return took, by_itself

    def start(self, server: Server) -> float:
        """Starts it again, on its port. Returns the moment at which it was ready."""
        server.start()
        self.story.event(f"{server.name} starts again")
        return self.wait_ready(server)

    def wait_ready(self, server: Server) -> float:
        """The moment of the first healthy answer."""
        deadline = time.monotonic() + READY_TIMEOUT
        while not server.ready():
            server.check_alive()
            if time.monotonic() > deadline:
                raise server.not_ready(READY_TIMEOUT)
            time.sleep(0.05)
        return self.story.event(f"{server.name} is ready after {server.seconds_since_start():.0f} s")

    def seconds_until_used(
        self, server: Server, ready_at: float, load: Load, *, before: int = 0, most: float = 60.0
    ) -> float:
        """From ``ready_at`` to the first request that ``server`` encodes beyond ``before`` of this life; ``most`` where
        there was none."""
        while encodes_begun(server) <= before:
            if time.monotonic() - ready_at > most:
                self.story.event(f"{server.name} got no request within {most:.0f} s")
                return most
            time.sleep(0.02)
        took = time.monotonic() - ready_at
        self.story.say(f"{server.name} has work again after {took:.1f} s; {load.tally()}")
        return took

    # -- how it ends -------------------------------------------------------------------------------------------------

    def outcome(
        self, scenario: str, servers: str, tally: Tally, goals: Sequence[Goal] = (), figures: Sequence[str] = ()
    ) -> Outcome:
        """With the two goals of nearly every scenario: nobody failed, nobody was told a wrong answer."""
        return self.judged(scenario, servers, tally, [no_failure(tally), no_wrong_answer(tally), *goals], figures)

    def judged(
        self, scenario: str, servers: str, tally: Tally, goals: Sequence[Goal], figures: Sequence[str] = ()
    ) -> Outcome:
        found = troubles(tally.replies, self.story.events)
        made = Outcome(scenario, servers, tally, list(goals), list(figures), found)
        self.story.say(f"{scenario}: {made.verdict}: {tally}")
        for line in [*found, *(f"missed: {goal}" for goal in made.missed), *made.figures]:
            self.story.say(f"    {line}")
        return made
