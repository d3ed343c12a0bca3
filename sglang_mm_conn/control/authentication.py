"""Owns the deployment's key: which peers may open a control connection, and how both sides of a look-up prove the key.

Every server of a deployment has the same secret. On control connections both sides use it as their CURVE key pair, with
which libzmq encrypts and authenticates: a client needs the public half to reach the server at all, and the server
admits only a client that proves the secret half. On the bootstrap route each side adds a keyed hash to its message.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import os
import secrets
import stat
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import zmq
from zmq.utils import z85

from sglang_mm_conn.core.errors import ConnError, SettingError

logger = logging.getLogger(__name__)

_ZAP_ENDPOINT = "inproc://zeromq.zap.01"
_SECRET_CHARACTERS = 40
_REMEMBERED_ADDRESSES = 1024


class NotAuthentic(ConnError):
    """The peer did not prove that it has the deployment's key."""


def generate(path: str) -> None:
    """Write a new secret to ``path``, readable by its owner only. Raises FileExistsError if the file exists."""
    _, secret = zmq.curve_keypair()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(secret + b"\n")


@dataclass(frozen=True)
class DeploymentKey:
    """The secret and the keys that are derived from it. The secret never appears in a log."""

    secret: bytes = field(repr=False)

    @classmethod
    def load(cls, path: str) -> DeploymentKey:
        """Read a secret that ``generate`` wrote. Raises SettingError, which names the file and the fault."""
        try:
            mode = os.stat(path).st_mode
            with open(path, "rb") as file:
                text = file.read(256).strip()
        except OSError as error:
            raise SettingError(f"SGLANG_MM_CONN_KEY_FILE={path!r} cannot be read: {error.strerror}") from None
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise SettingError(
                f"SGLANG_MM_CONN_KEY_FILE={path!r} can be read by users other than its owner (mode {mode & 0o777:o}): "
                "chmod 600 it"
            )
        try:
            if len(text) != _SECRET_CHARACTERS or len(z85.decode(text)) != 32:
                raise ValueError
        except (ValueError, KeyError):
            raise SettingError(
                f"SGLANG_MM_CONN_KEY_FILE={path!r} holds no key: make one with python -m sglang_mm_conn keygen FILE"
            ) from None
        return cls(text)

    @property
    def public(self) -> bytes:
        return zmq.curve_public(self.secret)

    def secure_server(self, socket: zmq.Socket[Any]) -> None:
        """Set the key of a server's socket. Call this before ``bind``; the socket's context needs a ZapHandler."""
        socket.curve_secretkey = self.secret
        socket.curve_publickey = self.public
        socket.curve_server = True

    def secure_client(self, socket: zmq.Socket[Any]) -> None:
        """Set the key of a client's socket. Call this before ``connect``."""
        socket.curve_secretkey = self.secret
        socket.curve_publickey = self.public
        socket.curve_serverkey = self.public

    def sign(self, purpose: str, *parts: bytes) -> str:
        """A keyed hash over ``purpose`` and ``parts``, in hex."""
        digest = hashlib.blake2b(key=hashlib.sha256(self.secret).digest(), person=purpose.encode()[:16])
        for part in parts:
            digest.update(len(part).to_bytes(8, "big") + part)
        return digest.hexdigest()

    def verify(self, signature: str, purpose: str, *parts: bytes) -> None:
        """Check a result of ``sign`` in constant time. Raises NotAuthentic."""
        if not hmac.compare_digest(signature.encode("utf-8", "replace"), self.sign(purpose, *parts).encode()):
            raise NotAuthentic("the peer does not have this deployment's key (SGLANG_MM_CONN_KEY_FILE)")


def is_loopback(host: str | None) -> bool:
    """Whether ``host`` is localhost or a loopback address. Other names are not resolved and count as remote."""
    if host is None or host == "localhost":
        return host == "localhost"
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def new_nonce() -> str:
    return secrets.token_hex(16)


class RefusalLog:
    """Logs each refused address once, and forgets the oldest ones."""

    def __init__(self) -> None:
        self._seen: OrderedDict[str, None] = OrderedDict()

    def refused(self, address: str, reason: str) -> None:
        if address in self._seen:
            return
        self._seen[address] = None
        if len(self._seen) > _REMEMBERED_ADDRESSES:
            self._seen.popitem(last=False)
        logger.warning("Control connection from %s refused: %s", address, reason)


class ZapHandler:
    """Answers libzmq's requests whether to admit a CURVE client. The thread that owns the sockets calls ``serve``."""

    def __init__(self, context: zmq.Context[Any], key: DeploymentKey, refusals: RefusalLog) -> None:
        self.socket = context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.bind(_ZAP_ENDPOINT)
        self._admitted = z85.decode(key.public)
        self._refusals = refusals

    def serve(self) -> None:
        """Answer all waiting requests."""
        while True:
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            envelope, _, request = frames[0], frames[1], frames[2:]
            version, request_id, _domain, address, _identity, mechanism, *credentials = request
            admitted = mechanism == b"CURVE" and len(credentials) == 1 and hmac.compare_digest(
                credentials[0], self._admitted
            )  # fmt: skip
            if not admitted:
                self._refusals.refused(address.decode("ascii", "replace"), "it does not have this deployment's key")
            code, text = (b"200", b"OK") if admitted else (b"400", b"no")
            self.socket.send_multipart([envelope, b"", version, request_id, code, text, b"", b""])

    def close(self) -> None:
        self.socket.close()
