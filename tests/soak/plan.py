"""What each room of a soak is: its pair of processes, its size, whether somebody gives it up, and when.

Every process computes it from the seed and the room's number, so nobody has to tell anybody about a room.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from tests.connector.payload import Part

ENCODERS = LANGUAGES = 2
# A pool of 1024 rows, and so many rooms under way that it is short nearly always.
BLOCKS, BLOCK_SIZE, WIDTH = 64, 16, 64
POOL_TOKENS = BLOCKS * BLOCK_SIZE
UNDER_WAY = 24
SMALL = 32
# Room by room, by weight: at most SMALL rows, up to 600, and more than the whole pool.
SIZES = ((60, (1, SMALL)), (36, (SMALL + 1, 600)), (4, (POOL_TOKENS + 1, 3 * POOL_TOKENS)))
ABORTED = 0.1
LATEST_ABORT_SECONDS = 0.15

Moment = Literal["", "language", "encoder before announcing", "encoder before sending", "encoder later"]
ENCODER_MOMENTS: tuple[Moment, ...] = ("encoder before announcing", "encoder before sending", "encoder later")


@dataclass(frozen=True)
class Room:
    """One room. ``aborted`` says by whom and when ("": by nobody); ``delay`` is for those that are aborted later."""

    number: int
    encoder: int
    language: int
    part: Part
    aborted: Moment
    delay: float

    @property
    def size(self) -> str:
        if self.part.tokens <= SMALL:
            return "small"
        return "larger than the pool" if self.part.tokens > POOL_TOKENS else "medium"


@dataclass(frozen=True)
class Plan:
    """All rooms of one soak; ``servers``: the incarnation of each language server. ``shift`` makes other bytes."""

    seed: str
    rooms: int
    servers: tuple[str, ...]
    timeout: float
    shift: int = 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def room(self, number: int) -> Room:
        dice = random.Random(f"{self.seed} {number}")
        pair = number % (ENCODERS * LANGUAGES)
        encoder, language = pair % ENCODERS, pair // ENCODERS
        ((low, high),) = dice.choices([sizes for _, sizes in SIZES], [weight for weight, _ in SIZES])
        tokens = dice.randint(low, high)
        aborted: Moment = ""
        if dice.random() < ABORTED:
            aborted = "language" if dice.random() < 0.5 else dice.choice(ENCODER_MOMENTS)
        name = f"{self.servers[language]}-{number:016x}_local_part_0"
        part = Part(name, tokens, WIDTH, number + 1 + self.shift, metadata=True)
        # Squared, so that many come at once and some late.
        return Room(number, encoder, language, part, aborted, LATEST_ABORT_SECONDS * dice.random() ** 2)

    def of(self, *, encoder: int | None = None, language: int | None = None) -> Iterator[Room]:
        """In order, those of one encoder, of one language server, or of a pair."""
        pairs = [
            pair
            for pair in range(ENCODERS * LANGUAGES)
            if encoder in (None, pair % ENCODERS) and language in (None, pair // ENCODERS)
        ]
        for start in range(0, self.rooms, ENCODERS * LANGUAGES):
            for pair in pairs:
                if start + pair < self.rooms:
                    yield self.room(start + pair)
