"""Requests to whole sglang servers: an encoder and a language server for every transport, all alive at once, in turns.

The model is tiny but its embeddings are as wide as a real model's. What a request costs besides the transfer (the
vision model, the prompt, sglang's own work) is the same for all and much more than the transfer, so this shows what a
user would notice, not what the transports can do.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_mm_conn.bench.measurement import quantile
from sglang_mm_conn.demo.launch import OUR_BACKEND

if TYPE_CHECKING:
    from rich.console import Console

    from sglang_mm_conn.demo.questions import Question
    from sglang_mm_conn.demo.servers import ServerGroup

BACKENDS = (OUR_BACKEND, "zmq_to_scheduler", "mooncake")
HIDDEN, LAYERS = 2048, 1
PIXELS = 448  # 32 x 32 patches of 14 pixels, four to a token: 256 tokens
CLIENTS = 8
START_SECONDS = 600.0  # six servers on two cores
# Where there is no GPU, sglang's Mooncake transport cannot receive; the test bed gives it host memory.
# Six servers on few cores may let a connection fall silent for longer than a deployment would bear.
_ENVIRONMENT = {"CPU_BED_HOST_POOL": "1", "SGLANG_MM_CONN_PEER_TIMEOUT_SECONDS": "120"}
HEADINGS = ("transport", "alone p50 ms", "alone p99 ms", f"requests/s, {CLIENTS} clients", f"p50 ms, {CLIENTS} clients")


@dataclass
class Figures:
    """What was measured of one transport, over all rounds."""

    backend: str
    alone: list[float] = field(default_factory=list)  # seconds
    crowd: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)  # requests a second, one figure a round

    def cells(self) -> tuple[str, ...]:
        return (
            self.backend,
            f"{statistics.median(self.alone) * 1e3:.0f}",
            f"{quantile(self.alone, 0.99) * 1e3:.0f}",
            f"{statistics.median(self.rates):.2f}",
            f"{statistics.median(self.crowd) * 1e3:.0f}",
        )


def run(args: argparse.Namespace, console: Console) -> int:
    """Raises BenchError where a server cannot be started or an answer is an error, ValueError for a wrong option."""
    from sglang_mm_conn.bench.pairs import BenchError
    from sglang_mm_conn.demo import tiny_models
    from sglang_mm_conn.demo.servers import ServerError, ServerGroup, stop_all

    backends = _backends(args.ways)
    rounds, alone, crowd = (2, 3, 8) if args.quick else (args.rounds or 5, 5, 24)
    work = Path("build/bench").resolve()
    shape = tiny_models.Shape(HIDDEN, LAYERS)
    with console.status(f"writing a model with rows of {HIDDEN} values"):
        model = tiny_models.write("qwen2_5_vl", work / "models" / f"qwen2_5_vl-{HIDDEN}", shape=shape)
    logs = work / "logs" / str(os.getpid())
    groups = {name: ServerGroup(model, logs / name, backend=name, env=_ENVIRONMENT) for name in backends}
    figures = {name: Figures(name) for name in groups}
    questions = _questions()
    try:
        console.print(f"starting {2 * len(groups)} servers (logs in {logs})", highlight=False)
        for group in groups.values():
            group.start()
        for name, group in groups.items():
            group.wait_ready(START_SECONDS)
            console.print(f"  {name} is ready", style="dim", highlight=False)
        for name, group in groups.items():
            _ask(group, next(questions), name)  # whatever happens once only is not measured
        for number in range(rounds):
            for name, group in groups.items():
                console.print(f"  round {number + 1} of {rounds}: {name}", style="dim", highlight=False)
                _round(figures[name], group, questions, alone, crowd)
    except ServerError as error:
        raise BenchError(str(error)) from None
    finally:
        with console.status("stopping the servers"):
            stop_all([server for group in groups.values() for server in group.servers])
    _report(args, console, list(figures.values()), rounds)
    return 0


def _backends(ways: str) -> tuple[str, ...]:
    """``--ways`` of `bench servers`; its default is another command's."""
    from sglang_mm_conn.bench.command import WAYS

    if ways == WAYS:
        return BACKENDS
    chosen = tuple(dict.fromkeys(name.strip() for name in ways.split(",")))
    for name in chosen:
        if name not in BACKENDS:
            raise ValueError(f"--ways: {name!r} is none of the transports of servers: {', '.join(BACKENDS)}")
    return chosen


def _questions() -> Iterator[Question]:
    """No two alike, so that no cache answers."""
    from sglang_mm_conn.demo.images import Image
    from sglang_mm_conn.demo.questions import Question

    for seed in itertools.count(1):
        yield Question(f"image {seed}", "what is this?", (Image(seed, PIXELS, PIXELS),), max_tokens=2)


def _round(figures: Figures, group: ServerGroup, questions: Iterator[Question], alone: int, crowd: int) -> None:
    for _ in range(alone):
        figures.alone.append(_ask(group, next(questions), figures.backend))
    asked = [next(questions) for _ in range(crowd)]
    for question in asked:
        question.images[0].data_uri()  # drawn before the clock runs
    begin = time.monotonic()
    with ThreadPoolExecutor(CLIENTS) as clients:
        figures.crowd += clients.map(lambda question: _ask(group, question, figures.backend), asked)
    figures.rates.append(crowd / (time.monotonic() - begin))


def _ask(group: ServerGroup, question: Question, backend: str) -> float:
    from sglang_mm_conn.bench.pairs import BenchError
    from sglang_mm_conn.demo.chat import ask

    begin = time.monotonic()
    answer = ask(group.language.url, question)
    if not answer.ok:
        raise BenchError(f"{backend}: {question.name}: HTTP {answer.status}: {answer.error}")
    return time.monotonic() - begin


def _report(args: argparse.Namespace, console: Console, figures: list[Figures], rounds: int) -> None:
    from rich.table import Table

    table = Table(title=f"256 tokens of {HIDDEN} float32 values per request, {rounds} rounds", title_justify="left")
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == "transport" else "right")
    for one in figures:
        table.add_row(*one.cells())
    console.print(table)
    if args.json is not None:
        told: dict[str, Any] = {"rounds": rounds, "clients": CLIENTS, "servers": [asdict(one) for one in figures]}
        args.json.write_text(json.dumps(told, indent=1) + "\n")
        console.print(f"figures: {args.json}", highlight=False)
