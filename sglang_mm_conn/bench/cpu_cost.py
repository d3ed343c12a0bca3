"""CPU time of a room's protocol logic alone, and the time to wake a thread: for estimates in the special cases.

Both state machines and the codec run on one thread, joined by function calls: no socket, lock, log line or copy.
"""

from __future__ import annotations

import itertools
import select
import statistics
import threading
import time

from sglang_mm_conn.control.wakeup import Wakeup
from sglang_mm_conn.core.actions import Action, Send
from sglang_mm_conn.core.blocks import BlockAllocator
from sglang_mm_conn.core.encoder.sender import RegisteredSession, SenderCore
from sglang_mm_conn.core.language.receiver import Peer, ReceiverCore
from sglang_mm_conn.core.layout import Geometry
from sglang_mm_conn.core.messages import decode_from_encoder, decode_from_language, encode
from sglang_mm_conn.core.outcomes import LANDED
from sglang_mm_conn.core.rooms import new_id

_SESSION = "10.0.0.1:17001"
_ENCODER, _LANGUAGE = "encoder process", "language process"
_LIMIT = 1 << 20  # bytes of a frame
_REST_SECONDS = 0.002


def seconds_per_room(rooms: int, tokens: int, row_bytes: int) -> tuple[float, float]:
    """Mean CPU time per room of the encoder and of the language side, over ``rooms`` rooms after as many to warm up."""
    server, geometry = new_id(), Geometry(block_bytes=128 * row_bytes, blocks_per_region=1 + tokens // 128, regions=1)
    sender = SenderCore(queues=4, send_timeout=300.0, claim_timeout=30.0)
    receiver = ReceiverCore(
        BlockAllocator(geometry.blocks), geometry, first_offer=None, claim_timeout=30.0, max_embedding_bytes=1 << 30
    )
    sender.register(
        RegisteredSession(
            mooncake_session_id=_SESSION, peer=_LANGUAGE, incarnation=new_id(), server=server, rank=0, size=1,
            geometry=geometry,
        ),
        0.0,
    )  # fmt: skip
    receiver.peer_ready(Peer(_ENCODER, _SESSION, "shm", exclusive_lock=True), 0.0)
    spent = [0.0, 0.0]

    def room(name: str) -> None:
        times = [time.thread_time()]
        receiver.expect(name, "http://encoder", 60.0, 0.0)
        times.append(time.thread_time())
        actions = sender.announce(name, tokens, row_bytes, "bfloat16", 0.0)
        announce = _frame([*actions, *sender.add_source(name, range(1), b"", None, 0.0)])
        times.append(time.thread_time())
        offer = _frame(receiver.on_message(_ENCODER, decode_from_encoder(announce, _LIMIT), 0.0))  # type: ignore[arg-type]
        times.append(time.thread_time())
        sender.on_message(_LANGUAGE, decode_from_language(offer, _LIMIT), 0.0)  # type: ignore[arg-type]
        write = sender.begin_write(name)
        assert write is not None
        done = _frame(sender.on_written(write, LANDED, 0.0))
        times.append(time.thread_time())
        receiver.on_message(_ENCODER, decode_from_encoder(done, _LIMIT), 0.0)  # type: ignore[arg-type]
        receiver.on_copied(name, 0, "", 0.0)
        receiver.forget(name)
        times.append(time.thread_time())
        for step, (begin, end) in enumerate(itertools.pairwise(times)):
            spent[step % 2 == 0] += end - begin

    for number in range(2 * rooms):
        if number == rooms:
            spent[:] = 0.0, 0.0
        room(f"{server}-{number:016x}")
    return spent[0] / rooms, spent[1] / rooms


def seconds_per_wake(wakes: int) -> float:
    """Median wall time from the notification of a waiting thread until it runs, with both threads idle before."""
    wakeup = Wakeup()
    notified: list[float] = []
    heard: list[float] = []

    def wait() -> None:
        poller = select.poll()
        poller.register(wakeup, select.POLLIN)
        for _ in range(wakes):
            poller.poll()
            heard.append(time.monotonic())
            wakeup.clear()

    thread = threading.Thread(target=wait, name="bench-wakes", daemon=True)
    thread.start()
    for _ in range(wakes):
        time.sleep(_REST_SECONDS)
        notified.append(time.monotonic())
        wakeup.notify()
    thread.join()
    wakeup.close()
    return statistics.median(end - begin for begin, end in zip(notified, heard, strict=True))


def _frame(actions: list[Action]) -> bytes:
    """The one message among ``actions``, encoded."""
    (message,) = [action.message for action in actions if isinstance(action, Send)]
    return encode(message)
