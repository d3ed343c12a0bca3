"""Owns the registration of language ranks at an encoder: the waiting ones, and the thread that attaches memory.

Attaching may take long (a Mooncake engine starts, a segment is mapped), so a separate thread does it, the registrar.

Locking: the endpoint's one lock guards the waiting registrations, the core and the peers. It is not held while a link
is opened: meanwhile the rank may register again on another connection, or be dropped because it was silent. So
``_attach`` checks the session before and after. The control thread reads ``registering`` and the peers, and drops
silent peers, without the lock, each in a single operation.
"""

from __future__ import annotations

import logging
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, replace

from sglang_mm_conn.connector.encoder.actions import ActionRunner
from sglang_mm_conn.connector.encoder.links import LinkBusy, Links
from sglang_mm_conn.control.rate_limited_log import RateLimitedLog
from sglang_mm_conn.core.actions import Ended
from sglang_mm_conn.core.encoder.sender import RegisteredSession, SenderCore
from sglang_mm_conn.core.errors import DataPathUnavailable, ProtocolError, WriterSlotTaken
from sglang_mm_conn.core.messages import RefusalKind, Refused, Register, Registered
from sglang_mm_conn.core.settings import Settings
from sglang_mm_conn.core.texts import as_text

logger = logging.getLogger(__name__)

# Limit on peers whose registrations wait. Only the newest registration of each peer waits.
_WAITING_REGISTRATIONS = 1024
# A session belongs to its process for this many heartbeat intervals after the process's last message.
_ALIVE_HEARTBEATS = 3
# Epochs of one session that are not revoked. A rank has two at most: the one that it is revoking, and the next.
_MOST_EPOCHS = 4


@dataclass
class ControlPeer:
    """A connection that has registered, with its session."""

    last_seen: float
    session: str


class Registrar:
    """Answers each Register with Registered or Refused. Drops a Register that a newer one has overtaken."""

    def __init__(
        self,
        lock: threading.Lock,
        core: SenderCore,
        actions: ActionRunner,
        links: Links,
        peers: dict[str, ControlPeer],
        settings: Settings,
        *,
        incarnation: str,
        mismatch: Callable[[Register], str],
        clock: Callable[[], float],
        executor: Executor,
        rate_limited_log: RateLimitedLog,
    ) -> None:
        """``peers``: by name; a peer that registers is added. ``incarnation``: of this encoder. ``mismatch``: returns
        why a Register does not fit this encoder (``core.encoder.compatibility``). ``executor``: the registrar thread,
        which attaches memory. ``rate_limited_log``: the endpoint's log, so that all lines about a peer count
        together."""
        self.registering: set[str] = set()  # peers that get heartbeats while they wait
        self.waiting: dict[str, Register] = {}  # by peer
        self._lock = lock
        self._core = core
        self._actions = actions
        self._links = links
        self._peers = peers
        self._settings = settings
        self._incarnation = incarnation
        self._mismatch = mismatch
        self._clock = clock
        self._executor = executor
        self._rate_limited_log = rate_limited_log

    def register_soon(self, peer: str, message: Register) -> None:
        """Leave ``message`` to the registrar thread. A peer that registers several times while it waits gets only one
        job, so it cannot starve the others."""
        with self._lock:
            waiting = self.waiting.get(peer)
            waits = waiting is not None
            full = not waits and len(self.waiting) >= _WAITING_REGISTRATIONS
            overtaken = (
                waiting is not None and waiting.incarnation == message.incarnation and waiting.number > message.number
            )
            if not full and not overtaken:
                self.waiting[peer] = message
                self.registering.add(peer)
        if full:
            reason = "too many language ranks are registering at the same time"
            self._actions.send(peer, Refused(reason=reason, kind=RefusalKind.REGISTER_FIRST))
        elif not waits:
            self._executor.submit(self._register, peer)

    def close(self) -> None:
        """Stop the registrar thread. Returns when no registration is under way."""
        self._executor.shutdown(wait=True)

    # -- registrar thread ----------------------------------------------------------------------------------------

    def _register(self, peer: str) -> None:
        with self._lock:
            message = self.waiting.pop(peer)
        try:
            problem = self._mismatch(message)
            if problem:
                self._rate_limited_log.log(
                    peer, logging.ERROR, "Language rank %s refused: %s", message.mooncake_session_id, problem
                )
                self._actions.send(peer, Refused(reason=problem, kind=RefusalKind.MISMATCH))
            else:
                self._attach(peer, message)
        except (LinkBusy, WriterSlotTaken) as error:  # a newer registration may succeed
            self._actions.send(peer, Refused(reason=str(error), kind=RefusalKind.REGISTER_FIRST))
        except (DataPathUnavailable, ProtocolError) as error:
            self._rate_limited_log.log(
                peer, logging.WARNING, "Language rank %s: %s", message.mooncake_session_id, error
            )
            self._refuse_data_path(peer, message, str(error))
        except Exception as error:
            self._rate_limited_log.log(
                peer, logging.ERROR, "Language rank %s could not be registered: %s", message.mooncake_session_id,
                traceback.format_exc(),
            )  # fmt: skip
            self._refuse_data_path(peer, message, f"{type(error).__name__}: {error}")
        finally:
            with self._lock:
                if peer not in self.waiting:
                    self.registering.discard(peer)

    def _refuse_data_path(self, peer: str, message: Register, reason: str) -> None:
        """Refuse only the data path of ``message``: another may work."""
        refused = Refused(reason=as_text(reason), kind=RefusalKind.DATA_PATH, data_path=message.data_path)
        self._actions.send(peer, refused)

    def _attach(self, peer: str, message: Register) -> None:
        """Attach the memory that ``message`` describes, and answer. Raises LinkBusy, WriterSlotTaken,
        DataPathUnavailable."""
        # Drop a Register that a newer one of the same process has overtaken. It came over a broken connection, and the
        # process waits for an answer on the newer one.
        with self._lock:
            known = self._core.sessions.get(message.mooncake_session_id)
        if known is not None and known.incarnation == message.incarnation and known.number > message.number:
            return
        # A process that is alive keeps its session. Otherwise a second process that names the same session would end
        # the first one's rooms.
        if known is not None and known.incarnation != message.incarnation and self._is_alive(known):
            raise LinkBusy(f"session {message.mooncake_session_id} belongs to another process, which is alive")
        # Each live epoch costs a link: descriptors and a mapping, or a place in the engines' tables.
        if known is not None and known.incarnation == message.incarnation:
            living = {epoch for epoch in known.epochs if epoch >= message.oldest_epoch}
            if len({*living, message.epoch}) > _MOST_EPOCHS:
                raise ProtocolError(f"{len(living)} epochs of session {message.mooncake_session_id} are not revoked")
        # Open the link without the lock: this may take long.
        same_session = self._links.open(message)
        session = self._new_session(peer, message)
        now = self._clock()
        answer = Registered(
            mooncake_session_id=message.mooncake_session_id, epoch=message.epoch, incarnation=self._incarnation
        )
        # Tell the core, in one critical section: the state seen above may have changed while the link was opened.
        with self._lock:
            ended: list[Ended] = []
            known = self._core.sessions.get(message.mooncake_session_id)
            # A new session loses the rooms that were offered blocks through its old links. A continued session keeps
            # them, and keeps the epochs that the rank has not revoked: their windows may still be written.
            if not same_session:
                ended += self._actions.perform(
                    self._core.session_lost(message.mooncake_session_id, "the language rank registered anew", now)
                )
            elif known is not None:
                living = {epoch for epoch in known.epochs if epoch >= message.oldest_epoch}
                session = replace(session, epochs=tuple(sorted({*living, message.epoch})))
            # Accept the rank only if the link is still open: the control thread may have closed it because the rank was
            # silent on an older connection.
            if self._links.has(message.mooncake_session_id, message.epoch):
                ended += self._give_up_other_session(peer, message.mooncake_session_id, now)
                self._peers[peer] = ControlPeer(now, message.mooncake_session_id)
                self._actions.send(peer, answer)  # before the core announces the session's rooms
                ended += self._actions.perform(self._core.register(session, now))
            else:
                self._actions.send(
                    peer, Refused(reason="the link was closed during the registration", kind=RefusalKind.REGISTER_FIRST)
                )
        # Close the links to epochs that the rank has revoked: their memory is no longer reachable.
        if message.oldest_epoch:
            self._links.close(message.mooncake_session_id, up_to=message.oldest_epoch - 1)
        self._rate_limited_log.log(
            peer, logging.INFO,
            "Language rank %d of %d registered: session=%s epoch=%d path=%s pool=%d blocks of %d bytes",
            message.rank, message.size, message.mooncake_session_id, message.epoch, message.data_path,
            session.geometry.blocks, message.block_bytes,
        )  # fmt: skip
        self._actions.notify(ended)

    def _new_session(self, peer: str, message: Register) -> RegisteredSession:
        return RegisteredSession(
            mooncake_session_id=message.mooncake_session_id,
            peer=peer,
            incarnation=message.incarnation,
            server=message.server,
            rank=message.rank,
            size=message.size,
            geometry=message.geometry,
            epochs=(message.epoch,),
            most_writes=max(1, self._settings.workers_per_queue // 2),
            number=message.number,
        )

    def _is_alive(self, session: RegisteredSession) -> bool:
        peer = self._peers.get(session.peer)
        return peer is not None and self._clock() - peer.last_seen < _ALIVE_HEARTBEATS * self._settings.heartbeat

    def _give_up_other_session(self, peer: str, session: str, now: float) -> list[Ended]:
        """Under the lock. End the session that ``peer`` registered before, if it is another one. A peer has one
        session; without this, nothing would end the earlier one."""
        known = self._peers.get(peer)
        other = None if known is None or known.session == session else self._core.sessions.get(known.session)
        if other is None or other.peer != peer:
            return []
        self._links.close(other.mooncake_session_id)
        return self._actions.perform(
            self._core.session_lost(other.mooncake_session_id, "its peer registered another session", now)
        )
