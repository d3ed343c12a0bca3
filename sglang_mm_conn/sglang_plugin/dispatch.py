"""The language server's tokenizer process: names the rooms of each request and asks the encoders to encode.

The message from the tokenizer to the scheduler has no field of this connector. So the room base of a request travels as
the fragment of its encoder URLs, which sglang stores on the request.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from http import HTTPStatus
from typing import Any

from sglang.srt.disaggregation.encoder.receiver import MMReceiverHTTP
from sglang.srt.managers.io_struct import EncoderDispatchErrorReq
from sglang.srt.runtime_context import get_serving

from sglang_mm_conn.core.errors import ConnError
from sglang_mm_conn.core.outcomes import known_http_status
from sglang_mm_conn.core.rooms import new_room_base
from sglang_mm_conn.sglang_plugin.addresses import reached_at
from sglang_mm_conn.sglang_plugin.names import server_incarnation

logger = logging.getLogger(__name__)

# The longest wait for a request to reach the scheduler before the error of its dispatch is sent there. The scheduler
# ignores an error of a request that it does not know.
_DISPATCHED_SECONDS = 300.0


def with_room(url: str, room_base: str) -> str:
    """``url`` with ``room_base`` as its fragment."""
    return f"{url}#{room_base}"


def split_room(url: str) -> tuple[str, str]:
    """(encoder URL, room base). The base is empty where sglang's own dispatcher made the request."""
    plain, _, room_base = url.partition("#")
    return plain, room_base


def dispatch_tag(room_base: str) -> str:
    """Ends the message of a dispatch error: a later request may have the same id, but has another room base."""
    return f" [dispatch {room_base}]"


class RoomDispatcher(MMReceiverHTTP):
    """In place of sglang's receiver in the tokenizer process. Dispatches run on one thread with an event loop."""

    def __init__(self, encode_urls: list[str]) -> None:
        # Does not call super().__init__, which opens sockets whose messages are unpickled.
        self.encode_urls = encode_urls  # sglang changes it in place as encoders register
        self.host = reached_at(get_serving().host)
        self._server = server_incarnation()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="mm-conn-dispatch", daemon=True).start()

    def _send_encode_request(
        self, obj: Any, time_stats_json: Any = None, on_dispatch_error: Any = None
    ) -> threading.Event | None:
        """Start the dispatch of the items of ``obj`` to the encoders.

        Returns the event that sglang sets once it has sent the request to the scheduler, or None without items or
        encoders. Raises ValueError for a batch of prompts.
        """
        if not obj.is_single:
            raise ValueError(
                "a batch of prompts with images cannot be dispatched to encoders: send one prompt per request"
            )
        items = self._extract_url_data(obj)
        urls = list(self.encode_urls)
        if not items or not urls:
            if items:
                logger.warning("No encoder is registered: request %s is processed without one", obj.rid)
            obj.need_wait_for_mm_inputs = False
            return None
        room_base = new_room_base(self._server)
        obj.need_wait_for_mm_inputs = True
        obj.num_items_assigned = self._assign_items_by_modality(items, len(urls))
        obj.encoder_urls = [with_room(url, room_base) for url in urls]
        dispatched = threading.Event()
        asyncio.run_coroutine_threadsafe(
            self._dispatch(
                obj.rid, room_base, items, obj.num_items_assigned, urls, time_stats_json, dispatched, on_dispatch_error
            ),
            self._loop,
        )
        return dispatched

    async def _dispatch(
        self,
        rid: str,
        room_base: str,
        items: list[Any],
        assigned: Any,
        urls: list[str],
        time_stats_json: Any,
        dispatched: threading.Event,
        on_dispatch_error: Any,
    ) -> None:
        try:
            error = await self.encode(
                req_id=room_base,
                mm_data=items,
                embedding_port=None,
                endpoint_encode="encode",
                num_items_assigned=assigned,
                encode_urls=urls,
                time_stats_json=time_stats_json,
            )
            problem = None if error is None else (error.error_msg, error.error_code)
        except Exception as failure:
            logger.warning("Dispatch of %s failed: %s", rid, failure)
            problem = (f"{type(failure).__name__}: {failure}", int(HTTPStatus.BAD_GATEWAY))
        if problem is None or on_dispatch_error is None:
            return
        # The scheduler ignores an error of a request that it has not received yet.
        deadline = self._loop.time() + _DISPATCHED_SECONDS
        while not dispatched.is_set() and self._loop.time() < deadline:
            await asyncio.sleep(0.005)
        text, code = problem[0] + dispatch_tag(room_base), known_http_status(problem[1])
        on_dispatch_error(EncoderDispatchErrorReq(rid=rid, error_msg=text, error_code=code))

    def process_waiting_requests(self, recv_reqs: Any) -> Any:
        raise ConnError("requests wait in the scheduler, not in the tokenizer")
