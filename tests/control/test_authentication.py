"""Only peers with the deployment's key talk: on control connections and on the bootstrap route."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import pytest
import requests

from sglang_mm_conn.control.addresses import UNKNOWN_ADDRESS
from sglang_mm_conn.control.authentication import DeploymentKey, NotAuthentic, generate, is_loopback
from sglang_mm_conn.control.bootstrap import NONCE, ROUTE, SIGNATURE, BootstrapInfo, Worker, look_up
from sglang_mm_conn.control.bootstrap_server import StandaloneBootstrap
from sglang_mm_conn.control.client import ControlClient
from sglang_mm_conn.control.server import ControlServer
from sglang_mm_conn.control.thread import ControlCallbacks
from sglang_mm_conn.core.errors import SettingError
from sglang_mm_conn.core.messages import PROTOCOL_VERSION

INFO = BootstrapInfo(PROTOCOL_VERSION, [Worker("0123456789abcdef", 4711)])


def _key(path: Path) -> DeploymentKey:
    generate(str(path))
    return DeploymentKey.load(str(path))


@pytest.fixture
def key(tmp_path: Path) -> DeploymentKey:
    return _key(tmp_path / "key")


@pytest.fixture
def other_key(tmp_path: Path) -> DeploymentKey:
    return _key(tmp_path / "other")


def _wait(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "waited 10 s"
        time.sleep(0.01)


@dataclass
class Echo:
    """A control server that answers every frame."""

    key: DeploymentKey | None
    got: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.server = ControlServer(
            "127.0.0.1", ControlCallbacks(self._answer, lambda: None, 0.05), key=self.key, max_frame_bytes=1 << 16
        )
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()

    def _answer(self, peer: str, frame: bytes) -> None:
        self.got.append(frame)
        self.server.send(peer, b"re: " + frame)


@dataclass
class Visitor:
    """A control client that says hello whenever it is connected."""

    key: DeploymentKey | None
    port: int
    heard: list[bytes] = field(default_factory=list)
    refused: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        callbacks = ControlCallbacks(
            on_frame=lambda _, frame: self.heard.append(frame),
            on_tick=lambda: None,
            tick_seconds=0.05,
            on_connected=lambda name: self.client.send(name, b"hello"),
            on_disconnected=lambda _: self.refused.set(),
        )
        self.client = ControlClient(callbacks, key=self.key, max_frame_bytes=1 << 16)
        self.client.connect("encoder", f"tcp://127.0.0.1:{self.port}")
        self.thread = threading.Thread(target=self.client.run)
        self.thread.start()


@pytest.fixture
def echo(key: DeploymentKey) -> Iterator[Echo]:
    echo = Echo(key)
    yield echo
    echo.server.stop()
    echo.thread.join(10)


@pytest.fixture
def visit(echo: Echo) -> Iterator[Callable[[DeploymentKey | None], Visitor]]:
    visitors: list[Visitor] = []

    def make(key: DeploymentKey | None) -> Visitor:
        visitors.append(Visitor(key, echo.server.port))
        return visitors[-1]

    yield make
    for visitor in visitors:
        visitor.client.stop()
        visitor.thread.join(10)


def test_a_peer_with_the_key_talks(
    echo: Echo, visit: Callable[[DeploymentKey | None], Visitor], key: DeploymentKey
) -> None:
    friend = visit(key)
    _wait(lambda: friend.heard == [b"re: hello"])


@pytest.mark.parametrize("stranger", ["another key", "no key", "the public half only"])
def test_a_stranger_is_refused_and_logged_once_with_its_address_while_friends_talk(
    stranger: str,
    echo: Echo,
    visit: Callable[[DeploymentKey | None], Visitor],
    key: DeploymentKey,
    other_key: DeploymentKey,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if stranger == "the public half only":  # it can reach the server, which must still not admit it

        class Thief(DeploymentKey):
            @property
            def public(self) -> bytes:
                return other_key.public

        thief = Thief(other_key.secret)
        object.__setattr__(
            thief, "secure_client",
            lambda socket: (
                socket.__setattr__("curve_secretkey", other_key.secret),
                socket.__setattr__("curve_publickey", other_key.public),
                socket.__setattr__("curve_serverkey", key.public),
            ),
        )  # fmt: skip
        shown: DeploymentKey | None = thief
    else:
        shown = other_key if stranger == "another key" else None
    with caplog.at_level(logging.WARNING):
        visitor = visit(shown)
        _wait(visitor.refused.is_set)
        friend = visit(key)
        _wait(lambda: friend.heard == [b"re: hello"])
        _wait(lambda: " refused: " in caplog.text)
        again = visit(shown)
        _wait(again.refused.is_set)
    assert not visitor.heard and not again.heard and echo.got == [b"hello"]
    refusals = [record for record in caplog.records if " refused: " in record.getMessage()]
    addresses = [cast("tuple[str, ...]", refusal.args)[0] for refusal in refusals]
    assert len(set(addresses)) == len(addresses) and set(addresses) <= {"127.0.0.1", UNKNOWN_ADDRESS}
    if stranger == "the public half only":  # libzmq asks about it, and says who it is
        assert addresses == ["127.0.0.1"]


def test_garbage_on_the_control_port_hurts_nobody(
    echo: Echo, visit: Callable[[DeploymentKey | None], Visitor], key: DeploymentKey
) -> None:
    import socket

    for garbage in (b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 5000, b""):
        with socket.create_connection(("127.0.0.1", echo.server.port)) as connection:
            connection.sendall(garbage)
    friend = visit(key)
    _wait(lambda: friend.heard == [b"re: hello"])


def test_the_route_answers_only_who_proves_the_key(key: DeploymentKey, other_key: DeploymentKey) -> None:
    server = StandaloneBootstrap("127.0.0.1", 0, lambda: (INFO, key))
    try:
        assert look_up(server.url, key) == INFO
        for wrong in (None, other_key):
            with pytest.raises(NotAuthentic, match="SGLANG_MM_CONN_KEY_FILE"):
                look_up(server.url, wrong)
        signature = key.sign("bootstrap ask", b"nonce-1")
        answer = requests.get(server.url + ROUTE, headers={NONCE: "nonce-2", SIGNATURE: signature}, timeout=5)
        assert answer.status_code == 401 and b"4711" not in answer.content
    finally:
        server.close()


def test_an_encoder_without_the_key_is_not_believed(key: DeploymentKey, other_key: DeploymentKey) -> None:
    for impostor in (None, other_key):
        server = StandaloneBootstrap("127.0.0.1", 0, lambda impostor=impostor: (INFO, impostor))  # type: ignore[misc]
        try:
            with pytest.raises(NotAuthentic):
                look_up(server.url, key)
        finally:
            server.close()


def test_beyond_loopback_a_key_is_needed_or_the_word_insecure() -> None:
    with pytest.raises(NotAuthentic, match="SGLANG_MM_CONN_INSECURE=1"):
        look_up("http://192.0.2.1:9")
    assert is_loopback("127.0.0.1") and is_loopback("::1") and is_loopback("localhost") and is_loopback("127.8.8.8")
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org", "", None):
        assert not is_loopback(host), host


def test_key_files_are_private_whole_and_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "key"
    key = _key(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert key.secret.decode() not in repr(key)
    with pytest.raises(FileExistsError):
        generate(str(path))
    path.chmod(0o644)
    with pytest.raises(SettingError, match="chmod 600"):
        DeploymentKey.load(str(path))
    path.chmod(0o600)
    for text in ("", "short", "x" * 41, '"' * 40):
        path.write_text(text)
        with pytest.raises(SettingError, match="holds no key"):
            DeploymentKey.load(str(path))
    with pytest.raises(SettingError, match="cannot be read"):
        DeploymentKey.load(str(tmp_path / "missing"))
