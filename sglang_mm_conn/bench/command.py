"""The `bench` command: its options, and the dispatch to the suites ``transfers`` and ``servers``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from sglang_mm_conn.bench.defaults import BLOCK_SIZE, QUICK_ROUNDS, QUICK_SIZES, ROUNDS, SIZES, TRANSPORTS, WIDTH
from sglang_mm_conn.bench.markdown_blocks import RESULTS

_DESCRIPTION = """\
Moves embeddings from an encoder process to a language process and times it: over this connector, over sglang's built-in
transports (sglang's own classes, without a model), and over simpler transports that serve as bounds. The processes of
all transports run at once and the rounds of the transports are interleaved, so that other load on the machine affects
all of them alike. Every embedding is compared byte by byte; wrong bytes end the benchmark with status 1.

transports:
  shm                this connector over shared memory
  mooncake           this connector over the Mooncake engine (TCP)
  zmq_to_scheduler   sglang's built-in transport of this name
  mooncake_builtin   sglang's built-in `mooncake` (with --device cpu its GPU buffers are host memory)
  tcp                raw TCP into a preallocated buffer
  zmq_baseline       lower bound on latency for any ZeroMQ-based transport, one room at a time: the copies of shm and
                     bare ZeroMQ messages, without this connector's threads, state and codec
  memcpy             upper bound on speed on one host: one copy into warm shared memory
  engine             upper bound on speed over Mooncake: the engine's own write, at the fastest slice size
variations, joined to a transport by +, for example shm+key+windows:
  key                control connections secured with a deployment key (shm, mooncake)
  fragmented         no two free blocks are adjacent (shm, mooncake)
  windows            the pool holds an eighth of one embedding (shm, mooncake, zmq_baseline)
  copied             the result is never a view of blocks (shm, mooncake, zmq_baseline)
  gpu_pool           pool and staging memory on the GPU (mooncake, with --device cuda)

With --device cuda embeddings start and end on the GPU, and so do mooncake_builtin's buffers. memcpy is then one copy
from the GPU into pinned shared memory and one from there to the GPU.

A room is one embedding. Its time starts when its tensor is ready in the encoder process (its size was announced
before) and ends when its tensor is ready in the language process. rooms/s is measured with several rooms in flight and
includes everything a room costs, from its announcement on.
"""

_EPILOG = """\
examples:
  python -m sglang_mm_conn bench --quick
  python -m sglang_mm_conn bench --transports memcpy,shm,shm+windows --sizes 16M,128M --rounds 9
  python -m sglang_mm_conn bench --fragmented --windows --json figures.json --plots plots
  python -m sglang_mm_conn bench --quick --stream-above 256K
  python -m sglang_mm_conn bench --write          put the tables into docs/results
  python -m sglang_mm_conn bench servers --write  requests to whole sglang servers instead: three to five minutes
"""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "bench",
        help="time this connector beside sglang's built-in transports and the bounds of the machine",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "what", nargs="?", default="transfers", choices=("transfers", "servers"),
        help="transfers (default): embeddings between two processes; servers: requests to whole sglang servers",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="one to two minutes: fewer sizes, rounds and rooms")
    parser.add_argument(
        "--transports", metavar="TRANSPORT,...",
        help=f"default: {TRANSPORTS}; default of servers: conn_multimodal,zmq_to_scheduler,mooncake",
    )  # fmt: skip
    parser.add_argument("--sizes", metavar="SIZE,...", help=f"default: {SIZES}; with --quick: {QUICK_SIZES}")
    parser.add_argument(
        "--rounds",
        type=int,
        metavar="N",
        help=f"rounds per transport (default: {ROUNDS}; with --quick: {QUICK_ROUNDS})",
    )
    parser.add_argument("--fragmented", action="store_true", help="also measure shm and mooncake with +fragmented")
    parser.add_argument("--windows", action="store_true", help="also measure shm and mooncake with +windows")
    parser.add_argument("--copied", action="store_true", help="also measure shm and mooncake with +copied")
    parser.add_argument("--width", type=int, metavar="N", help=f"bfloat16 values per row (default: {WIDTH})")
    parser.add_argument("--block-size", type=int, metavar="ROWS", help=f"rows per block (default: {BLOCK_SIZE})")
    parser.add_argument(
        "--no-special", action="store_true", help="leave out the special cases (estimates, unclaimed rooms, first use)"
    )
    parser.add_argument(
        "--stream-above", metavar="SIZE",
        help="make glibc's memmove bypass the caches for copies above SIZE, as "
        "GLIBC_TUNABLES=glibc.cpu.x86_non_temporal_threshold=SIZE does for a server (x86 only; glibc's default is far "
        "larger). The transport memcpy is torch's copy, which this does not change",
    )  # fmt: skip
    parser.add_argument(
        "--device", choices=("cpu", "cuda"),
        help="where embeddings start and end (default: cpu); cuda leaves out the special cases",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="write plots of the figures (PNG) into DIR")
    parser.add_argument(
        "--write", nargs="?", type=Path, const=RESULTS, metavar="PATH",
        help=f"put the tables between the markers of PATH, or of its file in the folder PATH (default: {RESULTS})",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    try:
        from rich.console import Console
    except ImportError as error:
        print(f"bench: {error}. Install the missing packages: pip install 'sglang-mm-conn[bench]'", file=sys.stderr)
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
