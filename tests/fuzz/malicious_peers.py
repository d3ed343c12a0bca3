"""Peers that mean harm: a language rank's end and an encoder's, each with a real socket, and strangers at the doors.

They have the deployment's key where there is one: what they may do is to be wrong, or to lie about rooms and sessions.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import random
import socket
from typing import Any

import msgspec
import zmq

from sglang_mm_conn.control.authentication import DeploymentKey
from sglang_mm_conn.control.batches import frames_in
from sglang_mm_conn.control.bootstrap import NONCE, ROUTE, SIGNATURE, BootstrapInfo, Worker
from sglang_mm_conn.control.bootstrap_server import StandaloneBootstrap
from sglang_mm_conn.core.errors import ProtocolError
from sglang_mm_conn.core.messages import (
    PROTOCOL_VERSION,
    Heartbeat,
    Message,
    Register,
    Registered,
    ShmMemory,
    decode_from_language,
    encode,
)
from sglang_mm_conn.core.rooms import new_id
from sglang_mm_conn.memory.segment import Segment
from tests.connector.processes import HOST, wait_for
from tests.fuzz.frames import Frames, Knowledge, Parts

REGIONS, BLOCKS_PER_REGION = 2, 4
# A process that takes no frame for so long does not read any more.
STUCK_MS = 20_000
_TRY_MS = 1000
_MOST_READ = 1000
_ports = itertools.count(40_001)


class Stuck(AssertionError):
    """The process under test takes no frames any more."""


class MaliciousLanguage:
    """A language rank's end with memory of its own to show. ``reads``: whether it takes answers from the socket."""

    def __init__(
        self, context: zmq.Context[Any], address: str, key: DeploymentKey | None, common: dict[str, Any], *,
        registers: bool, reads: bool,
    ) -> None:  # fmt: skip
        """``common``: fields of Register that are the deployment's, as the encoder wants them."""
        self._reads = reads
        self.server = new_id()
        region_bytes = BLOCKS_PER_REGION * int(common["block_bytes"])
        self._segment = Segment(REGIONS * region_bytes)
        self.register = Register(
            mooncake_session_id=f"{HOST}:{next(_ports)}", epoch=0, incarnation=new_id(), server=self.server, rank=0,
            size=1, blocks_per_region=BLOCKS_PER_REGION, regions=REGIONS,
            memory=ShmMemory(segment=self._segment.name, nonce=self._segment.nonce, writer_slot=0),
            **common,
        )  # fmt: skip
        self.knowledge = Knowledge(
            self.register.mooncake_session_id, self.register.incarnation, blocks=REGIONS * BLOCKS_PER_REGION,
            register=self.register if registers else None,
        )  # fmt: skip
        self._registers = registers
        self._context, self._address, self._key = context, address, key
        self._socket = self._connect()

    def _connect(self) -> zmq.Socket[Any]:
        dealer = self._context.socket(zmq.DEALER)
        if self._key is not None:
            self._key.secure_client(dealer)
        for option, value in (
            (zmq.LINGER, 0), (zmq.SNDHWM, 100), (zmq.RCVHWM, 100), (zmq.SNDTIMEO, _TRY_MS),
        ):  # fmt: skip
            dealer.setsockopt(option, value)
        dealer.connect(self._address)
        if self._registers:
            dealer.send(encode(self.register))
        return dealer

    def reconnect(self) -> None:
        self._socket.close(0)
        self._socket = self._connect()

    def send(self, parts: Parts) -> None:
        """Waits until the encoder takes it. Raises Stuck where it does not, on a new connection neither."""
        for _ in range(STUCK_MS // _TRY_MS):
            try:
                self._socket.send_multipart(parts)
                return
            except zmq.Again:
                # libzmq here does not notice that the encoder has closed the connection as long as answers wait.
                if not self.read():
                    self.reconnect()
        raise Stuck("the encoder takes no frames any more")

    def read(self) -> int:
        """Throw away what was answered, where this one reads at all. Returns how many frames that were."""
        count = 0
        if not self._reads:
            return 0
        with contextlib.suppress(zmq.Again):
            while count < _MOST_READ:
                self._socket.recv_multipart(zmq.NOBLOCK)
                count += 1
        return count

    def close(self) -> None:
        self._socket.close(0)
        self._segment.close()


class MaliciousEncoder:
    """An encoder's end: the bootstrap route and the socket that a language process is sent to."""

    def __init__(self, context: zmq.Context[Any], key: DeploymentKey | None) -> None:
        """``context`` answers for CURVE by itself: whoever knows the public half gets in here."""
        self.knowledge = Knowledge(incarnation=new_id())
        self._socket = context.socket(zmq.ROUTER)
        if key is not None:
            key.secure_server(self._socket)
        for option, value in (
            (zmq.LINGER, 0), (zmq.SNDHWM, 100), (zmq.SNDTIMEO, _TRY_MS), (zmq.ROUTER_MANDATORY, 1),
        ):  # fmt: skip
            self._socket.setsockopt(option, value)
        self.port = self._socket.bind_to_random_port(f"tcp://{HOST}")
        info = BootstrapInfo(PROTOCOL_VERSION, [Worker(self.knowledge.incarnation, self.port)])
        self._bootstrap = StandaloneBootstrap(HOST, 0, lambda: (info, key))
        self.url = self._bootstrap.url
        self._peer = b""

    def read(self) -> list[Message]:
        """What the language process said; registrations are granted at once."""
        said: list[Message] = []
        while True:
            try:
                peer, batch = self._socket.recv_multipart(zmq.NOBLOCK)
                messages = [decode_from_language(frame, 1 << 20) for frame in frames_in(batch)]
            except zmq.Again:
                return said
            except (ProtocolError, ValueError) as error:
                raise AssertionError(f"the language process sends nonsense: {error}") from None
            self._peer = peer
            said += messages
            for message in messages:
                if isinstance(message, Register):
                    self.knowledge.session = message.mooncake_session_id
                    self.send_message(
                        Registered(
                            mooncake_session_id=message.mooncake_session_id,
                            epoch=message.epoch,
                            incarnation=self.knowledge.incarnation,
                        )
                    )

    def beat(self) -> None:
        self.send_message(Heartbeat(incarnation=self.knowledge.incarnation))

    def send_message(self, message: Message) -> bool:
        return self.send([encode(message)])

    def send(self, parts: Parts) -> bool:
        """False where the language process is not connected at this moment."""
        if not self._peer:
            return False
        for _ in range(STUCK_MS // _TRY_MS):
            try:
                self._socket.send_multipart([self._peer, *parts])
                return True
            except zmq.Again:
                # libzmq here keeps the place of a connection that is closed as long as something of it is not read.
                self.read()
            except zmq.ZMQError:  # it closed the connection, and comes back with another name
                self._peer = b""
                return False
        raise Stuck("the language process takes no frames any more")

    def wait_connected(self) -> None:
        """Until the language process has registered (again)."""
        wait_for(lambda: self.read() and self._peer, "the language process registers with the malicious encoder")

    def close(self) -> None:
        self._socket.close(0)
        self._bootstrap.close()


class Strangers:
    """Whoever has no key, or speaks no protocol: at the control port and at the bootstrap route."""

    def __init__(self, dice: random.Random, control_port: int, http_port: int) -> None:
        self._dice = dice
        self._control_port = control_port
        self._http_port = http_port

    def garbage(self) -> None:
        """Bytes at one of the two ports."""
        port = self._dice.choice((self._control_port, self._http_port))
        greeting = b"\xff\0\0\0\0\0\0\0\x01\x7f\x03" if self._dice.random() < 0.3 else b""
        with contextlib.suppress(OSError), socket.create_connection((HOST, port), timeout=5) as connection:
            connection.sendall(greeting + self._dice.randbytes(self._dice.randrange(3000)))
            if self._dice.random() < 0.5:
                connection.settimeout(0.01)
                connection.recv(1000)

    def request(self) -> None:
        """An HTTP request that should not be made."""
        dice = self._dice
        method = dice.choice(("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "BREW"))
        query = ROUTE + "?" + "q" * dice.randrange(2000)
        target = dice.choice((ROUTE, ROUTE, ROUTE + "/", query, "/", "/../x", "/%00"))
        headers = {}
        if dice.random() < 0.7:
            headers[NONCE] = dice.choice(("", "0" * 32, "n" * dice.randrange(60_000), "\xff\xfe"))
        if dice.random() < 0.7:
            headers[SIGNATURE] = dice.choice(("", "0" * 128, "s" * dice.randrange(60_000), "\xff\xfe"))
        if dice.random() < 0.3:
            headers["Content-Length"] = dice.choice(("-1", "99999999999", "x"))
        connection = http.client.HTTPConnection(HOST, self._http_port, timeout=5)
        try:
            connection.putrequest(method, target, skip_accept_encoding=True)
            for name, value in headers.items():
                connection.putheader(name, value)
            connection.endheaders()
            if "Content-Length" not in headers:
                connection.getresponse().read()
        except (OSError, http.client.HTTPException):
            pass  # refused in one way or another
        finally:
            connection.close()


def keyless_frames(frames: Frames, address: str, context: zmq.Context[Any], count: int) -> None:
    """A stranger's DEALER, without the key."""
    dealer = context.socket(zmq.DEALER)
    dealer.setsockopt(zmq.LINGER, 0)
    dealer.setsockopt(zmq.SNDHWM, count)
    dealer.connect(address)
    with contextlib.suppress(zmq.Again):
        for _ in range(count):
            dealer.send_multipart(frames.to_encoder(), zmq.NOBLOCK)
    dealer.close(50)


def known_to(register: Register) -> dict[str, Any]:
    """The fields of ``register`` that are the deployment's, not the process's."""
    names = (
        "block_size", "block_bytes", "row_bytes", "dtype", "checksum", "max_frame_bytes", "max_metadata_bytes",
    )  # fmt: skip
    fields = msgspec.structs.asdict(register)
    return {name: fields[name] for name in names}
