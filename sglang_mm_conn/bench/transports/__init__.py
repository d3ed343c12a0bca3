"""The transports by name; this connector's take variations, for example ``shm+key+windows``."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from http import HTTPStatus

from sglang_mm_conn.bench.transports.base import Config, Receiver, Sender

BUILTIN = ("zmq_to_scheduler", "mooncake_builtin")
# Early Python 3.11 (3.11.2 in Debian 12) pickles an enum member as a call of getattr, which sglang's unpickler refuses:
# with it sglang's built-in transports drop every embedding.
BUILTIN_CANNOT_PICKLE = b"getattr" in pickle.dumps(HTTPStatus.OK)
CONNECTOR = ("shm", "mooncake")
VARIATIONS = ("key", "fragmented", "windows", "copied", "gpu_pool")
VARIATIONS_OF = {"shm": VARIATIONS[:-1], "mooncake": VARIATIONS, "zmq_baseline": ("windows", "copied")}
ON_GPU = (*CONNECTOR, *BUILTIN, "memcpy")  # can be measured with embeddings on a GPU

TITLES = {
    "shm": "this connector, shared memory",
    "mooncake": "this connector, Mooncake over TCP",
    "zmq_to_scheduler": "sglang's built-in zmq_to_scheduler",
    "mooncake_builtin": "sglang's built-in mooncake (over TCP, host memory)",
    "tcp": "raw TCP into a preallocated buffer",
    "zmq_baseline": "the copies of shm and bare ZeroMQ messages",
    "memcpy": "one copy into warm shared memory",
    "engine": "the Mooncake engine's own write, fastest slice size",
}


@dataclass(frozen=True)
class TransportVariant:
    """One transport with its variations."""

    base: str
    variations: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return "+".join((self.base, *self.variations))

    @property
    def title(self) -> str:
        return ", ".join((TITLES[self.base], *self.variations))

    def config(self, config: Config, key_file: str) -> Config:
        """``config`` with this transport's variations."""
        pool = next((name for name in ("windows", "fragmented") if name in self.variations), "contiguous")
        return replace(
            config,
            key_file=key_file if "key" in self.variations else "",
            pool=pool,
            result="copied" if "copied" in self.variations else "default",
            pool_device="cuda" if "gpu_pool" in self.variations else "cpu",
        )


def parse(name: str) -> TransportVariant:
    """The transport called ``name``. Raises ValueError naming what is wrong with it."""
    base, *variations = name.strip().split("+")
    if base not in TITLES:
        raise ValueError(f"{name!r}: no transport is called {base!r}; the transports are {', '.join(TITLES)}")
    for variation in variations:
        if variation not in VARIATIONS:
            raise ValueError(f"{name!r}: {variation!r} is none of the variations {', '.join(VARIATIONS)}")
        if base not in VARIATIONS_OF:
            raise ValueError(f"{name!r}: only {', '.join(CONNECTOR)} and zmq_baseline have variations")
        if variation not in VARIATIONS_OF[base]:
            raise ValueError(f"{name!r}: {base} has only the variations {', '.join(VARIATIONS_OF[base])}")
    if {"fragmented", "windows"} <= set(variations):
        raise ValueError(f"{name!r}: a pool of an eighth of one embedding cannot be fragmented as well")
    return TransportVariant(base, tuple(item for item in VARIATIONS if item in variations))


def make_sender(transport: str, config: Config) -> Sender:
    """The encoder process's end of ``transport``. Imports only what it needs."""
    if transport in CONNECTOR:
        from sglang_mm_conn.bench.transports.connector import ConnectorSender

        return ConnectorSender(config, transport)
    if transport in BUILTIN:
        from sglang_mm_conn.bench.transports.builtin import BuiltinSender

        return BuiltinSender(config, transport.removesuffix("_builtin"))
    from sglang_mm_conn.bench.transports import engine, memcpy, tcp, zmq_baseline

    plain: dict[str, Callable[[Config], Sender]] = {
        "zmq_baseline": zmq_baseline.ZmqBaselineSender,
        "tcp": tcp.TcpSender,
        "memcpy": memcpy.MemcpySender,
        "engine": engine.EngineSender,
    }
    return plain[transport](config)


def make_receiver(transport: str, config: Config) -> Receiver:
    """The language process's end of ``transport``. Imports only what it needs."""
    if transport in CONNECTOR:
        from sglang_mm_conn.bench.transports.connector import ConnectorReceiver

        return ConnectorReceiver(config, transport)
    if transport in BUILTIN:
        from sglang_mm_conn.bench.transports.builtin import BuiltinReceiver

        return BuiltinReceiver(config, transport.removesuffix("_builtin"))
    from sglang_mm_conn.bench.transports import engine, memcpy, tcp, zmq_baseline

    plain: dict[str, Callable[[Config], Receiver]] = {
        "zmq_baseline": zmq_baseline.ZmqBaselineReceiver, "tcp": tcp.TcpReceiver, "memcpy": memcpy.MemcpyReceiver,
        "engine": engine.EngineReceiver,
    }  # fmt: skip
    return plain[transport](config)
