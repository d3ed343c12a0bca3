"""Protections of the code, each of which can be taken away: the simulator must notice.

A mutation replaces a few words in the source of one function, for a while. Words that are not there any more are an
error: then the protection has moved, and the mutation must follow it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from sglang_mm_conn.core import rooms
from sglang_mm_conn.core.dispatch import verdicts, waiting
from sglang_mm_conn.core.dispatch.dispatcher import DispatchCore
from sglang_mm_conn.core.dispatch.fleet import Fleet
from sglang_mm_conn.core.dispatch.placement import Placement
from sglang_mm_conn.core.dispatch.requests import Request
from sglang_mm_conn.core.dispatch.waiting import WaitingParts
from sglang_mm_conn.core.encoder.sender import SenderCore
from sglang_mm_conn.core.language import accounts
from sglang_mm_conn.core.language.receiver import ReceiverCore
from sglang_mm_conn.core.language.registration import Registrations
from sglang_mm_conn.core.language.views import Views
from sglang_mm_conn.datapath.mooncake.revocation import Revocation
from sglang_mm_conn.datapath.shm import ShmReceivePath
from tests.simulator.scheduler import attribute


@dataclass(frozen=True)
class Change:
    """In the source of ``owner.name``: each first text becomes the second."""

    owner: Any
    name: str
    texts: tuple[tuple[str, str], ...]

    def function(self) -> Any:
        """The changed function. Raises LookupError where a text does not occur exactly once."""
        raw = inspect.getattr_static(self.owner, self.name)
        original = raw.__func__ if isinstance(raw, staticmethod) else raw
        source = inspect.getsource(original)
        for old, new in self.texts:
            if source.count(old) != 1:
                raise LookupError(f"{old!r} occurs {source.count(old)} times in {original.__qualname__}")
            source = source.replace(old, new)
        head = "from __future__ import annotations\n" + ("class Holder:\n" if source.startswith(" ") else "")
        namespace = dict(vars(sys.modules[original.__module__]))
        exec(compile(head + source, "mutation", "exec"), namespace)
        holder = namespace.get("Holder")
        return namespace[self.name] if holder is None else inspect.getattr_static(holder, self.name)


def change(owner: Any, name: str, *texts: tuple[str, str]) -> Change:
    return Change(owner, name, texts)


OF_THE_ROOMS: dict[str, tuple[Change, ...]] = {
    "quarantine": (
        change(
            ReceiverCore, "_fail",
            (
                "        # Blocks of a window that is being copied",
                "            self.quarantine.release(entry.room)\n        # Blocks of a window that is being copied",
            ),
        ),
    ),
    "window check on the encoder": (
        change(SenderCore, "_on_resume", ("message.window != info.window + 1", "False")),
    ),
    "window check on the language side": (
        change(ReceiverCore, "_on_progress", ("message.window < entry.window or (", "False or (")),
    ),
    "resume token check": (
        change(SenderCore, "_on_resume", ("message.sent_tokens != info.sent_tokens", "False")),
    ),
    "shard stored at completion": (
        change(
            SenderCore, "_advance",
            ("if not entry.complete:", "if not entry.transfer_infos:"),
            (
                "entry.machine.transition_to(SenderState.TRANSFERRING)",
                "entry.state is SenderState.TRANSFERRING or entry.machine.transition_to(SenderState.TRANSFERRING)",
            ),
            (
                "entry.machine.transition_to(SenderState.READY)",
                "entry.state is SenderState.READY or entry.machine.transition_to(SenderState.READY)",
            ),
        ),
    ),
    "drain before source release": (
        change(
            SenderCore, "_fail",
            (
                "return actions + self._drop_if_over(entry, now)",
                "return [*actions, Release(entry.room), *self._drop_if_over(entry, now)]",
            ),
        ),
    ),
    "nonce in the room's name": (
        change(rooms, "new_room_base", ("{new_id()}", "{new_id()[:1].zfill(16)}")),
    ),
    # Beyond those that everybody would name:
    "Drained only after the write": (
        change(
            SenderCore, "_on_abort",
            ("info.drained", "True"),
            (
                "if info is not None and not info.machine.final:",
                "if info is not None and not info.machine.final and info.state is not WindowState.WRITING:",
            ),
        ),
    ),
    "no Drained after a write in doubt": (
        change(SenderCore, "on_written", ("drained=not in_doubt", "drained=True")),
    ),
    "a silent writer may still write": (
        change(ShmReceivePath, "prove_writer_gone", ("return self._segment", "return True or self._segment")),
    ),
    "the old engine is destroyed before its blocks are free": (
        change(
            Revocation, "tick",
            (
                "self._begin(Stage.DESTROYING, lambda: self._path.revoke(epoch))",
                "self._begin(Stage.DESTROYING, lambda: None)",
            ),
        ),
    ),
    "healthy rooms leave the old engine first": (
        change(
            Revocation, "tick",
            ("if not self._doubts.is_in_use(self._path.session_id, self._epoch):", "if True:"),
        ),
    ),
    "blocks stay with the copier until it is done": (
        change(
            ReceiverCore, "_on_progress",
            (
                "        entry.confirm(message, now)\n",
                "        entry.confirm(message, now)\n"
                "        self.allocator.release((entry.room, entry.window), entry.blocks)\n",
            ),
        ),
        change(ReceiverCore, "on_copied", ("self.allocator.release((room, window), entry.blocks)", "pass")),
        change(accounts, "check_integrity", ("if held !=", "if False and held !=")),
    ),
    "blocks stay with a view until it is over": (
        change(
            Views, "put",
            (
                "        self._views[entry.room] = (entry.room, entry.window), entry.blocks\n",
                "        self._counted -= len(entry.blocks)\n"
                "        self._allocator.release((entry.room, entry.window), entry.blocks)\n",
            ),
        ),
        change(Views, "release", ("        owner, blocks", "        return\n        owner, blocks")),
    ),
    "offers are repeated after a lost connection": (
        change(ReceiverCore, "_offer_again", ("if entry.state is ReceiverState.OFFERED", "if False")),
    ),
    "rooms are announced again after a lost connection": (
        change(SenderCore, "register", ("actions.append(announcement(entry, session))", "pass")),
    ),
    "a refusal of a path that was given up is old": (
        change(Registrations, "refused", ("message.kind is RefusalKind.DATA_PATH and", "False and")),
    ),
    "a connection that comes back is registered": (
        change(Registrations, "connected", ("return self._register(process)", "return []")),
    ),
    "a refused path is answered with the other": (
        change(Registrations, "refused", ("if other is not None:", "if False:")),
    ),
    "a refusal of an offer that was confirmed since is old": (
        change(ReceiverCore, "_on_progress", ("if message.refused_window != entry.window", "if False")),
    ),
    "deadlines are enforced": (
        change(ReceiverCore, "tick", ("now >= entry.deadline", "False")),
    ),
}  # fmt: skip

OF_THE_DISPATCHER: dict[str, tuple[Change, ...]] = {
    "each try has a room of its own": (
        change(DispatchCore, "_serve", ("part_room(self._new_room_base(), ", "part_room(request.room_base, ")),
    ),
    "the scheduler gives the room of an earlier try up": (
        change(WaitingParts, "redispatch", ("self.rooms[news.part].clear()", "pass")),
    ),
    "tries are bounded": (
        change(DispatchCore, "_serve", ("part.taken >= self._tries", "False")),
    ),
    "no try is left at an encoder that is down": (
        change(DispatchCore, "_settle", ("if change.loses:", "if False:")),
    ),
    "a process that fell silent is reported": (
        change(Registrations, "_fell_silent", ("encoder.silences += process.registered_once", "pass")),
    ),
    "no encoder gets a part again without a sign of life": (
        change(Placement, "able", ("(ended is None or one.heard_at >= ended)", "True")),
    ),
    "no encoder gets a part again that it failed to encode": (
        change(DispatchCore, "_ended", ("part.excluded.add(attempt.url)", "pass")),
    ),
    "a part keeps its number": (
        change(
            DispatchCore, "_post",
            (
                "        self._open[room] = (request, part)\n",
                "        self._open[room] = (request, part)\n"
                "        part.number = (part.number + (len(part.tries) > 1)) % part.of\n",
            ),
        ),
    ),
    "a fault of the input is not tried again": (
        change(verdicts, "of_failure", ("verdict = Verdict.INPUT", "verdict = Verdict.ERROR")),
    ),
    "the answer of an earlier try says nothing of the newer": (
        change(
            DispatchCore, "answered",
            (
                "        if found is None:\n",
                "        for pair in self._open.values():\n"
                "            if any(attempt.room == room for attempt in pair[1].tries):\n"
                "                found = pair\n"
                "        if found is None:\n",
            ),
        ),
    ),
    "requests past their deadline are forgotten": (
        change(Request, "is_over", ("now > self.deadline + OVERDUE_SECONDS", "False")),
    ),
    "an encoder that drains gets no work": (
        change(Fleet, "usable", ("one.state is EncoderState.UP", "one.state.value in ('up', 'draining')")),
    ),
    "a request waits while the dispatcher decides": (
        change(WaitingParts, "_ask_about", ("not may_be_tried_again(error.code)", "True")),
    ),
    "the dispatcher is asked again": (
        change(WaitingParts, "_ask_about", ("now + ASK_AGAIN_SECONDS", "now + 1e9")),
    ),
    "a room that another rank has aborted is tried again": (
        change(waiting, "may_be_tried_again", ("is not Verdict.INPUT", "not in (Verdict.INPUT, Verdict.ABORTED)")),
    ),
    "the scheduler says whether an aborted room's request waits": (
        change(
            DispatchCore, "_ended",
            (
                "            part.current.aborted_at = now\n            return []\n",
                "            return self._finish(request)\n",
            ),
        ),
    ),
    "a report is no sign of life": (
        change(Fleet, "reported_one", ("one.connected_at = now", "one.heard_at = now")),
    ),
    "a probe proves life when it was sent, not when it was answered": (
        change(Fleet, "probed", ("max(one.heard_at, one.probed_at)", "now")),
    ),
    "a doubted encoder is probed until it answers": (
        change(Fleet, "_probe_time", (" or one.doubted", "")),
    ),
    "a part that was lost after its delivery is tried again": (
        change(DispatchCore, "room_failed", (" or self._delivered.get(room)", "")),
    ),
    "a rank that cannot ask gives up in the end": (
        change(WaitingParts, "_ask_about", ("if now > self._asked", "if False and self._asked")),
    ),
}  # fmt: skip

MUTATIONS = OF_THE_ROOMS | OF_THE_DISPATCHER


@contextmanager
def without(protection: str) -> Iterator[None]:
    """The code lacks ``protection`` (a key of MUTATIONS) for a while."""
    with ExitStack() as changed:
        for one in MUTATIONS[protection]:
            changed.enter_context(attribute(one.owner, one.name, one.function()))
        yield
