"""Frames that travel together arrive as they were, in order, and what is no batch hurts nobody."""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from sglang_mm_conn.control.batches import MOST_BYTES, MOST_FRAMES, batches, frames_in
from sglang_mm_conn.control.client import ControlClient
from sglang_mm_conn.control.limits import BATCH
from sglang_mm_conn.control.rate_limited_log import LINES
from sglang_mm_conn.control.server import ControlServer
from sglang_mm_conn.control.thread import ControlCallbacks
from sglang_mm_conn.core.errors import ProtocolError
from sglang_mm_conn.core.messages import PROTOCOL_VERSION

VERSION = bytes([PROTOCOL_VERSION])
FRAMES = st.one_of(
    st.binary(max_size=40),
    st.integers(MOST_BYTES // 3, MOST_BYTES + 2).map(bytes),
).map(lambda body: VERSION + body)  # fmt: skip
GARBAGE = (
    b"\xff",
    b"\xff" + msgspec.msgpack.encode([]),
    b"\xff" + msgspec.msgpack.encode([b"alone"]),
    b"\xff" + msgspec.msgpack.encode([b"frame"] * (MOST_FRAMES + 1)),
    b"\xff" + msgspec.msgpack.encode([b"frame", "text"]),
    b"\xff" + msgspec.msgpack.encode([b"frame", b"frame"])[:-1],
    b"\xff" + msgspec.msgpack.encode({"frame": 1}),
    b"\xff\xdd\xff\xff\xff\xff",  # as many as fit 32 bits
)


@given(st.lists(st.tuples(st.sampled_from(("one", "two", "three")), FRAMES), max_size=3 * MOST_FRAMES))
def test_every_peer_gets_its_frames_in_order_and_no_batch_is_too_long(sent: list[tuple[str, bytes]]) -> None:
    outbox = deque(sent)
    arrived: dict[str, list[bytes]] = {}
    for peer, batch in batches(outbox):
        frames = frames_in(batch)
        assert 1 <= len(frames) <= MOST_FRAMES
        assert len(frames) == 1 or sum(map(len, frames)) <= MOST_BYTES
        arrived.setdefault(peer, []).extend(frames)
    assert not outbox
    assert arrived == {peer: [frame for to, frame in sent if to == peer] for peer, _ in sent}


def test_frames_that_are_ready_together_travel_together_and_one_alone_as_it_is() -> None:
    assert list(batches(deque([("peer", VERSION + b"alone")]))) == [("peer", VERSION + b"alone")]
    many = list(batches(deque([("peer", VERSION)] * (2 * MOST_FRAMES + 1))))
    assert [len(frames_in(batch)) for _, batch in many] == [MOST_FRAMES, MOST_FRAMES, 1]


@pytest.mark.parametrize("batch", GARBAGE)
def test_what_only_begins_as_a_batch_is_refused(batch: bytes) -> None:
    with pytest.raises(ProtocolError, match="malformed batch"):
        frames_in(batch)


@pytest.fixture
def context() -> Iterator[zmq.Context[Any]]:
    context: zmq.Context[Any] = zmq.Context()
    yield context
    context.destroy(linger=0)


class Ends:
    """Our two ends and a bare socket opposite each; nothing runs yet."""

    def __init__(self, context: zmq.Context[Any], tick_seconds: float = 1.0) -> None:
        self.heard: list[bytes | None] = []  # frames, and None for every tick
        callbacks = ControlCallbacks(lambda peer, frame: self.heard.append(frame), self._tick, tick_seconds)
        self.server = ControlServer("127.0.0.1", callbacks, key=None, max_frame_bytes=1 << 16)
        self.dealer = context.socket(zmq.DEALER)
        self.dealer.connect(f"tcp://127.0.0.1:{self.server.port}")
        self.dealer.send(VERSION)  # so that its routing id is known here
        peer, _ = self.server._socket.recv_multipart()
        self.peer = peer.hex()
        self.router = context.socket(zmq.ROUTER)
        port = self.router.bind_to_random_port("tcp://127.0.0.1")
        self.client = ControlClient(callbacks, key=None, max_frame_bytes=1 << 16)
        self.client._connect("encoder", f"tcp://127.0.0.1:{port}")
        link = self.client._links["encoder"].socket
        assert link.poll(10_000, zmq.POLLOUT)
        link.send(VERSION)
        self.name, _ = self.router.recv_multipart()
        self._idle: dict[str, ControlServer | ControlClient] = {"encoder": self.server, "language rank": self.client}

    def __enter__(self) -> Ends:
        return self

    def __exit__(self, *_: object) -> None:
        for end in self._idle.values():  # an end closes its sockets when it ends to run
            end.stop()
            end.run()

    def _tick(self) -> None:
        self.heard.append(None)

    def frames(self) -> list[bytes]:
        return [frame for frame in self.heard if frame is not None]

    def say_to(self, side: str, batch: bytes) -> None:
        if side == "encoder":
            self.dealer.send(batch)
        else:
            self.router.send_multipart([self.name, batch])

    def run_until(self, side: str, condition: Callable[[], bool]) -> None:
        end = self._idle.pop(side)
        thread = threading.Thread(target=end.run, daemon=True)
        thread.start()
        until = time.monotonic() + 10
        while not condition() and time.monotonic() < until:
            time.sleep(0.01)
        end.stop()
        thread.join(10)
        assert condition() and not thread.is_alive()


def test_what_waits_at_either_end_leaves_in_as_few_messages_as_there_may_be(context: zmq.Context[Any]) -> None:
    with Ends(context) as ends:
        for number in range(2 * MOST_FRAMES + 1):
            ends.server.send(ends.peer, VERSION + bytes([number]))
            ends.client.send("encoder", VERSION + bytes([number]))
        ends.run_until("encoder", lambda: bool(ends.dealer.poll(0)))
        ends.run_until("language rank", lambda: bool(ends.router.poll(0)))
    of_server, of_client = [], []
    while ends.dealer.poll(200):
        of_server.append(frames_in(ends.dealer.recv()))
    while ends.router.poll(200):
        of_client.append(frames_in(ends.router.recv_multipart()[1]))
    for messages in (of_server, of_client):
        assert [len(frames) for frames in messages] == [MOST_FRAMES, MOST_FRAMES, 1]
        assert [frame[1] for frames in messages for frame in frames] == list(range(2 * MOST_FRAMES + 1))


@pytest.mark.parametrize("side", ["encoder", "language rank"])
def test_the_frames_of_batches_count_when_others_get_their_turn(context: zmq.Context[Any], side: str) -> None:
    batch = b"\xff" + msgspec.msgpack.encode([VERSION] * MOST_FRAMES)
    count = 12
    with Ends(context, tick_seconds=0.0) as ends:
        for _ in range(count):
            ends.say_to(side, batch)
        ends.run_until(side, lambda: ends.heard.count(VERSION) == count * MOST_FRAMES)
    turns = [len(list(group)) for is_frame, group in itertools.groupby(ends.heard, bool) if is_frame]
    assert max(turns) < BATCH + MOST_FRAMES, turns


@pytest.mark.parametrize("side", ["encoder", "language rank"])
def test_invalid_batch_is_dropped_and_logged_a_few_times_and_the_loop_goes_on(
    context: zmq.Context[Any], caplog: pytest.LogCaptureFixture, side: str
) -> None:
    with Ends(context) as ends:
        for batch in (*GARBAGE, *GARBAGE, VERSION + b"ask", b"\xff" + msgspec.msgpack.encode([b"one", b"two"])):
            ends.say_to(side, batch)
        ends.run_until(side, lambda: len(ends.frames()) >= 3)
    assert ends.frames() == [VERSION + b"ask", b"one", b"two"]
    assert caplog.text.count("malformed batch") == LINES
