"""Control connections between simulated processes: frames in order on each, but held back, lost, late, said twice.

The two classes at the end stand in for control.client.ControlClient and control.server.ControlServer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from sglang_mm_conn.control.thread import ControlCallbacks
from tests.simulator.scheduler import Kernel, Lane, Process

Pair = tuple[str, str]  # names of the client's and the server's process


class Connection:
    """One DEALER's way to the ROUTER. A reconnect makes another; frames of this one may still arrive after that."""

    def __init__(self, network: Network, client: SimulatedClient, key: str, server: SimulatedServer, peer: str) -> None:
        self.client = client
        self.key = key
        self.server = server
        self.peer = peer
        self.up = True
        self.to_server: Lane = network.kernel.lane(server.process)
        self.to_client: Lane = network.kernel.lane(client.process)

    @property
    def pair(self) -> Pair:
        return self.client.process.name, self.server.process.name


class Network:
    """Which processes reach each other, and what is between them."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.servers: dict[str, SimulatedServer] = {}  # by address
        self.connections: list[Connection] = []
        self.obstructed: set[Pair] = set()
        self.left_to_servers = 0  # pieces of work that another thread left to a server's
        self._peers = 0
        self._waiting: list[Lane] = []
        # What becomes of a frame that is sent: (connection, frame, to_server). The schedule changes it.
        self.carry: Callable[[Connection, bytes, bool], None] = self.deliver

    def reaches(self, client: Process, server: Process) -> bool:
        """Whether a new connection (or request, or data) gets through now."""
        return (client.name, server.name) not in self.obstructed and server.runs

    def establish(self, client: SimulatedClient, key: str, address: str) -> None:
        """The connection comes about as soon as it can; the client hears of it."""
        lane = self.kernel.lane(client.process)

        def attempt() -> None:
            server = self.servers.get(address)
            if client.links.get(key) is not link or server is None or server.process.dead:
                self.kernel.lanes.remove(lane)  # given up, or nobody will ever listen there again
            elif not self.reaches(client.process, server.process):
                self.kernel.put(lane, attempt)
                lane.blocked = True
                self._waiting.append(lane)
            else:
                self.kernel.lanes.remove(lane)
                self._peers += 1
                link.connection = connection = Connection(self, client, key, server, f"{self._peers:010x}")
                server.peers[connection.peer] = connection
                self.connections.append(connection)
                self.kernel.note(f"{client.process.name} connects to {server.process.name} as {connection.peer}")
                client.call(lambda: client.callbacks.on_connected(key))

        link = client.links[key]
        self.kernel.put(lane, attempt)

    def try_again(self) -> None:
        """Connections that could not be made are tried anew."""
        for lane in self._waiting:
            lane.blocked = False
        self._waiting.clear()

    def send(self, connection: Connection, frame: bytes, *, to_server: bool) -> None:
        """A frame leaves. Lost where the connection is down."""
        if connection.up:
            self.carry(connection, frame, to_server)

    def deliver(self, connection: Connection, frame: bytes, to_server: bool) -> None:
        """It will arrive, after what was sent before."""
        if to_server:
            self.kernel.put(connection.to_server, partial(connection.server.callbacks.on_frame, connection.peer, frame))
        else:
            self.kernel.put(connection.to_client, partial(connection.client.receive, connection, frame))

    def obstruct(self, pair: Pair) -> None:
        """Nothing gets through between the two; connections stay, what they carry is held back."""
        self.obstructed.add(pair)
        self._block(pair)

    def clear(self, pair: Pair) -> None:
        self.obstructed.discard(pair)
        self._block(pair)

    def _block(self, pair: Pair) -> None:
        for connection in self.connections:
            if connection.pair == pair:
                connection.to_server.blocked = connection.to_client.blocked = pair in self.obstructed

    def cut(self, pair: Pair) -> None:
        """Every connection of the two breaks. Of what is on its way a first part may have arrived."""
        for connection in [one for one in self.connections if one.pair == pair]:
            self.end(connection)

    def end(self, connection: Connection) -> None:
        self.connections.remove(connection)
        connection.up = False
        for lane in (connection.to_server, connection.to_client):
            keep = 0 if lane.blocked else self.kernel.chance.randint(0, len(lane.items))
            while len(lane.items) > keep:
                lane.items.pop()
            lane.blocked = False
        connection.client.broken(connection)

    def process_ended(self, process: Process) -> None:
        """The kernel of its host closes its connections."""
        for connection in [one for one in self.connections if process in (one.client.process, one.server.process)]:
            self.end(connection)


class _Link:
    """The client's end of whatever connection it has now."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.connection: Connection | None = None


class SimulatedClient:
    """A ControlClient whose thread is a lane."""

    def __init__(self, network: Network, process: Process, callbacks: ControlCallbacks) -> None:
        self.network = network
        self.process = process
        self.callbacks = callbacks
        self.links: dict[str, _Link] = {}
        self._thread = network.kernel.lane(process)

    def call(self, work: Callable[[], None]) -> None:
        self.network.kernel.put(self._thread, work)

    def connect(self, key: str, address: str) -> None:
        self.call(lambda: self._connect(key, address))

    def disconnect(self, key: str) -> None:
        self.call(lambda: self._disconnect(key))

    def send(self, key: str, frame: bytes) -> None:
        self.call(lambda: self._send(key, frame))

    def _connect(self, key: str, address: str) -> None:
        self._disconnect(key)
        self.links[key] = _Link(address)
        self.network.establish(self, key, address)

    def _disconnect(self, key: str) -> None:
        link = self.links.pop(key, None)
        if link is not None and link.connection is not None:
            # What it has sent may still arrive; what it was sent is gone.
            link.connection.up = False
            link.connection.to_client.items.clear()
            self.network.connections.remove(link.connection)

    def _send(self, key: str, frame: bytes) -> None:
        link = self.links.get(key)
        if link is not None and link.connection is not None:
            self.network.send(link.connection, frame, to_server=True)

    def receive(self, connection: Connection, frame: bytes) -> None:
        """A frame arrives; also one of a connection that broke since, as long as the link is the same."""
        if connection.key in self.links:
            self.callbacks.on_frame(connection.key, frame)

    def broken(self, connection: Connection) -> None:
        link = self.links.get(connection.key)
        if link is not None and link.connection is connection:
            link.connection = None
            self.call(lambda: self.callbacks.on_disconnected(connection.key))
            self.network.establish(self, connection.key, link.address)

    def run(self) -> None:
        """Driven by the kernel."""

    def stop(self) -> None:
        """Nothing to stop."""


class SimulatedServer:
    """A ControlServer whose thread is a lane, for what it is called to do."""

    def __init__(self, network: Network, process: Process, port: int, callbacks: ControlCallbacks) -> None:
        self.network = network
        self.process = process
        self.port = port
        self.callbacks = callbacks
        self.peers: dict[str, Connection] = {}
        self._thread = network.kernel.lane(process)
        network.servers[f"tcp://encoder:{port}"] = self

    def call(self, work: Callable[[], None]) -> None:
        self.network.left_to_servers += 1
        self.network.kernel.put(self._thread, work)

    def send(self, peer: str, frame: bytes) -> None:
        connection = self.peers.get(peer)
        if connection is not None:
            self.network.send(connection, frame, to_server=False)

    def run(self) -> None:
        """Driven by the kernel."""

    def stop(self) -> None:
        """Nothing to stop."""
