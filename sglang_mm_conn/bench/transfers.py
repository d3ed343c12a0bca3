"""The suite `bench transfers`: from its options to a plan, and from the plan's results to tables, JSON and plots."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from sglang_mm_conn.bench import host_info, markdown_blocks, measurement, report, transports
from sglang_mm_conn.bench.defaults import BLOCK_SIZE, QUICK_ROUNDS, QUICK_SIZES, ROUNDS, SIZES, TRANSPORTS, WIDTH
from sglang_mm_conn.bench.process_pair import BenchError
from sglang_mm_conn.bench.runner import BenchResult, Plan, carry_out
from sglang_mm_conn.bench.sizes import parse_size

if TYPE_CHECKING:
    from rich.console import Console


def run(args: argparse.Namespace, console: Console) -> int:
    """Measure, then print and write what ``args`` ask for. Returns the exit status.

    Raises ValueError for a wrong option, OSError for a file that cannot be written.
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    plan = plan_of(args)
    if plan.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ValueError("--device cuda, but torch finds no GPU here")
    block = markdown_blocks.TRANSFERS
    if args.stream_above is not None:
        block = markdown_blocks.STREAMED
        stream_above(args.stream_above)
    if args.write is not None:
        # Raises before the run where the file cannot take the tables.
        document = markdown_blocks.document(args.write, block)
        markdown_blocks.insert(document.read_text(), "", block)
    facts = host_info.describe()
    console.print(host_info.line(facts), style="dim", highlight=False)
    if transports.BUILTIN_CANNOT_PICKLE and not any(
        transport.base in transports.BUILTIN for transport in plan.transports
    ):
        console.print("sglang's built-in transports are left out: with this Python they drop every embedding",
                      style="yellow")  # fmt: skip
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
            console.print(f"plot: {path}", highlight=False)
    if args.write is not None:
        if stopped:
            raise ValueError(f"{document} is left as it is: the run did not finish")
        note = f"{host_info.line(facts)}; {plan.rounds} rounds. Options: {_options(args) or 'none'}."
        markdown_blocks.write(document, f"{note}\n\n{report.markdown(rows, outcome.specials, compared)}", block)
        console.print(f"tables: {document}", highlight=False)
    return {"": 0, "interrupted": 130}.get(stopped, 1)


def plan_of(args: argparse.Namespace) -> Plan:
    """The plan that ``args`` ask for. Raises ValueError naming the option and its wrong value."""
    for name, least in (("rounds", 1), ("width", 1), ("block_size", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} must be {least} or more, not {value}")
    width = WIDTH if args.width is None else args.width
    try:
        sizes = [
            parse_size(text, 2 * width)
            for text in ((QUICK_SIZES if args.quick else SIZES) if args.sizes is None else args.sizes).split(",")
        ]
    except ValueError as error:
        raise ValueError(f"--sizes: {error}") from None
    return Plan(
        transports=tuple(dict.fromkeys(_transports(args))),
        sizes=tuple(dict.fromkeys(sizes)),
        rounds=args.rounds or (QUICK_ROUNDS if args.quick else ROUNDS),
        width=width,
        block_size=BLOCK_SIZE if args.block_size is None else args.block_size,
        quick=args.quick,
        special=not args.no_special and args.device != "cuda",
        device=args.device or "cpu",
    )


def _transports(args: argparse.Namespace) -> list[transports.TransportVariant]:
    """Those of ``--transports``, or the default ones that work here, and their variants that other options add."""
    try:
        chosen = [
            transports.parse(name) for name in (TRANSPORTS if args.transports is None else args.transports).split(",")
        ]
    except ValueError as error:
        raise ValueError(f"--transports: {error}") from None
    if args.transports is None:
        if args.device == "cuda":
            chosen = [transport for transport in chosen if transport.base in transports.ON_GPU]
            chosen.append(transports.parse("mooncake+gpu_pool"))
        if transports.BUILTIN_CANNOT_PICKLE:
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
    return chosen


def stream_above(size: str) -> None:
    """Set glibc's threshold for the transports' processes, which start later: glibc reads it when a process starts."""
    try:
        nbytes = parse_size(size, 1)
    except ValueError as error:
        raise ValueError(f"--stream-above: {error}") from None
    others = [one for one in os.environ.get("GLIBC_TUNABLES", "").split(":") if one]
    os.environ["GLIBC_TUNABLES"] = ":".join([*others, f"glibc.cpu.x86_non_temporal_threshold={nbytes:#x}"])


def _options(args: argparse.Namespace) -> str:
    """The options that decide what is measured, where they are not the default."""
    flags = [f"--{name}".replace("_", "-") for name in ("quick", "fragmented", "windows", "copied", "no_special")
             if getattr(args, name)]  # fmt: skip
    for name in ("transports", "device", "sizes", "width", "block_size", "stream_above"):
        value = getattr(args, name)
        if value:
            flags.append(f"--{name.replace('_', '-')} {value}")
    return " ".join(flags)


def _figures(
    outcome: BenchResult, rows: Sequence[measurement.Row], facts: dict[str, Any], plan: Plan
) -> dict[str, Any]:
    return {
        "machine": facts,
        "plan": {**asdict(plan), "transports": [transport.name for transport in plan.transports]},
        "rows": measurement.as_json(rows),
        "comparisons": [asdict(one) for one in measurement.comparisons(outcome.results)],
        "special": [special.as_json() for special in outcome.specials],
        "engine_slices": outcome.engine_slices,
        "runs": [asdict(result) for result in outcome.results],
    }
