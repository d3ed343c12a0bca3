"""Owns all-killed: every encoder is killed, and one of them comes back, while clients ask."""

from __future__ import annotations

import time

from sglang_mm_conn.demo.servers import Server, ServerGroup
from tests.fleet.fleet import USED_AGAIN_SECONDS, Fleet
from tests.fleet.load import Load
from tests.fleet.outcome import Goal, Outcome, at_most, no_wrong_answer
from tests.fleet.tally import Tally

NAME = "all-killed"
WHAT = "SIGKILL of every encoder: images get 503 at once, texts their answer; then one encoder returns"
ENCODERS = 2
# Until the language server knows that all are dead: those that were on their way may end otherwise.
FIRST_MOMENTS = 2.0
REFUSED_SECONDS = 1.0
UNAVAILABLE = 503


def run(fleet: Fleet) -> list[Outcome]:
    group = fleet.servers(ENCODERS)
    with fleet.load(group) as load:
        time.sleep(fleet.options.seconds)
        before = load.tally()
        fleet.story.say(f"undisturbed: {before}")
        outage = Outage(fleet, group, group.encoders[0], load)
        time.sleep(fleet.options.seconds)
        for encoder in group.encoders[1:]:
            fleet.start(encoder)
    during = load.tally(since=outage.began, until=outage.ready_at, images=False)
    alone = Tally.of(before.replies, images=False)
    texts = f"texts: slowest {during.slowest:.2f} s, before {alone.slowest:.2f} s"
    return [outage.outcome(NAME, f"{ENCODERS} encoders", load, [texts])]


class Outage:
    """From the death of every encoder to the readiness of one, and 5 s more.

    Attributes:
        began: the moment at which the last one was killed.
        ready_at: the moment at which one was ready again.
    """

    def __init__(self, fleet: Fleet, group: ServerGroup, returns: Server, load: Load) -> None:
        self._fleet = fleet
        self.began = fleet.kill(*(encoder for encoder in group.encoders if encoder.alive))
        time.sleep(FIRST_MOMENTS + fleet.options.seconds)
        fleet.story.say(f"without any encoder: {load.tally(since=self.began)}")
        self.ready_at = fleet.start(returns)
        self.used_after = fleet.seconds_until_used(returns, self.ready_at, load)

    def outcome(self, name: str, servers: str, load: Load, figures: list[str]) -> Outcome:
        """Failures of images are expected: of one kind, for as long as there is no encoder."""
        everything = load.tally()
        refusals = load.tally(since=self.began + FIRST_MOMENTS, until=self.ready_at, images=True)
        texts = Tally.of(everything.replies, images=False)
        images = Tally.of(everything.replies, images=True)
        outside = Tally.of(images.replies, until=self.began - FIRST_MOMENTS) + Tally.of(
            images.replies, since=self.ready_at + USED_AGAIN_SECONDS
        )
        others = [reply for reply in refusals.replies if reply.failed and reply.status != UNAVAILABLE]
        count = sum(reply.status == UNAVAILABLE for reply in refusals.replies)
        slowest = max((reply.seconds for reply in refusals.failed), default=0.0)
        goals = [
            Goal(f"{count} images refused with {UNAVAILABLE}", "some", count > 0),
            Goal(f"{len(others)} refused otherwise ({refusals.failed_text()} in all)", "0", not others),
            at_most("slowest refusal", slowest, REFUSED_SECONDS),
            Goal(f"texts: {texts.failed_text()} failed", "0", not texts.failed),
            Goal(
                f"images asked before, and from {USED_AGAIN_SECONDS:g} s after one is ready: {outside.failed_text()} "
                f"failed of {outside.requests}",
                "0",
                not outside.failed and outside.requests > 0,
            ),
            at_most("used again after", self.used_after, USED_AGAIN_SECONDS),
            no_wrong_answer(everything),
        ]
        meanwhile = sum(reply.right for reply in refusals.replies)
        if meanwhile:  # an encoder is of use a moment before /health says so
            figures = [*figures, f"{meanwhile} images answered before one was ready"]
        made = self._fleet.judged(name, servers, everything, goals, figures)
        # Those of the first moments may end otherwise: an encoder that died had them.
        first = self.began + FIRST_MOMENTS
        meanwhile_failed = Tally.of(
            images.failed, since=self.began - FIRST_MOMENTS, until=self.ready_at + USED_AGAIN_SECONDS
        )
        made.expected = sum(one.status == UNAVAILABLE or one.began < first for one in meanwhile_failed.replies)
        return made
