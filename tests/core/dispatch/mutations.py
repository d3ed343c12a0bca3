"""Protections of the dispatcher, each of which can be taken away: the schedules must notice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from sglang_mm_conn.core.dispatch.dispatcher import DispatchCore
from sglang_mm_conn.core.dispatch.fleet import Fleet
from sglang_mm_conn.core.dispatch.placement import Placement
from sglang_mm_conn.core.dispatch.requests import Request
from tests.simulator.mutations import Change, change
from tests.simulator.scheduler import attribute

MUTATIONS: dict[str, Change] = {
    "a part has a limited number of tries": change(
        DispatchCore, "_serve", ("part.taken >= self._tries", "False")
    ),
    "an encoder that failed to encode a part does not get it again": change(
        Placement, "able", ("one.url not in part.excluded and ", "")
    ),
    "the same encoder gets a part again only after a sign of life": change(
        Placement, "able", ("(ended is None or one.heard_at >= ended)", "True")
    ),
    "an answer to a probe from before a loss is no sign of life": change(
        Fleet, "probed", ("if one.probe_at == -math.inf:", "if False:")
    ),
    "tries at an encoder that is down are lost": change(
        DispatchCore, "_settle", ("if change.loses:", "if False:")
    ),
    "a post that was lost is cancelled": change(
        DispatchCore, "_lose_all", ("actions.append(CancelPost(attempt.room))", "pass")
    ),
    "posts of a request that is over are cancelled": change(
        DispatchCore, "_finish", ("actions.append(CancelPost(attempt.room))", "pass")
    ),
    "each try has a room of its own": change(
        DispatchCore, "_serve", ("self._new_room_base()", "request.room_base")
    ),
    "overdue requests are forgotten": change(
        Request, "is_over", ("now > self.deadline + OVERDUE_SECONDS", "False")
    ),
    "nothing is posted after the deadline": change(
        DispatchCore, "_serve", ("now > request.deadline", "False")
    ),
    "an encoder that drains gets no part": change(
        Fleet, "usable", ("one.state is EncoderState.UP", "one.state in (EncoderState.UP, EncoderState.DRAINING)")
    ),
    "an encoder that is down gets no part": change(
        Fleet, "usable", ("one.state is EncoderState.UP", "one.state in (EncoderState.UP, EncoderState.DOWN)")
    ),
    "an encoder that is suspect gets no part": change(
        Fleet, "usable", ("in self.failing if", "in self.encoders.values() if one.state is EncoderState.SUSPECT and")
    ),
    "parts wait for a probe that is under way": change(
        DispatchCore, "_serve", ("if self.fleet.undecided:", "if False:")
    ),
    "a doubt about an encoder that is up is probed before anything is given up": change(
        Fleet, "lost", ("self.probe_now(url)", "pass")
    ),
    "work of a try that is over is no load": change(
        DispatchCore, "_close", ("one.load.remove(part.work)", "pass")
    ),
    "an encoder that is not listed any more keeps its parts": change(
        Fleet, "forget", (" and not one.load.parts", "")
    ),
    "an encoder that is not listed any more gets no part": change(
        Fleet, "usable", (" and one.listed", "")
    ),
    "an encoder that is not listed any more is forgotten when its last part is over": change(
        DispatchCore, "_close", ("self.fleet.forget(attempt.url)", "pass")
    ),
    "each encoder is looked at again before a request is given up": change(
        DispatchCore, "_serve", (" and self.fleet.look_again(part.waits_since)", " and False")
    ),
    "the look at each encoder ends": change(
        DispatchCore, "_serve", ("now < part.waits_since + LOOK_SECONDS", "True")
    ),
    "an encoder that holds parts and delivers nothing loses them": change(
        DispatchCore, "_forget", ("changes += self.fleet.held(attempt.url, began=attempt.began, now=now)", "pass")
    ),
    "an encoder that delivers is not blamed for a part that is given up": change(
        Fleet, "held", ("one.delivered_at >= began or ", "")
    ),
    "a request whose client has gone is posted no more": change(
        DispatchCore, "clients_gone", ("is not None], now)", "is not None and False], now)")
    ),
    "a try that is over is open no more": change(
        DispatchCore, "answered", ("found = self._open.get(room)", "found = self._open.get(room) or next(\n"
                                   "            iter(self._open.values()), None)")
    ),
    "a request that is over waits no more": change(
        DispatchCore, "_finish", ("self._waiting.pop((request.room_base, part.number), None)", "pass")
    ),
    "the scheduler is told every new room": change(
        DispatchCore, "_serve",
        ("[Redispatched(request.room_base, part.number, one.url, room)]", "[]"),
    ),
    "a part that has arrived is done with": change(
        DispatchCore, "_ended", ("part.delivered = True", "self._wait(request, part, now)")
    ),
    "two probes of an encoder are never under way at once": change(
        Fleet, "due_probes", ("not one.probing and ", "")
    ),
    "parts that wait are served when an encoder is up": change(
        DispatchCore, "probed", ("return self._settle(", "return (lambda changes, now: [])(")
    ),
    "a request is forgotten when all of its parts have arrived": change(
        Request, "is_over", ("now > self.delivered_at + DELIVERED_SECONDS", "False")
    ),
    "a request is forgotten only when all of its parts have arrived": change(
        DispatchCore, "_ended", ("if all(other.delivered", "if any(other.delivered")
    ),
    "a request whose parts have arrived is kept for a while": change(
        Request, "is_over", ("now > self.delivered_at + DELIVERED_SECONDS", "True")
    ),
    "a part that was lost after its delivery is tried again": change(
        DispatchCore, "room_failed", (" or self._delivered.get(room)", "")
    ),
    "a request with a part that was lost after its delivery has not arrived": change(
        DispatchCore, "_ended", ("request.delivered_at = None", "pass")
    ),
    "rooms of a request that is over have not arrived": change(
        DispatchCore, "_finish", ("self._delivered.pop(part.tries[-1].room, None)", "pass")
    ),
    "a request whose room was aborted is forgotten": change(
        Request, "is_over", ("now > one.aborted_at + ABORTED_SECONDS", "False")
    ),
    "a request whose room was aborted is kept for a while": change(
        Request, "is_over", ("now > one.aborted_at + ABORTED_SECONDS", "True")
    ),
    "an aborted room whose request waits is tried again": change(
        DispatchCore, "room_failed", ("if end.verdict is Verdict.ABORTED:", "if False:")
    ),
    "a report is no sign of life": change(
        Fleet, "reported_one", ("one.connected_at = now", "one.heard_at = now")
    ),
    "a probe proves life when it was sent, not when it was answered": change(
        Fleet, "probed", ("max(one.heard_at, one.probed_at)", "now")
    ),
    "an encoder that loses one part after the other gets few": change(
        Fleet, "lost", ("one.losses + 1", "one.losses")
    ),
    "an encoder that loses one part after the other is suspect also when it comes back": change(
        Fleet, "_well", ("        if one.failing:\n", "        if False:\n")
    ),
    "a doubted encoder is probed until it answers": change(
        Fleet, "_probe_time", (" or one.doubted", "")
    ),
    "an encoder that does not take a part uses up no try": change(
        DispatchCore, "_ended", ("part.refused.add(attempt.url)", "pass")
    ),
    "two parts with one try left do not share an encoder": change(
        Placement, "choose", ("able = [one for one in able if one.url not in last]", "pass")
    ),
}  # fmt: skip


@contextmanager
def without(protection: str) -> Iterator[None]:
    """The code lacks ``protection`` (a key of MUTATIONS) for a while."""
    with ExitStack() as changed:
        one = MUTATIONS[protection]
        changed.enter_context(attribute(one.owner, one.name, one.function()))
        yield
