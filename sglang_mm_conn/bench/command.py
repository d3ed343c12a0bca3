"""Owns the `bench` command: what is measured, and where the figures go."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from sglang_mm_conn.bench.defaults import QUICK_ROUNDS, QUICK_SIZES, ROUNDS, SIZES, TRANSPORTS

DOCUMENT = Path("docs/performance.md")

_DESCRIPTION = """\
Moves embeddings from an encoder process to a language process and measures it: over this connector, over sglang's own
transports (their real classes, without a model), and over what bounds them. All transports are open at once and take
turns in rounds, so that other work on the machine hits all alike. Every embedding is compared byte by byte; a wrong one
ends the benchmark with status 1.

transports:
  shm                this connector over shared memory
  mooncake           this connector over the Mooncake engine (TCP)
  zmq_to_scheduler   sglang's own
  mooncake_builtin   sglang's own (its GPU buffers are host memory here)
  tcp                raw TCP into a preallocated buffer
  zmq_baseline       the same copies and bare ZeroMQ messages: what bounds one room alone
  memcpy             one copy into warm shared memory: the limit on one host
  engine             the Mooncake engine's own write, at its best piece size
shm and mooncake take variations, joined by +: key (secured by a deployment key), fragmented (no two free blocks lie
side by side), windows (the pool is an eighth of one embedding), copied (the result is never a view of blocks);
zmq_baseline takes windows and copied; with --device cuda mooncake takes gpu_pool (pool and staging memory on the GPU)

With --device cuda embeddings begin and end on the GPU, where mooncake_builtin's buffers are then, too. memcpy, the
limit, is then one copy off it into pinned shared memory and one from there onto it.

A room's time begins when its tensor is ready in the encoder process, its size having been announced before, and ends
when its tensor is ready in the language process. rooms/s counts everything that a room costs, from its announcement.
"""

_EPILOG = """\
examples:
  python -m sglang_mm_conn bench --quick
  python -m sglang_mm_conn bench --transports memcpy,shm,shm+windows --sizes 16M,128M --rounds 9
  python -m sglang_mm_conn bench --fragmented --windows --json figures.json --plots pictures
  python -m sglang_mm_conn bench --quick --stream-above 256K
  python -m sglang_mm_conn bench --write          put the tables into docs/performance.md
  python -m sglang_mm_conn bench servers --write  requests to whole sglang servers instead: three to five minutes
"""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "bench",
        help="measure this connector beside sglang's own transports and what bounds them",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "what", nargs="?", default="transfers", choices=("transfers", "servers"),
        help="transfers (default): embeddings between two processes; servers: requests to whole sglang servers",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="about a minute or two: fewer sizes, rounds and rooms")
    parser.add_argument(
        "--transports", metavar="TRANSPORT,...",
        help=f"default: {TRANSPORTS}; of servers: conn_multimodal,zmq_to_scheduler,mooncake",
    )  # fmt: skip
    parser.add_argument("--sizes", metavar="SIZE,...", help=f"default: {SIZES}; with --quick: {QUICK_SIZES}")
    parser.add_argument(
        "--rounds",
        type=int,
        metavar="N",
        help=f"rounds of every transport (default: {ROUNDS}; with --quick: {QUICK_ROUNDS})",
    )
    parser.add_argument("--fragmented", action="store_true", help="also measure shm and mooncake with +fragmented")
    parser.add_argument("--windows", action="store_true", help="also measure shm and mooncake with +windows")
    parser.add_argument("--copied", action="store_true", help="also measure shm and mooncake with +copied")
    parser.add_argument("--width", type=int, default=4096, metavar="N", help="bfloat16 values in a row (default: 4096)")
    parser.add_argument("--block-size", type=int, default=128, metavar="ROWS", help="rows in a block (default: 128)")
    parser.add_argument(
        "--no-special", action="store_true", help="leave the special cases (unclaimed rooms, first use) out"
    )
    parser.add_argument(
        "--stream-above", metavar="SIZE",
        help="let the C library copy pieces of more than SIZE past the caches, as "
        "GLIBC_TUNABLES=glibc.cpu.x86_non_temporal_threshold=SIZE does for a server (glibc on x86; its own default is "
        "far larger). memcpy, the limit, is torch's copy, which knows nothing of it",
    )  # fmt: skip
    parser.add_argument(
        "--device", choices=("cpu", "cuda"),
        help="where embeddings begin and end (default: cpu); cuda leaves the special cases out",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw the figures into DIR")
    parser.add_argument(
        "--write", nargs="?", type=Path, const=DOCUMENT, metavar="FILE",
        help=f"put the tables into FILE (default: {DOCUMENT}), between its markers",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    try:
        from rich.console import Console
    except ImportError as error:
        print(f"bench: {error}. It needs more packages: pip install 'sglang-mm-conn[bench]'", file=sys.stderr)
        return 2
    console = Console(width=None if sys.stdout.isatty() else 140)
    from sglang_mm_conn.bench.process_pair import BenchError

    try:
        if args.what == "servers":
            from sglang_mm_conn.bench import servers

            return servers.run(args, console)
        from sglang_mm_conn.bench import transfers

        return transfers.run(args, console)
    except (BenchError, ValueError, OSError) as error:
        console.print(f"bench: {error}", style="red", markup=False, highlight=False)
        return 1
    except KeyboardInterrupt:
        console.print("interrupted", style="red")
        return 130
