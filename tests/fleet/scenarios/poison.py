"""Owns poison: an image that kills every encoder that loads it, among healthy traffic; a supervisor restarts the dead.

The image is an ordinary one of an unusual size. The encoders are told to die of it by CPU_BED_POISON (ci/cpu_bed).
"""

from __future__ import annotations

import threading
import time

from sglang_mm_conn.demo.images import Image
from sglang_mm_conn.demo.questions import Question
from sglang_mm_conn.demo.servers import ServerGroup
from tests.fleet.fleet import Fleet
from tests.fleet.load import put
from tests.fleet.outcome import Goal, Outcome
from tests.fleet.tally import Reply, kind_of
from tests.servers.observe import Holdings

NAME = "poison"
WHAT = "an image that kills whatever encodes it, among healthy traffic, with four encoders under a supervisor"
ENCODERS = 4
TRIES = 3  # SGLANG_MM_CONN_DISPATCH_TRIES: so many encoders may die of one request
WIDTH, HEIGHT = 61, 67
POISON = Image(seed=99, width=WIDTH, height=HEIGHT)
REQUESTS = (
    Question("poison alone", "what is this?", (POISON,), max_tokens=4),
    Question("poison among others", "what are these?", (Image(98, 112, 84), POISON, Image(97, 112, 84)), max_tokens=4),
)
SAYS_SO = ("encoder", "tries", "tried", "attempt")


def run(fleet: Fleet) -> list[Outcome]:
    group = fleet.servers(ENCODERS, env={"CPU_BED_POISON": f"{WIDTH}x{HEIGHT}"})
    rss = [f"{server.name} {Holdings.of(server).rss_mb} MiB" for server in group.servers]
    fleet.story.say(f"resident: {', '.join(rss)}")
    goals, figures = [], []
    supervisor = Supervisor(fleet, group)
    with fleet.load(group) as load, supervisor:
        time.sleep(fleet.options.seconds)
        fleet.story.say(f"undisturbed: {load.tally()}")
        for question in REQUESTS:
            died_before = supervisor.deaths
            fleet.story.event(f"asked: {question.name}")
            reply = put(group.language.url, question, fleet.right)
            fleet.story.event(f"answered: {question.name}")
            fleet.story.say(f"HTTP {reply.status} {reply.error[:300]}")
            time.sleep(fleet.options.seconds)  # nobody dies of it later
            died = supervisor.deaths - died_before
            goals += [
                Goal(f"{died} encoders died of {question.name!r}", f"1 to {TRIES}", 1 <= died <= TRIES),
                refused(reply),
            ]
            figures.append(f"{question.name!r} got HTTP {reply.status} after {reply.seconds:.1f} s")
            supervisor.wait_all_ready()
            fleet.story.say(str(load.tally()))
        time.sleep(fleet.options.seconds)
    return [fleet.outcome(NAME, f"{ENCODERS} encoders", load.tally(), goals, figures)]


def refused(reply: Reply) -> Goal:
    """The request that kills gets an error that speaks of it."""
    says_so = any(word in reply.error.lower() for word in SAYS_SO)
    seen = f"{reply.question!r} got HTTP {reply.status} {kind_of(reply.error)[:160]!r}"
    return Goal(seen, "an error that says what happened", reply.status >= 400 and says_so)


class Supervisor:
    """A thread that starts encoders again that have ended. As a context manager; it must be left with all alive.

    Attributes:
        deaths: so many had ended.
    """

    def __init__(self, fleet: Fleet, group: ServerGroup) -> None:
        self.deaths = 0
        self._fleet, self._group = fleet, group
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="supervisor", daemon=True)

    def __enter__(self) -> Supervisor:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def wait_all_ready(self) -> None:
        time.sleep(1)  # the dead are started
        for encoder in self._group.encoders:
            if not encoder.ready():
                self._fleet.wait_ready(encoder)

    def _watch(self) -> None:
        while not self._stop.wait(0.1):
            for encoder in self._group.encoders:
                if not encoder.alive:
                    self.deaths += 1
                    self._fleet.story.event(f"{encoder.name} has died; it is started again")
                    encoder.stop()
                    encoder.start()
