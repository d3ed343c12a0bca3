"""Owns the `bench` command: what is measured, and where the figures go."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_mm_conn.bench.markdown_blocks import RESULTS

if TYPE_CHECKING:
    from rich.console import Console

    from sglang_mm_conn.bench.runner import BenchResult, Plan

SIZES = "64K,1M,16M,128M,512M"
QUICK_SIZES = "64K,1M,16M"
TRANSPORTS = "memcpy,shm,shm+key,mooncake,mooncake+key,zmq_to_scheduler,mooncake_builtin,tcp,engine"
ROUNDS, QUICK_ROUNDS = 7, 3

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
  python -m sglang_mm_conn bench --write          put the tables into docs/results
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
        "--transports", default=TRANSPORTS, metavar="TRANSPORT,...",
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
        "--write", nargs="?", type=Path, const=RESULTS, metavar="PATH",
        help=f"put the tables between the markers of PATH, or of its file in the folder PATH (default: {RESULTS})",
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
        return _transfers(args, console)
    except (BenchError, ValueError, OSError) as error:
        console.print(f"bench: {error}", style="red", markup=False, highlight=False)
        return 1
    except KeyboardInterrupt:
        console.print("interrupted", style="red")
        return 130


def plan_of(args: argparse.Namespace) -> Plan:
    """Raises ValueError naming the option and the value that is wrong."""
    from sglang_mm_conn.bench import transports
    from sglang_mm_conn.bench.runner import Plan
    from sglang_mm_conn.bench.sizes import parse_size

    for name, least in (("rounds", 1), ("width", 1), ("block_size", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} must be {least} or more, not {value}")
    try:
        chosen = [transports.parse(name) for name in args.transports.split(",")]
    except ValueError as error:
        raise ValueError(f"--transports: {error}") from None
    if args.transports == TRANSPORTS and args.device == "cuda":
        chosen = [transport for transport in chosen if transport.base in transports.ON_GPU] + [
            transports.parse("mooncake+gpu_pool")
        ]
    if args.transports == TRANSPORTS and transports.BUILTIN_CANNOT_PICKLE:
        chosen = [transport for transport in chosen if transport.base not in transports.BUILTIN]
    for variation in ("fragmented", "windows", "copied"):
        if getattr(args, variation):
            bases = [base for base, variations in transports.VARIATIONS_OF.items() if variation in variations]
            chosen += [
                transports.TransportVariant(base, (variation,))
                for base in bases
                if base in transports.CONNECTOR or transports.TransportVariant(base) in chosen
            ]
    for transport in chosen:
        if args.device == "cuda" and transport.base not in transports.ON_GPU:
            raise ValueError(
                f"--transports: {transport.base} cannot be measured with --device cuda, "
                f"only {', '.join(transports.ON_GPU)}"
            )
        if args.device != "cuda" and "gpu_pool" in transport.variations:
            raise ValueError(f"--transports: {transport.name} needs --device cuda")
    try:
        sizes = [
            parse_size(text, 2 * args.width)
            for text in (args.sizes or (QUICK_SIZES if args.quick else SIZES)).split(",")
        ]
    except ValueError as error:
        raise ValueError(f"--sizes: {error}") from None
    return Plan(
        transports=tuple(dict.fromkeys(chosen)),
        sizes=tuple(dict.fromkeys(sizes)),
        rounds=args.rounds or (QUICK_ROUNDS if args.quick else ROUNDS),
        width=args.width,
        block_size=args.block_size,
        quick=args.quick,
        special=not args.no_special and args.device != "cuda",
        device=args.device or "cpu",
    )


def _transfers(args: argparse.Namespace, console: Console) -> int:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from sglang_mm_conn.bench import host_info, markdown_blocks, measurement, report, transports
    from sglang_mm_conn.bench.process_pair import BenchError
    from sglang_mm_conn.bench.runner import BenchResult, carry_out

    plan = plan_of(args)
    if plan.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ValueError("--device cuda, but torch finds no GPU here")
    block = markdown_blocks.TRANSFERS
    if args.stream_above is not None:
        block = markdown_blocks.STREAMED
        _stream_above(args.stream_above)
    if args.write is not None:
        # A file that cannot take the tables is noticed before the run.
        document = markdown_blocks.document(args.write, block)
        markdown_blocks.insert(document.read_text(), "", block)
    facts = host_info.describe()
    console.print(host_info.line(facts), style="dim", highlight=False)
    if transports.BUILTIN_CANNOT_PICKLE and not any(
        transport.base in transports.BUILTIN for transport in plan.transports
    ):
        console.print("sglang's own transports are left out: on this Python they drop every embedding", style="yellow")
    outcome = BenchResult()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("starting", total=1.0)
        last = ""

        def say(text: str, part: float) -> None:
            nonlocal last
            progress.update(task, description=text, completed=part)
            stage = text.partition(":")[0]
            if not console.is_terminal and stage != last:
                console.print(f"{part:4.0%} {text}", highlight=False)
            last = stage

        stopped = ""
        try:
            carry_out(plan, say, outcome)
        except KeyboardInterrupt:
            stopped = "interrupted"
        except BenchError as error:
            stopped = str(error)
    if stopped:
        console.print(f"{stopped}: these are the figures so far", style="red", markup=False)
    rows = measurement.rows(outcome.results)
    compared = measurement.comparisons(outcome.results)
    report.print_report(console, rows, outcome.specials, compared)
    if args.json is not None:
        args.json.write_text(json.dumps(_figures(outcome, rows, facts, plan), indent=1) + "\n")
        console.print(f"figures: {args.json}", highlight=False)
    if args.plots is not None:
        from sglang_mm_conn.bench import plots

        for path in plots.draw(rows, args.plots):
            console.print(f"picture: {path}", highlight=False)
    if args.write is not None:
        if stopped:
            raise ValueError(f"{document} is left as it is: the run did not come to its end")
        note = f"{host_info.line(facts)}; {plan.rounds} rounds. Options: {_options(args) or 'none'}."
        markdown_blocks.write(document, f"{note}\n\n{report.markdown(rows, outcome.specials, compared)}", block)
        console.print(f"tables: {document}", highlight=False)
    return {"": 0, "interrupted": 130}.get(stopped, 1)


def _stream_above(size: str) -> None:
    """For the processes of all transports, which begin later: the C library reads it when a process begins."""
    from sglang_mm_conn.bench.sizes import parse_size

    try:
        nbytes = parse_size(size, 1)
    except ValueError as error:
        raise ValueError(f"--stream-above: {error}") from None
    others = [one for one in os.environ.get("GLIBC_TUNABLES", "").split(":") if one]
    os.environ["GLIBC_TUNABLES"] = ":".join([*others, f"glibc.cpu.x86_non_temporal_threshold={nbytes:#x}"])


def _options(args: argparse.Namespace) -> str:
    """Those that decide what is measured, where they are not the default."""
    flags = [f"--{name}".replace("_", "-") for name in ("quick", "fragmented", "windows", "copied", "no_special")
             if getattr(args, name)]  # fmt: skip
    if args.transports != TRANSPORTS:
        flags.append(f"--transports {args.transports}")
    if args.device:
        flags.append(f"--device {args.device}")
    if args.sizes:
        flags.append(f"--sizes {args.sizes}")
    if args.stream_above:
        flags.append(f"--stream-above {args.stream_above}")
    return " ".join(flags)


def _figures(outcome: BenchResult, rows: Any, facts: dict[str, Any], plan: Plan) -> dict[str, Any]:
    from dataclasses import asdict

    from sglang_mm_conn.bench import measurement

    return {
        "machine": facts,
        "plan": {**asdict(plan), "transports": [transport.name for transport in plan.transports]},
        "rows": measurement.as_json(rows),
        "comparisons": [asdict(one) for one in measurement.comparisons(outcome.results)],
        "special": [special.as_json() for special in outcome.specials],
        "engine_pieces": outcome.pieces,
        "runs": [asdict(result) for result in outcome.results],
    }
