"""Owns the `rates` command: the copies of a transfer at either end, host and GPU pool, beside plain copies."""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from sglang_mm_conn.memory.device import Device


_MOST = 1 << 16


@dataclass(frozen=True)
class Rate:
    """A way that bytes take, and the plain copy between the same two places (for a plain copy: itself)."""

    way: str
    plain: str
    bytes_per_second: float
    right: bool  # the bytes that arrived are those that were sent


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "rates",
        help="measure the copies of a transfer at either end: host pool, GPU pool, and plain copies over PCIe",
        description="Copies an embedding as an encoder and a language server do, to and from scattered blocks, and "
        "prints each way's rate beside that of one plain copy between the same two places. No network is involved. "
        "Exits with 1 where a byte arrived wrong. Without a GPU everything is host memory.",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one")
    parser.add_argument("--mib", type=_count, default=256, help="size of the embedding (default: 256)")
    parser.add_argument(
        "--block-kib", type=_count, default=896, help="size of a block (896: 128 rows of 3584 bfloat16)"
    )
    parser.add_argument("--repeats", type=_count, default=5, help="the median of so many is printed (default: 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    parser.set_defaults(run=run)


def _count(text: str) -> int:
    value = int(text)
    if not 1 <= value <= _MOST:
        raise argparse.ArgumentTypeError(f"{value} is not between 1 and {_MOST}")
    return value


def run(args: argparse.Namespace) -> int:
    try:
        import torch
    except ImportError as error:
        print(f"rates: {error}. It needs torch, which sglang brings along", file=sys.stderr)
        return 2
    if args.json is not None and not args.json.parent.is_dir():
        print(f"rates: --json {args.json}: there is no folder {args.json.parent}", file=sys.stderr)
        return 2

    from sglang_mm_conn.core.errors import ConnError
    from sglang_mm_conn.core.settings import Settings
    from sglang_mm_conn.memory.device import device_of

    there = torch.cuda.is_available()
    kind = args.device if args.device != "auto" else "cuda" if there else "cpu"
    if kind == "cuda" and not there:
        print("rates: --device cuda, but torch finds no GPU here", file=sys.stderr)
        return 1
    print(torch.cuda.get_device_name() if kind == "cuda" else "no GPU: all of this is host memory", end="; ")
    print(f"{args.mib} MiB in blocks of {args.block_kib} KiB, median of {args.repeats}")
    try:
        settings = Settings(pool_device=kind)
        rates = measure(device_of(torch.device(kind), settings), args.mib << 20, args.block_kib << 10, args.repeats)
    except ConnError as error:
        print(f"rates: {error}", file=sys.stderr)
        return 1
    if args.json is not None:
        args.json.write_text(json.dumps([asdict(rate) for rate in rates], indent=1) + "\n")
    plain = {rate.way: rate.bytes_per_second for rate in rates}
    for rate in rates:
        ratio = rate.bytes_per_second / plain[rate.plain]
        verdict = "" if rate.right else "  WRONG BYTES"
        print(f"{rate.way:42}{rate.bytes_per_second / 1e9:8.2f} GB/s{ratio:7.0%} of {rate.plain}{verdict}")
    return 0 if all(rate.right for rate in rates) else 1


def measure(device: Device, nbytes: int, block_bytes: int, repeats: int) -> list[Rate]:
    """Every way, plain copies first. Raises MemoryUnavailable."""
    import torch

    from sglang_mm_conn.core.layout import Geometry, window_extents
    from sglang_mm_conn.core.messages import ShmMemory
    from sglang_mm_conn.datapath.mooncake.staging import Staging
    from sglang_mm_conn.datapath.shm import ShmPath
    from sglang_mm_conn.memory.pool import BlockPool

    near = device.memory_devices[-1]  # where embeddings are made and used
    blocks = list(range(-(-nbytes // block_bytes)))
    random.Random(0).shuffle(blocks)
    geometry = Geometry(block_bytes, len(blocks), 1)
    extents = window_extents(geometry, blocks, nbytes)
    expected = torch.randint(0, 256, (nbytes,), dtype=torch.uint8)
    sent, result = device.empty(nbytes, near), device.empty(nbytes, near)
    device.copy([(sent, 0, expected, 0, nbytes)])
    rates: list[Rate] = []

    def add(way: str, plain: str, copy: Callable[[], None], take_out: Callable[[torch.Tensor], None]) -> None:
        seconds = [_seconds(copy) for _ in range(repeats + 1)][1:]  # the first one warms up
        arrived = torch.zeros_like(expected)
        take_out(arrived)
        rates.append(Rate(way, plain, nbytes / statistics.median(seconds), torch.equal(arrived, expected)))

    def copy(source: torch.Tensor, target: torch.Tensor) -> None:
        device.copy([(target, 0, source, 0, nbytes)])

    pinned = torch.zeros(nbytes, dtype=torch.uint8)
    unpin = device.pin(pinned)
    out, into, within = f"plain {near} to pinned host", f"plain pinned host to {near}", f"plain {near} to {near}"
    add(out, out, partial(copy, sent, pinned), partial(copy, pinned))
    add(into, into, partial(copy, pinned, result), partial(copy, result))
    add(within, within, partial(copy, sent, result), partial(copy, result))
    unpin()

    for memory_device in device.memory_devices:
        staging = Staging(1, nbytes, device, memory_device)
        fill = partial(staging.fill, staging.memory, sent, extents)
        add(
            f"encoder: into staging, {memory_device}",
            within if memory_device == near else out,
            fill,
            partial(copy, staging.memory),
        )
        staging.close()

    for memory_device in device.memory_devices:
        pool = BlockPool(geometry, shared=memory_device == "cpu", device=device, memory_device=memory_device)
        if pool.segment is not None:
            memory = ShmMemory(segment=pool.segment.name, nonce=pool.segment.nonce, writer_slot=0)
            link = ShmPath(device).open(memory, geometry, incarnation="")
            write = partial(link.write, sent, extents)
            read_all = partial(pool.read, blocks, nbytes=nbytes)
            add("encoder: into the pool, shared memory", out, write, read_all)
            link.close()
        else:  # an engine would have written it
            device.copy(
                (pool.regions[extent.region], extent.offset, sent, extent.start, extent.length) for extent in extents
            )
        result.zero_()
        device.drain()
        read = partial(pool.read, blocks, result, nbytes)
        add(
            f"language: out of the pool, {memory_device}",
            within if memory_device == near else into,
            read,
            partial(copy, result),
        )
        pool.close()
    return rates


def _seconds(copy: Callable[[], None]) -> float:
    start = time.perf_counter()
    copy()
    return time.perf_counter() - start
