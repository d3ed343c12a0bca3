"""Owns the draining of an sglang encoder: one record in the process that has the HTTP server, which the others follow.

The gate, the route and SIGTERM belong to that process. Heartbeats are sent by the processes that hold embeddings: that
one itself, or its data parallel workers, which are told through a pipe.
"""

from __future__ import annotations

from typing import Any

from sglang_mm_conn.connector.encoder.endpoint import EncoderEndpoint, ServerStatus
from sglang_mm_conn.control.authentication import DeploymentKey
from sglang_mm_conn.control.draining_server import DrainRoute, EncodeGate, HeldRequests
from sglang_mm_conn.control.termination import Termination
from sglang_mm_conn.core.encoder.draining import Draining
from sglang_mm_conn.core.settings import Settings
from sglang_mm_conn.sglang_plugin.processes import DpWorkers, Notice, follow_notices


class ServerDrain:
    """In the process that has the HTTP server."""

    def __init__(self, settings: Settings, key: DeploymentKey | None, workers: DpWorkers) -> None:
        self.draining = Draining()
        self._workers = workers
        self._endpoint: EncoderEndpoint | None = None  # None: the workers have them
        self._held = HeldRequests(self.draining)
        self._route = DrainRoute(self.draining, key, insecure=settings.insecure, changed=self._changed)
        self._termination = Termination(
            self._held, settings.drain_seconds, changed=self._changed, fail_rooms=self._fail_rooms
        )

    def install(self, app: Any) -> None:
        """Put the gate before sglang's FastAPI application, and add route and lifespan. Call this once, before the
        application runs."""
        app.add_middleware(EncodeGate, held=self._held)
        app.include_router(self._route.router(self._termination.lifespan))

    def serves(self, endpoint: EncoderEndpoint) -> None:
        """This process holds the embeddings too; ``endpoint`` sends its heartbeats."""
        self._endpoint = endpoint
        endpoint.server_status = lambda: ServerStatus(self.draining.held, self.draining.refuses)

    def _changed(self) -> None:
        if self._endpoint is not None:
            self._endpoint.send_heartbeats()
        else:
            self._workers.tell(Notice(self.draining.refuses))

    def _fail_rooms(self, reason: str, code: int) -> None:
        if self._endpoint is not None:
            self._endpoint.fail_all(reason, code)
        else:
            self._workers.tell(Notice(draining=True, reason=reason, code=code))


def follow_server(endpoint: EncoderEndpoint) -> None:
    """In a data parallel worker: let ``endpoint`` say what the server does. Does nothing in another process."""

    def heed(notice: Notice) -> None:
        endpoint.server_status = lambda: ServerStatus(len(endpoint.core.rooms), notice.draining)
        endpoint.send_heartbeats()
        if notice.reason:
            endpoint.fail_all(notice.reason, notice.code)

    follow_notices(heed)
