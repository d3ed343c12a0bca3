"""The processes that faults are tried on: an encoder and a language process to hurt, and a second one of each."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sglang_mm_conn.control.authentication import generate
from tests.connector.processes import HOST, PATIENCE, Child, Encoder, Language, World, Zygote, wait_for
from tests.faults.baseline import Holdings, Segments
from tests.faults.network import Cable
from tests.faults.traffic import SIZES, Route, one_room

# Seconds. A short fault is shorter than the silence that makes a peer lost, a long one longer than the deadline.
DEADLINE = 5.0
PEER_TIMEOUT = 2.5
CLAIM_TIMEOUT = 2.0
DOUBT_SECONDS = 1.0
FIRST_OFFER = 1024
SETTINGS: dict[str, Any] = {
    "blocks": 256,
    "block_size": 64,
    "first_offer": FIRST_OFFER,
    "peer_timeout": PEER_TIMEOUT,
    "claim_timeout": CLAIM_TIMEOUT,
    "doubt_patience": DOUBT_SECONDS,
    "checksum": False,  # the bytes are compared here: a checksum would hide wrong ones behind an error
}
# As short as Mooncake allows; its own are 30 s.
MOONCAKE_TIMEOUTS = {
    "MC_TCP_STATUS_TIMEOUT_SEC": "5", "MC_TCP_PROGRESS_TIMEOUT_SEC": "5", "MC_TRANSFER_TIMEOUT": "5",
}  # fmt: skip
ENCODER_TABLES = ("rooms", "sources", "listeners", "queued")
LANGUAGE_TABLES = ("rooms", "results", "labels", "unclaimed", "quarantine", "held", "quarantined")
_cables_lock = threading.Lock()


class Ground:
    """Victims and bystanders on one data path. Without a cable everybody is on loopback and knows everybody; with one,
    encoder and ``other_language`` are at one end of it, ``language`` and ``other_encoder`` at the other."""

    def __init__(self, zygote: Zygote, path: str, directory: Path, *, with_cable: bool = False) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.directory = directory
        self.cable: Cable | None = None
        if with_cable:
            with _cables_lock:
                self.cable = Cable()
        self._key = directory / "key"
        generate(str(self._key))
        self.world = World(zygote, path, directory)
        self.segments = Segments()
        self._before: dict[Child, Holdings] = {}
        self._vanished: dict[Child, int] = {}
        self._dead_segments: list[str] = []
        try:
            self.encoder = self._encoder(0)
            self.other_encoder = self._encoder(1)
            self.language = self._language(1)
            self.other_language = self._language(0)
            self._warm_up()
        except BaseException:
            self.close()
            raise

    # -- who is there ----------------------------------------------------------------------------------------------

    def _place(self, side: int) -> dict[str, Any]:
        if self.cable is None:
            return {"host": HOST}
        place = self.cable.sides[side]
        return {"host": place.address, "network": place.path, "key_file": str(self._key)}

    def _encoder(self, side: int, port: int = 0) -> Encoder:
        return self.world.encoder(
            port=port, send_timeout=DEADLINE, env=MOONCAKE_TIMEOUTS, **self._place(side), **SETTINGS
        )

    def _language(self, side: int) -> Language:
        return self.world.language(env=MOONCAKE_TIMEOUTS, **self._place(side), **SETTINGS)

    @property
    def encoders(self) -> tuple[Encoder, Encoder]:
        return self.encoder, self.other_encoder

    @property
    def languages(self) -> tuple[Language, Language]:
        return self.language, self.other_language

    @property
    def children(self) -> tuple[Child, ...]:
        return (*self.encoders, *self.languages)

    def pairs(self) -> list[tuple[Encoder, Language]]:
        """Who sends to whom. Nothing but the victims' own rooms crosses the cable."""
        every = [(encoder, language) for encoder in self.encoders for language in self.languages]
        if self.cable is not None:
            every.remove((self.other_encoder, self.other_language))
        return every

    def bystanders(self, hurt: str) -> list[tuple[Encoder, Language]]:
        """Pairs that a fault of ``hurt`` ("encoder", "language", "network") does not touch."""
        pairs = [pair for pair in self.pairs() if pair != (self.encoder, self.language)]
        return pairs if hurt == "network" else [pair for pair in pairs if getattr(self, hurt) not in pair]

    # -- what happens to them --------------------------------------------------------------------------------------

    def kill(self, role: str) -> None:
        """Kill the victim of this role; ``replace`` must follow."""
        victim: Child = getattr(self, role)
        victim.kill()
        if role == "language" and victim.hello["segment"]:
            self._dead_segments.append(victim.hello["segment"])
        for child in self.children:
            self._vanished[child] = self._vanished.get(child, 0) + 1

    def replace(self, role: str, *, same_port: bool = False) -> None:
        """Start another one in place of the killed victim, on its port or on another."""
        old: Child = getattr(self, role)
        if role == "encoder":
            port = self.encoder.port if same_port else 0
            self.encoder = self._encoder(0, port)
            for _, language in (pair for pair in self.pairs() if pair[0] is self.encoder):
                language.use(self.encoder)
        else:
            self.language = self._language(1)
            for encoder, _ in (pair for pair in self.pairs() if pair[1] is self.language):
                self.language.use(encoder)
        self.world.end(old)
        self._before.pop(old, None)
        self._vanished.pop(old, None)
        problems = self.segments.problems(self._living_segments(), self._dead_segments)
        assert not problems, "; ".join(problems)
        self._dead_segments.clear()

    def _living_segments(self) -> list[str]:
        return [language.hello["segment"] for language in self.languages if language.hello["segment"]]

    @contextmanager
    def traffic(self, hurt: str) -> Iterator[list[Route]]:
        """Bystanders' rooms all the while. Raises AssertionError where one of them was hurt."""
        routes = [Route(self.world, *pair, DEADLINE) for pair in self.bystanders(hurt)]
        try:
            yield routes
        except BaseException:
            for route in routes:
                route.halt()
            raise
        for route in routes:
            route.stop()

    # -- back to where it was --------------------------------------------------------------------------------------

    def _warm_up(self) -> None:
        """First use of every pair; what a process holds then is what it may hold for the rest of its life."""
        for language in self.languages:
            for encoder in (pair[0] for pair in self.pairs() if pair[1] is language):
                language.use(encoder)
        self._wait_registered()
        for _ in range(2):
            for encoder, language in self.pairs():
                for tokens in SIZES:
                    one_room(self.world, encoder, language, tokens, PATIENCE)
        self._wait_empty()
        for child in self.children:
            if child not in self._before:
                self._before[child] = Holdings.of(child)
                self._vanished[child] = 0

    def _wait_registered(self) -> None:
        for encoder, language in self.pairs():
            language.wait_ready(encoder)

    def _wait_empty(self) -> None:
        for tables, children in ((ENCODER_TABLES, self.encoders), (LANGUAGE_TABLES, self.languages)):
            for child in children:

                def full(child: Child = child, tables: tuple[str, ...] = tables) -> dict[str, Any]:
                    stats = child.stats()
                    return {table: stats[table] for table in tables if stats[table]}

                try:
                    wait_for(lambda full=full: not full(), "tables are empty")  # type: ignore[misc]
                except AssertionError:
                    who = type(child).__name__.lower()
                    raise AssertionError(f"LEAK: left behind in the {who} process: {full()}") from None
        for language in self.languages:
            language.wait_all_free()

    def settle(self) -> None:
        """Everybody works with everybody again, and holds no more than at first. Raises AssertionError."""
        self._wait_registered()
        self._wait_empty()
        self._warm_up()
        for child in self.children:

            def growth(child: Child = child) -> list[str]:
                return Holdings.of(child).growth(
                    self._before[child], vanished=self._vanished[child], mooncake=self.path == "mooncake"
                )

            try:
                wait_for(lambda growth=growth: not growth(), "back at the baseline")  # type: ignore[misc]
            except AssertionError:
                who = f"{type(child).__name__.lower()} process {child.pid}"
                raise AssertionError(f"LEAK: {who} holds {'; '.join(growth())}") from None
        problems = self.segments.problems(self._living_segments(), ())
        assert not problems, "; ".join(problems)

    def close(self) -> None:
        self.world.close()
        self.segments.close()
        if self.cable is not None:
            self.cable.close()
