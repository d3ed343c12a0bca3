"""One fault at one step: inject it, and see that the room ends in right bytes or a clear error, in time."""

from __future__ import annotations

import random
import re
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from sglang_mm_conn.core.states import Poll
from tests.connector.payload import Part
from tests.connector.processes import Child, Encoder, Language
from tests.faults.processes import DEADLINE, PEER_TIMEOUT, Ground
from tests.faults.stages import Rest, Step
from tests.faults.traffic import Route

SHORT_SECONDS = 0.7
LONG_SECONDS = DEADLINE + 1.5
# What a busy machine may add to a deadline before an end counts as late.
GRACE_SECONDS = 2.0
assert SHORT_SECONDS < PEER_TIMEOUT < DEADLINE < LONG_SECONDS


class Broken(AssertionError):
    """A promise was broken."""


@dataclass(frozen=True)
class Fault:
    """``hurt``: "encoder", "language" or "network". It ends by itself after ``seconds``, or with a new process."""

    name: str
    hurt: str
    seconds: float = 0.0
    restart: str = ""

    @property
    def kills(self) -> bool:
        return self.hurt != "network" and not self.seconds

    @property
    def freezes(self) -> bool:
        return self.hurt != "network" and self.seconds > 0

    @property
    def short(self) -> bool:
        """Shorter than the silence after which a peer is lost: everything must arrive."""
        return 0 < self.seconds < PEER_TIMEOUT


FAULTS = (
    Fault("encoder killed", "encoder"),
    Fault("encoder frozen, short", "encoder", SHORT_SECONDS),
    Fault("encoder frozen, long", "encoder", LONG_SECONDS),
    Fault("encoder restarted, same port", "encoder", restart="same port"),
    Fault("encoder restarted, another port", "encoder", restart="another port"),
    Fault("language killed", "language"),
    Fault("language frozen, short", "language", SHORT_SECONDS),
    Fault("language frozen, long", "language", LONG_SECONDS),
    Fault("language restarted", "language", restart="another port"),
    Fault("network cut, short", "network", SHORT_SECONDS),
    Fault("network cut, long", "network", LONG_SECONDS),
)


@dataclass
class Attempt:
    """What one fault at one step came to."""

    fault: str
    step: str
    path: str
    happened: str = ""
    reason: str = ""
    seconds: float = 0.0
    bystander_rooms: int = 0
    bystander_slowest: float = 0.0
    broken: str = ""

    @property
    def name(self) -> str:
        return f"{self.fault} / {self.step} / {self.path}"


@dataclass
class _End:
    """The end of the room at one side, which must come by ``limit`` (monotonic seconds)."""

    child: Encoder | Language
    limit: float
    at: float = 0.0
    success: bool = False
    code: int = 0
    reason: str = ""


@dataclass
class _Room:
    """The room that is hurt, and the loop that watches both of its ends while the fault comes and goes."""

    ground: Ground
    fault: Fault
    part: Part
    seconds: float
    rest: list[Rest] = field(default_factory=list)
    struck: float = 0.0
    over: bool = False
    ends: dict[str, _End] = field(default_factory=dict)
    starter: Future[None] | None = None

    def strike(self) -> None:
        self.struck = time.monotonic()
        if self.fault.kills:
            self.ground.kill(self.fault.hurt)
            del self.ends[self.fault.hurt]
            if not self.fault.restart:
                self.rest = [rest for rest in self.rest if rest.role != self.fault.hurt]
                self.over = True
            else:
                self.rest = [rest for rest in self.rest if rest.role != self.fault.hurt or rest.successor]
        elif self.fault.freezes:
            self.ends[self.fault.hurt].child.freeze()
        elif self.ground.cable is not None:
            self.ground.cable.cut()

    def relent(self) -> None:
        """Thaw, or mend the cable."""
        self.over = True
        if self.fault.freezes:
            end = self.ends[self.fault.hurt]
            end.child.thaw()
            end.limit = max(end.limit, time.monotonic() + GRACE_SECONDS)
        elif self.ground.cable is not None:
            self.ground.cable.mend()

    def watch(self, executor: ThreadPoolExecutor) -> None:
        """Until the fault is over, what was left is done, and every end has come. Raises Broken."""
        if self.fault.restart:
            same_port = self.fault.restart == "same port"
            self.starter = executor.submit(self.ground.replace, self.fault.hurt, same_port=same_port)
        while True:
            now = time.monotonic()
            if not self.over:
                self._end_of_fault(now)
            self._do_rest()
            for role, end in self.ends.items():
                if not end.at and self._runs(role):
                    self._look(role, end)
                if end.at > end.limit or (not end.at and now > end.limit and self._runs(role)):
                    raise Broken(
                        f"HANG: no answer of the {role} side within the deadline of {DEADLINE:g} s "
                        f"and {GRACE_SECONDS:g} s of grace"
                    )
            if self.over and not self.rest and all(end.at for end in self.ends.values()):
                return
            time.sleep(0.01)

    def _end_of_fault(self, now: float) -> None:
        if self.starter is None:
            if now >= self.struck + self.seconds:
                self.relent()
        elif self.starter.done():
            self.starter.result()
            self.over = True

    def _runs(self, role: str) -> bool:
        return self.over or role != self.fault.hurt

    def _do_rest(self) -> None:
        for rest in [rest for rest in self.rest if self._runs(rest.role)]:
            self.rest.remove(rest)
            child: Child = self.ground.encoder if rest.role == "encoder" else self.ground.language
            rest.do(child)

    def _look(self, role: str, end: _End) -> None:
        if isinstance(end.child, Language):
            state = end.child.poll(self.part)
            if state is Poll.Success:
                if end.child.call("take", room=self.part.room) != self.part.expected():
                    raise Broken("WRONG BYTES: the room ended in Success and holds something else than was sent")
                end.at, end.success = time.monotonic(), True
            elif state is Poll.Failed:
                outcome = end.child.outcome(self.part)
                end.at, end.code, end.reason = time.monotonic(), outcome["code"], outcome["reason"]
        elif not any(rest.successor for rest in self.rest):  # it knows the room
            ended = end.child.call("ended", room=self.part.room)
            if ended is not None:
                end.at, end.success = time.monotonic(), ended["success"]
                end.code, end.reason = ended["code"], ended["reason"]
        if end.at and not end.success and not (400 <= end.code <= 599 and len(end.reason) > 10):
            raise Broken(f"UNCLEAR: the {role} side says {end.code} {end.reason!r}")


def attempt(ground: Ground, fault: Fault, step: Step, dice: random.Random | None) -> Attempt:
    """Try ``fault`` at ``step``; with ``dice``, at a random moment from there on. Never raises for what broke."""
    result = Attempt(fault.name, step.name, ground.path)
    try:
        with ThreadPoolExecutor(1) as executor, ground.traffic(fault.hurt) as routes:
            for route in routes:
                route.one_more()
            room = _inject(ground, fault, step, dice, routes, executor)
            _judge(result, room, step)
            for end in room.ends.values():
                end.child.call("forget", room=room.part.room)
            if fault.kills and not fault.restart:
                ground.replace(fault.hurt)
            for route in routes:
                route.one_more()
        result.bystander_rooms = sum(route.rooms for route in routes)
        result.bystander_slowest = max(route.slowest for route in routes)
        ground.settle()
    except Exception as error:
        result.broken = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
    return result


def _inject(
    ground: Ground, fault: Fault, step: Step, dice: random.Random | None, routes: list[Route],
    executor: ThreadPoolExecutor,
) -> _Room:  # fmt: skip
    part = ground.world.part(ground.language, step.tokens)
    seconds = fault.seconds if dice is None else fault.seconds * dice.uniform(0.3 if fault.short else 0.9, 1)
    room = _Room(ground, fault, part, seconds)
    limit = time.monotonic() + DEADLINE + GRACE_SECONDS
    ground.language.expect(part, ground.encoder, DEADLINE)
    room.rest = step.reach(ground, part, routes)
    room.ends = {"language": _End(ground.language, limit), "encoder": _End(ground.encoder, limit)}
    if any(rest.successor for rest in room.rest):
        room.ends["encoder"].limit += LONG_SECONDS  # its own clock begins with the announcement, after the fault
    if dice is not None and dice.random() < 0.7:
        if dice.random() < 0.7:
            room._do_rest()
        time.sleep(dice.choice([0.0, 0.002, 0.01, 0.05]) * dice.random())
    room.strike()
    room.watch(executor)
    return room


def _judge(result: Attempt, room: _Room, step: Step) -> None:
    """What the room's user was told: on the language side, or where that was killed, on the encoder's."""
    side, end = next(iter(room.ends.items()))
    result.seconds = round(end.at - room.struck, 3)
    if end.success:
        result.happened = "right bytes" if side == "language" else "encoder: all bytes were written"
    else:
        result.happened = f"{'' if side == 'language' else 'encoder: '}error {end.code}: {plain_reason(end.reason)}"
        result.reason = end.reason
    if side == "language" and not end.success and room.fault.short:
        raise Broken(f"a fault shorter than the silence of {PEER_TIMEOUT:g} s cost the room: {end.reason}")
    if side == "language" and not end.success and step.name.startswith("complete"):
        raise Broken(f"the room was complete before the fault, and failed: {end.reason}")


def plain_reason(reason: str) -> str:
    """``reason`` without the names that differ from run to run."""
    for pattern, name in (
        (r"https?://\S+", "<url>"),
        (r"\b[0-9a-f]{16,}[\w-]*", "<id>"),
        (r"\b\d+\.\d+\.\d+\.\d+:\d+", "<session>"),
        (r"\d+\.\d+ s", "<n> s"),
    ):
        reason = re.sub(pattern, name, reason)
    return reason
