"""Simulated shared segments, engines and links: where written bytes land, late ones too, and who owns what they hit."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from sglang_mm_conn.connector.encoder.transfer import DataCall
from sglang_mm_conn.core.errors import DataPathUnavailable, WriterSlotTaken
from sglang_mm_conn.core.layout import Extent, Geometry
from sglang_mm_conn.core.messages import Memory, MooncakeMemory, ShmMemory
from tests.simulator.scheduler import Process, Violation

if TYPE_CHECKING:
    from tests.simulator.processes import EncoderProcess, LanguageProcess


class SimulatedSegment:
    """Stands in for memory.segment.Segment: a name, and a writer's lock for each slot."""

    def __init__(self, owner: LanguageProcess, name: str) -> None:
        self.owner = owner
        self.name = self.nonce = name
        self.locks: dict[int, Process] = {}

    def retire_writer(self, slot: int) -> bool:
        holder = self.locks.get(slot)
        if holder is None or holder.dead:
            self.locks[slot] = self.owner
        return self.locks[slot] is self.owner

    def close(self) -> None:
        """It ends with its owner."""


class SimulatedEngine:
    """A Mooncake engine of a language process: leads into its pool as long as it exists."""

    def __init__(
        self, owner: LanguageProcess, port: int, engines_by_target: dict[str, weakref.ref[SimulatedEngine]]
    ) -> None:
        self.owner = owner
        self._port = port
        engines_by_target[f"10.0.0.9:{port}"] = weakref.ref(self)
        owner.world.owners_by_target[f"10.0.0.9:{port}"] = owner

    def get_rpc_port(self) -> int:
        return self._port

    def register_memory(self, address: int, length: int) -> int:
        return 0


class SimulatedLink:
    """What an encoder process writes through. The kernel of the simulation does the writing."""

    def __init__(self, memory: ShmMemory | MooncakeMemory, encoder: EncoderProcess, target: LanguageProcess) -> None:
        self.name = memory.path
        self.synchronous = isinstance(memory, ShmMemory)
        self.encoder = encoder
        self.memory = memory
        self.target = target
        self.calls = 0

    def write(self, source: torch.Tensor, extents: Sequence[Extent]) -> None:
        raise Violation("the simulation writes piece by piece")

    @property
    def leads_in(self) -> bool:
        """Whether bytes written through it can land."""
        if self.target.dead:
            return False
        memory = self.memory
        return isinstance(memory, ShmMemory) or self.target.world.engines_by_target[memory.target]() is not None

    def close(self) -> None:
        if self.calls and not self.encoder.world.over:
            raise Violation("a link is closed in mid-write")
        segment, memory = self.target.segment, self.memory
        if isinstance(memory, ShmMemory) and segment.locks.get(memory.writer_slot) is self.encoder:
            del segment.locks[memory.writer_slot]


class SimulatedPath:
    """Stands in for one of the data paths of an encoder process."""

    def __init__(self, name: str, encoder: EncoderProcess) -> None:
        self.name = name
        self._encoder = encoder

    def open(self, memory: Memory, geometry: Geometry, incarnation: str) -> SimulatedLink:
        world = self._encoder.world
        if isinstance(memory, MooncakeMemory):
            return SimulatedLink(memory, self._encoder, world.owners_by_target[memory.target])
        assert isinstance(memory, ShmMemory)
        segment = world.segments.get(memory.segment)
        if segment is None or segment.owner.dead or segment.owner.host != self._encoder.host:
            raise DataPathUnavailable(f"segment {memory.segment} cannot be opened here")
        holder = segment.locks.get(memory.writer_slot)
        if holder is not None and not holder.dead:
            raise WriterSlotTaken(f"writer slot {memory.writer_slot} is taken")
        segment.locks[memory.writer_slot] = self._encoder
        return SimulatedLink(memory, self._encoder, segment.owner)

    def close(self) -> None:
        """Nothing is held besides the links."""


class Write:
    """A data call under way, or what is left of one: its pieces land one by one."""

    def __init__(self, call: DataCall, encoder: EncoderProcess, queue: int) -> None:
        assert isinstance(call.link, SimulatedLink)
        self.call = call
        self.encoder = encoder
        self.queue = queue
        self.link = call.link
        self.link.calls += 1
        self.room = call.write.room
        self.window = call.write.window
        self.over = False  # the data call has returned; bytes that land now are late
        source, extents = call.source.rows, call.extents()
        # Mooncake: rows leave through staging memory, which is filled before the engine is called.
        self._source = source if self.link.synchronous else source.clone()
        self.pieces: deque[Extent] = deque()
        for extent in extents:
            half = extent.length // 2
            self.pieces.append(Extent(extent.region, extent.offset, half, extent.start))
            self.pieces.append(Extent(extent.region, extent.offset + half, extent.length - half, extent.start + half))

    def land(self) -> None:
        """The next piece lands; P2 is that it hits nobody else's block."""
        piece = self.pieces.popleft()
        if not self.link.leads_in or not piece.length:
            return
        if not self.over and self.room not in self.encoder.endpoint._sources:
            raise Violation(f"the source of {self.room} was released while window {self.window} is being written")
        target = self.link.target
        geometry = target.endpoint.pool.geometry
        allocator = target.endpoint.core.allocator
        first = piece.region * geometry.blocks_per_region + piece.offset // geometry.block_bytes
        last = piece.region * geometry.blocks_per_region + (piece.offset + piece.length - 1) // geometry.block_bytes
        for block in range(first, last + 1):
            owner = allocator._held.get(block, allocator._quarantined.get(block))
            if owner != (self.room, self.window):
                raise Violation(
                    f"a {'late' if self.over else 'current'} write of window {self.window} of {self.room} "
                    f"landed in block {block} of {target.name}, which is {owner}'s"
                )
        bytes_ = self._source[piece.start : piece.start + piece.length]
        target.endpoint.pool.regions[piece.region][piece.offset : piece.offset + piece.length].copy_(bytes_)

    def returned(self) -> None:
        self.over = True
        self.link.calls -= 1


def content(number: int, nbytes: int) -> torch.Tensor:
    """The embedding of part ``number``, uint8: no two have the same byte at the same place."""
    positions = torch.arange(nbytes, dtype=torch.int64)
    return ((positions * 7 + number * 31 + positions // 256 * 13) % 251).to(torch.uint8)
