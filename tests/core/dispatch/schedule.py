"""Random schedules: a dispatcher's core, a model of its encoders with faults and lies, and what must always hold."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from sglang_mm_conn.core.dispatch.actions import (
    CancelPost,
    DispatchAction,
    Forget,
    GiveUp,
    LogLine,
    Post,
    Probe,
    Redispatched,
)
from sglang_mm_conn.core.dispatch.choice import Item
from sglang_mm_conn.core.dispatch.dispatcher import LOOK_SECONDS, NO_ENCODER, DispatchCore
from sglang_mm_conn.core.dispatch.encoders import FAILURES_IN_A_ROW, FIRST_TRIAL_SECONDS, EncoderStatus
from sglang_mm_conn.core.dispatch.placement import TURN_SECONDS
from sglang_mm_conn.core.dispatch.requests import Part
from sglang_mm_conn.core.dispatch.verdicts import Verdict
from sglang_mm_conn.core.rooms import part_room
from sglang_mm_conn.core.states import EncoderState
from tests.core.dispatch.driver import end_of

URLS = [f"http://encoder-{number}:1" for number in range(4)]
OVERDUE = 5.0
PEER_TIMEOUT = 10.0
KEPT = 2.0  # after all parts have arrived, or one was aborted
LOSSES = (Verdict.LOST, Verdict.REFUSED, Verdict.CUT_OFF, Verdict.DRAINS, Verdict.STRANGER)


@dataclass
class Model:
    """What an encoder really is; ``steady``: it stays well, and says the truth."""

    url: str
    steady: bool = False
    alive: bool = True
    frozen: bool = False
    draining: bool = False
    erring: bool = False
    refusing: bool = False  # at /encode, while probes are answered
    silences: int = 0
    probed_at: float = math.inf  # of the probe that is under way
    looked_at: float = -math.inf  # of the newest probe
    sign_at: float = -math.inf  # of the newest sign of life
    losses: int = 0  # in a row; parts that were at it at the same time are lost once
    lost_at: float = -math.inf  # of the last one that counted
    delivered_at: float = -math.inf
    rests_from: float = -math.inf  # when it had lost several, or got a part as a trial
    trial_of: str = ""  # the request of that part


@dataclass
class Sent:
    """A request as the scheduler sees it."""

    base: str
    deadline: float
    rooms: list[str]  # of its parts
    tries: Counter[int] = field(default_factory=Counter)
    refused: set[tuple[int, str]] = field(default_factory=set)  # part, encoder that did not take it
    erred: dict[int, set[str]] = field(default_factory=dict)  # encoders that failed to encode the part
    lost: dict[tuple[int, str], float] = field(default_factory=dict)  # part, encoder -> when it was lost there
    arrived: dict[int, float] = field(default_factory=dict)  # part -> when
    aborted: dict[str, float] = field(default_factory=dict)  # room -> when its encoder said that it was aborted
    blamed: bool = False  # its input was at fault
    failed: bool = False  # it was given up

    def taken(self, part: int) -> int:
        """Tries of ``part`` but for the first refusal of each encoder."""
        return self.tries[part] - sum(number == part for number, _ in self.refused)


class Schedule:
    """Events drawn by chance from ``seed``; raises AssertionError where a promise is broken."""

    def __init__(self, seed: str, *, steady: bool = False, log: Callable[[str], None] | None = None) -> None:
        """``steady``: the first encoder is always well, and no input is at fault."""
        self.chance = random.Random(seed)
        self.now = 1000.0
        self.steady = steady
        self.log = log
        self.tries = self.chance.choice((1, 2, 3, 3))
        self.wait = self.chance.choice((0.0, 0.0, 3.0))
        self._bases = itertools.count()
        self.core = DispatchCore(tries=self.tries, wait_seconds=self.wait, new_room_base=self.new_base)
        self.statuses: dict[str, EncoderStatus] = {}  # all that the scheduler's side reports
        self.models = {url: Model(url, steady and url == URLS[0]) for url in URLS}
        self.known: list[str] = []
        self.sent: dict[str, Sent] = {}
        self.parts: dict[str, list[Part]] = {}
        self.over: set[str] = set()  # room bases that were forgotten
        self.rooms: dict[str, Post] = {}  # all that were posted
        self.posted_at: dict[str, float] = {}  # by room
        self.running: dict[str, Post] = {}  # posts that are neither answered nor cancelled
        self.waits_since: dict[tuple[str, int], float] = {}  # after the last event; by room base and part
        self.seen: Counter[str] = Counter()

    def new_base(self) -> str:
        return f"base-{next(self._bases)}"

    # -- actions ---------------------------------------------------------------------------------------------------

    def carry_out(self, actions: list[DispatchAction], *, repeated: bool = False) -> None:
        """``repeated``: the event was about a room of a request that is over."""
        told: dict[tuple[str, int], str] = {}
        for action in actions:
            match action:
                case Redispatched(base, part, url, room):
                    assert base not in self.over and base in self.sent, "news of a request that is over"
                    assert url in self.core.fleet.encoders
                    told[base, part] = room
                    self.sent[base].rooms[part] = room
                case Post():
                    self.posted(action, told)
                case CancelPost(room):
                    assert room in self.rooms, "a post is cancelled that was never made"
                    self.running.pop(room, None)
                case Probe(url):
                    assert self.models[url].probed_at == math.inf, "two probes at once"
                    self.models[url].probed_at = self.models[url].looked_at = self.now
                case GiveUp(base, code, reason):
                    assert reason and 400 <= code < 600
                    assert repeated or base not in self.over, "given up twice"
                    if not repeated:
                        self.given_up(self.sent[base], reason)
                case Forget(base):
                    assert base not in self.over, "forgotten twice"
                    sent = self.sent[base]
                    assert sent.blamed or sent.failed or self.may_be_over(sent), "forgotten, although it goes on"
                    self.over.add(base)
                case LogLine(level, text):
                    assert level in (20, 30) and text
        self.check()

    def posted(self, post: Post, told: dict[tuple[str, int], str]) -> None:
        sent = self.sent[post.room_base]
        assert post.room_base not in self.over, "a post after its request was forgotten"
        assert post.room not in self.rooms, "a room is used twice"
        assert post.room == sent.rooms[post.part], "a room that the scheduler does not expect"
        assert told.get((post.room_base, post.part), post.room) == post.room
        self.rooms[post.room] = self.running[post.room] = post
        self.posted_at[post.room] = self.now
        sent.tries[post.part] += 1
        assert sent.taken(post.part) <= self.tries, "too many tries"
        assert sent.tries[post.part] <= self.tries + len(URLS), "a part is tried without end"
        assert self.now <= sent.deadline, "a post after the deadline"
        one = self.core.fleet.encoders[post.url]
        assert one.state is EncoderState.UP or one.failing, f"a post to an encoder that is {one.state.value}"
        assert post.url in self.known, "a post to an encoder that is not listed any more"
        assert post.url not in sent.erred.get(post.part, ()), "a post to an encoder that failed to encode this part"
        lost_at = sent.lost.get((post.part, post.url))
        assert lost_at is None or self.models[post.url].sign_at >= lost_at, "a post without a sign of life"
        self.check_trial(post, sent)
        self.seen["posts again" if sent.tries[post.part] > 1 else "posts"] += 1

    def check_trial(self, post: Post, sent: Sent) -> None:
        """An encoder that loses one part after the other gets none for a while, if another can have it."""
        model, mine = self.models[post.url], {one.url for one in self.rooms.values() if one.part == post.part
                                              and one.room_base == post.room_base}  # fmt: skip
        others = [one for one in self.core.fleet.encoders.values() if one.state is EncoderState.UP and one.listed]
        again = model.trial_of == sent.base  # several parts of one request are one trial
        if model.losses >= FAILURES_IN_A_ROW and not again and any(one.url not in mine for one in others):
            assert self.now >= model.rests_from + FIRST_TRIAL_SECONDS, "a part for an encoder that loses every part"
        if model.losses >= FAILURES_IN_A_ROW:
            model.rests_from, model.trial_of = self.now, sent.base

    def may_be_over(self, sent: Sent) -> bool:
        """Whether nobody waits for the request any more, as far as a dispatcher can know."""
        if self.now > sent.deadline + OVERDUE:
            return True
        if len(sent.arrived) == len(self.parts[sent.base]):
            return self.now > max(sent.arrived.values()) + KEPT
        return any(self.now > sent.aborted.get(room, math.inf) + KEPT for room in sent.rooms)

    def given_up(self, sent: Sent, reason: str) -> None:
        self.seen["given up"] += 1
        sent.failed = True
        if reason == NO_ENCODER:
            since = min((at for (base, _), at in self.waits_since.items() if base == sent.base), default=self.now)
            looked = all(
                self.models[url].looked_at >= since and self.models[url].probed_at == math.inf for url in self.known
            )
            assert looked or self.now >= since + LOOK_SECONDS, "given up though an encoder may be back"
        used_up = any(sent.taken(part) >= self.tries for part in sent.tries)
        assert not self.steady or sent.blamed or used_up, "given up although an encoder was well all the time"

    # -- what must always hold -------------------------------------------------------------------------------------

    def check(self) -> None:
        core = self.core
        for url in self.models.keys() - core.fleet.encoders.keys():  # nothing is known of it
            model = self.models[url]
            model.probed_at, model.losses, model.lost_at = math.inf, 0, -math.inf
            model.delivered_at = -math.inf
        assert set(self.sent) - self.over == set(core.requests), "a request is forgotten, or not forgotten"
        at: dict[str, tuple[int, float]] = {}
        open_rooms, arrived = set(), set()
        waiting: list[Part] = []
        for base, request in core.requests.items():
            assert (request.delivered_at is not None) == all(part.delivered for part in request.parts)
            for part in request.parts:
                attempt = part.current
                waits = (base, part.number) in core._waiting
                assert (attempt is not None) + waits + part.delivered == 1, "a part is nowhere, or at two places"
                assert waits == (part.waits_since is not None)
                if attempt is None:
                    self.sent[base].aborted.pop(self.sent[base].rooms[part.number], None)  # it was lost, too
                if attempt is not None:
                    open_rooms.add(attempt.room)
                    assert attempt.room == self.sent[base].rooms[part.number]
                    count, work = at.get(attempt.url, (0, 0.0))
                    at[attempt.url] = count + 1, work + part.work
                elif part.delivered:
                    arrived.add(part.tries[-1].room)
                elif waits and self.now <= request.deadline:
                    waiting.append(part)
        self.waits_since = {key: part.waits_since for key, (_, part) in core._waiting.items()}  # type: ignore[misc]
        assert open_rooms == set(core._open) and arrived == set(core._delivered)
        self.check_waiting(waiting)
        assert set(self.running) <= open_rooms, "nobody cancelled a post whose answer nobody waits for"
        assert all(key[0] in core.requests for key in core._waiting)
        for url, one in core.fleet.encoders.items():
            assert url in self.known or one.load.parts, "an encoder without a part is kept, though it is not listed"
            count, work = at.get(url, (0, 0.0))
            assert one.load.parts == count and abs(one.load.work - work) < 1e-6, "the load is not that of the tries"
            assert not (count and one.state is EncoderState.DOWN), "a part stays with an encoder that is down"
            assert one.losses <= self.models[url].losses, "an encoder is blamed for a loss that there was not"
            trusted = self.models[url].losses < FAILURES_IN_A_ROW
            assert one.state is not EncoderState.UP or trusted, "an encoder that loses every part is up"

    def check_waiting(self, waiting: list[Part]) -> None:
        """A part waits only if no other encoder is up. Two parts with one chance left share one only after a while."""
        careful: dict[str, list[Part]] = {}
        for request in self.core.requests.values():
            for one in request.parts:
                if one.current is not None and one.current.last_chance and one.taken > 1:
                    careful.setdefault(one.current.url, []).append(one)
        for sharing in careful.values():
            for later in sorted(sharing, key=lambda part: part.tries[-1].began)[1:]:
                ended = later.tries[-2].ended
                assert ended is not None and later.tries[-1].began >= ended + TURN_SECONDS, (
                    "two parts with one chance left share an encoder"
                )
        for part in waiting:
            not_for_it = {one.url for one in part.tries}
            left = set(self.known) - part.excluded
            if part.taken and (part.taken == self.tries - 1 or (part.excluded and len(left) <= 1)):
                not_for_it.update(careful)
            up = {one.url for one in self.core.fleet.encoders.values() if one.state is EncoderState.UP and one.listed}
            assert up <= not_for_it, "a part waits although an encoder is up"

    # -- events ----------------------------------------------------------------------------------------------------

    def request(self) -> None:
        if len(self.core.requests) >= 5:
            return
        items = [
            Item(modality, self.chance.choice((0.1, 1.0, 3.0)), self.chance.choice(("", "x", "y")))
            for modality in self.chance.choice((["IMAGE"], ["IMAGE", "AUDIO"]))
            for _ in range(self.chance.choice((1, 1, 2, 4)))
        ]
        base = self.new_base()
        deadline = self.now + self.chance.choice((4.0, 30.0, 60.0))
        # The scheduler learns of it before any news.
        self.sent[base] = Sent(base, deadline, [part_room(base, part) for part in range(len(items))])
        placed, actions = self.core.dispatch(f"rid of {base}", base, items, deadline, self.now)
        assert [part.number for _, part in placed] == [*range(len(placed))]
        assert sum(part.count for _, part in placed) == len(items)
        assert all(part.of == len(placed) for _, part in placed)
        self.note(f"request {base} of {len(placed)} parts")
        self.parts[base] = [part for _, part in placed]
        self.carry_out(actions)

    def verdict(self, model: Model, sent: Sent) -> Verdict:
        chance = self.chance.random()
        if model.steady:
            return Verdict.LOST if chance < 0.1 else Verdict.DELIVERED
        if chance < 0.05:
            return self.chance.choice(LOSSES)
        if chance < 0.1 and not self.steady:
            return self.chance.choice((Verdict.INPUT, Verdict.ABORTED))
        if not model.alive:
            return self.chance.choice((Verdict.REFUSED, Verdict.CUT_OFF))
        if model.refusing:
            return self.chance.choice((Verdict.REFUSED, Verdict.STRANGER))
        if model.erring:
            return Verdict.ERROR
        if model.draining and chance < 0.4:
            return Verdict.DRAINS
        return Verdict.DELIVERED

    def answer(self) -> None:
        """An encoder answers a post, or it breaks; sometimes that is said twice."""
        able = [room for room, post in self.running.items() if not self.models[post.url].frozen]
        if not able:
            return
        room = self.chance.choice(able)
        post = self.running.pop(room)
        sent = self.sent[post.room_base]
        verdict = self.verdict(self.models[post.url], sent)
        self.ends(room, verdict)
        self.carry_out(self.core.answered(room, end_of(verdict), self.now))
        if self.chance.random() < 0.2:
            self.again(room)

    def ends(self, room: str, verdict: Verdict) -> None:
        """Note what ``verdict`` on the try ``room`` means, which is under way or seemed to have arrived."""
        post = self.rooms[room]
        sent, model = self.sent[post.room_base], self.models[post.url]
        self.note(f"{room} at {post.url}: {verdict.value}")
        self.seen[verdict.value] += 1
        if sent.arrived.pop(post.part, None) is not None:
            self.seen["lost after delivery"] += 1
        if verdict in LOSSES:
            sent.lost[post.part, post.url] = self.now
            if verdict is not Verdict.DRAINS and post.url in self.core.fleet.encoders:
                self.loses(model, self.posted_at[room])
            if verdict in (Verdict.REFUSED, Verdict.DRAINS) and self.tries > 1:
                sent.refused.add((post.part, post.url))
        elif verdict is Verdict.ERROR:
            sent.erred.setdefault(post.part, set()).add(post.url)
            sent.lost[post.part, post.url] = self.now
        if verdict in (Verdict.DELIVERED, Verdict.ERROR):
            model.sign_at = self.now
        if verdict is Verdict.DELIVERED:
            model.losses, model.delivered_at = 0, self.now
            sent.arrived[post.part] = self.now
        elif verdict is Verdict.INPUT:
            sent.blamed = True
        elif verdict is Verdict.ABORTED:
            sent.aborted[room] = self.now

    def loses(self, model: Model, posted_at: float) -> None:
        if posted_at < model.lost_at:
            return
        model.losses, model.lost_at = model.losses + 1, self.now
        if model.losses == FAILURES_IN_A_ROW:
            model.rests_from, model.trial_of = self.now, ""
            self.seen["loses every part"] += 1

    def gives_up(self, base: str) -> None:
        """Nobody waits for ``base`` any more: encoders that hold parts of it and deliver nothing are blamed."""
        for room in self.sent[base].rooms:
            if room not in self.core._open or room in self.sent[base].aborted:
                continue
            model, posted_at = self.models[self.rooms[room].url], self.posted_at[room]
            if model.delivered_at < posted_at and self.now >= posted_at + PEER_TIMEOUT:
                self.seen["held, and nothing delivered"] += 1
                self.loses(model, posted_at)

    def client_goes(self) -> None:
        """The client of a request has gone."""
        if self.core.requests:
            base = self.chance.choice(list(self.core.requests))
            self.note(f"the client of {base} has gone")
            self.sent[base].failed = True
            self.seen["client gone"] += 1
            self.gives_up(base)
            self.carry_out(self.core.clients_gone([base, "another"], self.now))
            assert base in self.over

    def again(self, room: str) -> None:
        """A late or second answer about ``room``."""
        if room in self.core._open:
            return
        end = end_of(self.chance.choice(list(Verdict)))
        self.note(f"late: {room}: {end.verdict.value}")
        assert self.core.answered(room, end, self.now) == [], "a late answer changed something"
        self.check()

    def late(self) -> None:
        if self.rooms:
            self.again(self.chance.choice(list(self.rooms)))

    def room_fails(self) -> None:
        """The scheduler reports a room, perhaps twice, perhaps an old one."""
        if not self.rooms:
            return
        core = self.core
        asked = [*core._open, *core._delivered, *self.running]
        if self.chance.random() < 0.3:
            asked = list(self.rooms)
        room = self.chance.choice(asked or list(self.rooms))
        code = self.chance.choice((502, 504, 404, 410, 499, 500) if self.steady else (502, 504, 404, 500, 413, 499))
        post = self.rooms[room]
        if self.steady and self.models[post.url].steady:
            code = 502
        for _ in range(self.chance.choice((1, 2))):
            repeated = post.room_base in self.over
            if room in core._open or room in core._delivered:
                self.seen["aborted, and waits"] += code == 499
                self.ends(room, {500: Verdict.ERROR, 413: Verdict.INPUT}.get(code, Verdict.LOST))
            self.carry_out(core.room_failed(room, code, "the room failed", self.now), repeated=repeated)
            assert room not in core._open and room not in core._delivered, "nothing is decided about a failed room"

    def probe_ends(self) -> None:
        probed = [one for one in self.models.values() if one.probed_at < math.inf]
        if not probed:
            return
        model = self.chance.choice(probed)
        began, model.probed_at = model.probed_at, math.inf
        if not model.steady and not model.alive:
            self.note(f"{model.url} refuses a probe")
            self.carry_out(self.core.probe_failed(model.url, "refused", silent=False, now=self.now))
        elif not model.steady and (model.frozen or self.chance.random() < 0.1):
            self.note(f"{model.url} is silent")
            self.carry_out(self.core.probe_failed(model.url, "timed out", silent=True, now=self.now))
        else:
            self.note(f"{model.url} answers a probe")
            model.sign_at = max(model.sign_at, began)  # the probe that a loss causes begins in the same event
            cache = self.chance.random() < 0.3
            self.carry_out(
                self.core.probed(model.url, draining=model.draining, prefix_cache=cache, now=self.now)
            )  # fmt: skip

    def status(self) -> None:
        """The scheduler's side reports an encoder, perhaps wrongly."""
        model = self.chance.choice(list(self.models.values()))
        connected, refusal = model.alive, ""
        if not model.steady and self.chance.random() < 0.3:
            connected = self.chance.random() < 0.5
            model.silences += self.chance.random() < 0.3
            refusal = self.chance.choice(("", "", "another model"))
        load = self.chance.choice((0, 5))
        self.note(f"{model.url} status: connected {connected}, silences {model.silences}, refusal {refusal!r}")
        status = EncoderStatus(model.url, connected, model.silences, refusal, model.draining, load)
        self.statuses[model.url] = status
        self.carry_out(self.core.encoders_reported([*self.statuses.values()], self.now))

    def fault(self) -> None:
        """An encoder changes; whoever watches it learns that later."""
        model = self.chance.choice([one for one in self.models.values() if not one.steady])
        name = self.chance.choice(("alive", "frozen", "draining", "erring", "refusing"))
        setattr(model, name, not getattr(model, name))
        self.note(f"{model.url}: {name} = {getattr(model, name)}")
        self.seen[name] += 1

    def know(self) -> None:
        self.known = [url for url in URLS if self.models[url].steady or self.chance.random() < 0.8]
        self.note(f"known: {self.known}")
        self.carry_out(self.core.know(self.known, self.now))

    def tick(self) -> None:
        self.note("tick")
        for base in self.core.requests:
            if self.may_be_over(self.sent[base]):
                self.gives_up(base)
        self.carry_out(self.core.tick(self.now))
        assert not [base for base in self.core.requests if self.may_be_over(self.sent[base])], "an overdue request"
        for request, part in self.core._waiting.values():
            assert part.waits_since is not None
            hopeless = not self.core.fleet.undecided and not self.core._placement.able(part, self.now)
            waited = self.now - part.waits_since - self.wait
            assert not hopeless or waited < LOOK_SECONDS or self.now > request.deadline, "a part waits for nothing"
        for one in self.core.fleet.encoders.values():
            assert one.probing or one.probe_at > self.now or not one.doubted, "a doubted encoder is not probed"

    # -- a whole schedule ------------------------------------------------------------------------------------------

    def note(self, text: str) -> None:
        if self.log is not None:
            self.log(f"{self.now:9.3f}  {text}")

    def run(self, steps: int = 60) -> None:
        self.know()
        if self.chance.random() < 0.35:
            self.models[URLS[-1]].refusing = True
        if self.chance.random() < 0.8:  # most begin with encoders that are up
            while any(one.probed_at < math.inf for one in self.models.values()):
                self.step(self.probe_ends)
        events = [
            *[self.request] * 4, *[self.answer] * 5, *[self.probe_ends] * 4, *[self.status] * 2,
            *[self.tick] * 2, self.late, self.room_fails, self.fault, self.fault, self.client_goes, self.know,
        ]  # fmt: skip
        weights = [1.0] * (len(events) - 2) + [0.3, 0.3]
        for event in self.chance.choices(events, weights, k=steps):
            self.step(event)
            self.core.report(self.now)
        self.end()

    def step(self, event: Callable[[], None]) -> None:
        self.now += self.chance.choice((1e-6, 1e-6, 0.01, 0.1, 0.1, 1.0, 3.0))
        event()

    def end(self) -> None:
        """Nothing more happens but time: every request ends."""
        for _ in range(30):
            self.now += 3.0
            self.tick()
        assert not self.core.requests and not self.core._open and not self.core._waiting and not self.running
        assert set(self.sent) == self.over


def play(seed: str, *, steady: bool) -> tuple[Counter[str], str]:
    """One schedule: what happened, and how it broke a promise (empty: it did not)."""
    schedule = Schedule(seed, steady=steady)
    try:
        schedule.run()
    except Exception as error:
        return schedule.seen, f"{type(error).__name__}: {error}"
    return schedule.seen, ""
