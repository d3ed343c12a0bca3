"""Frames that are not read yet wait at whoever sends them, not here."""

from __future__ import annotations

import queue
import threading
from dataclasses import replace
from typing import Any

import zmq

from sglang_mm_conn.control.client import ControlClient
from sglang_mm_conn.control.limits import READ_AHEAD
from sglang_mm_conn.control.server import ControlServer
from sglang_mm_conn.control.thread import ControlCallbacks

FRAME = bytes(1 << 20)
# What the kernel holds for one connection, at both ends, and the sender's own queue.
ELSEWHERE = 24
DEAF = ControlCallbacks(on_frame=lambda peer, frame: None, on_tick=lambda: None, tick_seconds=1.0)


def frames_taken(socket: zmq.Socket[Any], *envelope: bytes) -> int:
    """How many frames a receiver that never reads lets a sender get rid of."""
    for count in range(READ_AHEAD + 3 * ELSEWHERE):
        if not socket.poll(1000, zmq.POLLOUT):
            return count
        try:
            socket.send_multipart([*envelope, FRAME])
        except zmq.Again:
            return count
    return READ_AHEAD + 3 * ELSEWHERE


def test_an_encoder_that_is_busy_does_not_collect_frames() -> None:
    server = ControlServer("127.0.0.1", DEAF, key=None, max_frame_bytes=1 << 20)
    context: zmq.Context[Any] = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.setsockopt(zmq.SNDHWM, 1)
    dealer.connect(f"tcp://127.0.0.1:{server.port}")
    try:
        assert frames_taken(dealer) <= READ_AHEAD + ELSEWHERE
    finally:
        context.destroy(linger=0)
        server.stop()
        server.run()


def test_a_language_rank_that_is_busy_does_not_collect_frames() -> None:
    context: zmq.Context[Any] = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.setsockopt(zmq.ROUTER_MANDATORY, 1)
    router.setsockopt(zmq.SNDHWM, 1)
    router.setsockopt(zmq.SNDTIMEO, 1000)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    client = ControlClient(DEAF, key=None, max_frame_bytes=1 << 20)
    client._connect("encoder", f"tcp://127.0.0.1:{port}")
    try:
        link = client._links["encoder"].socket
        assert link.poll(5000, zmq.POLLOUT)
        link.send(b"hello")
        peer, _ = router.recv_multipart()
        assert frames_taken(router, peer) <= READ_AHEAD + ELSEWHERE
    finally:
        context.destroy(linger=0)
        client.stop()
        client.run()


def test_message_of_several_frames_is_not_read_and_the_language_rank_reconnects() -> None:
    """Read to its end, a connection that broke meanwhile ended the process: "Assertion failed: !_more (fq.cpp)"."""
    context: zmq.Context[Any] = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.setsockopt(zmq.RCVTIMEO, 10_000)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    connected, frames = threading.Semaphore(0), queue.SimpleQueue[bytes]()
    callbacks = replace(
        DEAF, on_frame=lambda key, frame: frames.put(frame), on_connected=lambda key: connected.release()
    )
    client = ControlClient(callbacks, key=None, max_frame_bytes=1 << 20)
    thread = threading.Thread(target=client.run, daemon=True)
    thread.start()
    client.connect("encoder", f"tcp://127.0.0.1:{port}")
    try:
        peers = set()
        for _ in range(3):
            assert connected.acquire(timeout=10)
            client.send("encoder", b"hello")
            peer, _ = router.recv_multipart()
            peers.add(peer)
            router.send_multipart([peer, b"fine"])
            router.send_multipart([peer, b"one", b"two", b"three"])
            assert frames.get(timeout=10) == b"fine"
        assert len(peers) == 3 and connected.acquire(timeout=10) and frames.empty()
    finally:
        client.stop()
        thread.join(10)
        context.destroy(linger=0)
    assert not thread.is_alive()
