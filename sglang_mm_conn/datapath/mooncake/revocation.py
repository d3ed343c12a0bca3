"""Owns revocations, which prove for the Mooncake path that no write lands any more: they replace and destroy the
engine.

After a data call has failed, or an encoder was lost during a write, bytes may land for as long as the old connection
exists, whatever the encoder sends. Unregistering memory does not stop them (measured over TCP: the rest of a write
continues to land in unregistered memory). Destroying the engine does. So when blocks have been in doubt for some time:

1. The revocation makes another engine and registers the pool with it (the next *epoch*).
2. The rank registers the new epoch with every encoder. Windows that are offered from then on belong to the new epoch,
   and are written only through its engine.
3. When no healthy window of the old epoch is open, and no encoder can be offered one, it destroys the old engine.
4. The quarantined blocks of the old epoch are free. The rank notifies the encoders that the epoch is gone.

Healthy rooms continue meanwhile. An encoder that was suspended during all this resumes with the address of an engine
that no longer exists.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future
from enum import Enum

from sglang_mm_conn.datapath.base import Doubts, RevocablePath

logger = logging.getLogger(__name__)


class Stage(Enum):
    """The steps of a revocation."""

    IDLE = "idle"
    RENEWING = "renewing"
    DRAINING = "draining"
    DESTROYING = "destroying"


class Revocation:
    """Runs one revocation at a time. ``tick`` drives it and never blocks."""

    def __init__(self, path: RevocablePath, doubts: Doubts) -> None:
        self._path = path
        self._doubts = doubts
        self.stage = Stage.IDLE
        self.count = 0
        self._epoch = 0
        self._not_before = 0.0
        self._work: Future[object] | None = None

    def tick(self, now: float) -> None:
        if self.stage is Stage.IDLE:
            since, patience = self._doubts.in_doubt_since(self._path.session_id), self._doubts.patience
            if since is not None and now - since >= patience and now >= self._not_before:
                self._not_before = now + patience
                logger.warning("Mooncake: blocks in doubt for %.1f s, replacing the engine", now - since)
                self._begin(Stage.RENEWING, self._path.renew)
        elif self.stage is Stage.RENEWING:
            result = self._finished()
            if result is not None:
                self._epoch = int(str(result))
                self.stage = Stage.DRAINING
                self._doubts.register_again(self._path)
        elif self.stage is Stage.DRAINING:
            if not self._doubts.is_in_use(self._path.session_id, self._epoch):
                epoch = self._epoch
                self._begin(Stage.DESTROYING, lambda: self._path.revoke(epoch))
        elif self._work is not None and self._work.done():
            self._work.result()
            self.stage, self._work = Stage.IDLE, None
            self.count += 1
            logger.info("Mooncake: engine of epoch %d destroyed, its blocks are free again", self._epoch)
            self._doubts.revoked(self._path, self._epoch)

    def _begin(self, stage: Stage, work: Callable[[], object]) -> None:
        self.stage = stage
        self._work = self._doubts.executor.submit(work)

    def _finished(self) -> object | None:
        """The result of the work under way; None while it runs. If the work failed, a later tick starts it again."""
        if self._work is None or not self._work.done():
            return None
        error = self._work.exception()
        if error is not None:
            logger.error("Mooncake: could not make a new engine: %s", error)
            self.stage, self._work = Stage.IDLE, None
            return None
        return self._work.result()
