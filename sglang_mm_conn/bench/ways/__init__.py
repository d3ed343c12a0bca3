"""The ways by name. A connector's way takes variations: ``shm+key+windows``."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from http import HTTPStatus

from sglang_mm_conn.bench.ways.base import Config, Receiver, Sender

STOCK = ("zmq_to_scheduler", "mooncake_stock")
# Early Python 3.11 (Debian 12: 3.11.2) pickles an enum member as a call of getattr, which sglang's unpickler refuses:
# there its own transports drop every embedding.
STOCK_CANNOT_PICKLE = b"getattr" in pickle.dumps(HTTPStatus.OK)
CONNECTOR = ("shm", "mooncake")
VARIATIONS = ("key", "fragmented", "windows", "copied", "gpu_pool")
VARIATIONS_OF = {"shm": VARIATIONS[:-1], "mooncake": VARIATIONS, "bare": ("windows", "copied")}
ON_GPU = (*CONNECTOR, *STOCK, "memcpy")  # ways whose embeddings may begin and end on a GPU

TITLES = {
    "shm": "this connector, shared memory",
    "mooncake": "this connector, Mooncake over TCP",
    "zmq_to_scheduler": "sglang's own zmq_to_scheduler",
    "mooncake_stock": "sglang's own mooncake (over TCP, host memory)",
    "tcp": "raw TCP into a preallocated buffer",
    "bare": "the same copies and bare ZeroMQ messages",
    "memcpy": "one copy into warm shared memory",
    "engine": "the Mooncake engine's own write, best piece size",
}


@dataclass(frozen=True)
class Way:
    """One way with its variations."""

    base: str
    variations: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return "+".join((self.base, *self.variations))

    @property
    def title(self) -> str:
        return ", ".join((TITLES[self.base], *self.variations))

    def config(self, config: Config, key_file: str) -> Config:
        """``config`` with this way's variations."""
        pool = next((name for name in ("windows", "fragmented") if name in self.variations), "contiguous")
        return replace(
            config,
            key_file=key_file if "key" in self.variations else "",
            pool=pool,
            result="copied" if "copied" in self.variations else "default",
            pool_device="cuda" if "gpu_pool" in self.variations else "cpu",
        )


def parse(name: str) -> Way:
    """The way called ``name``. Raises ValueError saying what is wrong with it."""
    base, *variations = name.strip().split("+")
    if base not in TITLES:
        raise ValueError(f"{name!r}: no way is called {base!r}; there are {', '.join(TITLES)}")
    for variation in variations:
        if variation not in VARIATIONS:
            raise ValueError(f"{name!r}: {variation!r} is none of the variations {', '.join(VARIATIONS)}")
        if base not in VARIATIONS_OF:
            raise ValueError(f"{name!r}: only {', '.join(CONNECTOR)} and bare have variations")
        if variation not in VARIATIONS_OF[base]:
            raise ValueError(f"{name!r}: of {base} there are only the variations {' and '.join(VARIATIONS_OF[base])}")
    if {"fragmented", "windows"} <= set(variations):
        raise ValueError(f"{name!r}: a pool of an eighth of one embedding cannot be fragmented as well")
    return Way(base, tuple(item for item in VARIATIONS if item in variations))


def make_sender(way: str, config: Config) -> Sender:
    """The encoder's end. Imports only what the way needs."""
    if way in CONNECTOR:
        from sglang_mm_conn.bench.ways.connector import ConnectorSender

        return ConnectorSender(config, way)
    if way in STOCK:
        from sglang_mm_conn.bench.stock import StockSender

        return StockSender(config, way.removesuffix("_stock"))
    from sglang_mm_conn.bench.ways import bare, engine, memcpy, tcp

    plain: dict[str, Callable[[Config], Sender]] = {
        "bare": bare.BareSender, "tcp": tcp.TcpSender, "memcpy": memcpy.MemcpySender, "engine": engine.EngineSender,
    }  # fmt: skip
    return plain[way](config)


def make_receiver(way: str, config: Config) -> Receiver:
    """The language side's end."""
    if way in CONNECTOR:
        from sglang_mm_conn.bench.ways.connector import ConnectorReceiver

        return ConnectorReceiver(config, way)
    if way in STOCK:
        from sglang_mm_conn.bench.stock import StockReceiver

        return StockReceiver(config, way.removesuffix("_stock"))
    from sglang_mm_conn.bench.ways import bare, engine, memcpy, tcp

    plain: dict[str, Callable[[Config], Receiver]] = {
        "bare": bare.BareReceiver, "tcp": tcp.TcpReceiver, "memcpy": memcpy.MemcpyReceiver,
        "engine": engine.EngineReceiver,
    }  # fmt: skip
    return plain[way](config)
