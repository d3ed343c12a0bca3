"""The suite `bench servers`: requests to whole sglang servers, an encoder and a language server for each transport.

The rounds of the transports are interleaved, and all servers but those being measured are stopped (SIGSTOP): their idle
schedulers spin and would take cores. The model's embeddings are as wide as a real model's, but it computes as little as
possible: on a CPU a real model takes minutes, which would hide the difference between transports.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_mm_conn.bench.measurement import quantile
from sglang_mm_conn.demo.launch import OUR_BACKEND

if TYPE_CHECKING:
    from rich.console import Console

    from sglang_mm_conn.demo.chat import Answer
    from sglang_mm_conn.demo.questions import Question
    from sglang_mm_conn.demo.servers import ServerGroup

BACKENDS = (OUR_BACKEND, "zmq_to_scheduler", "mooncake")
KIND, HIDDEN, LAYERS = "qwen3_vl", 4096, 1
ROW_VALUES = 3 * HIDDEN  # the tiny model has two deepstack layers, whose rows travel with the embedding's own
PIXELS = 512  # 32 x 32 patches of 16 pixels, four to a token
TOKENS = 256
CLIENTS = 8
START_SECONDS = 600.0  # for two servers to start, on two busy cores
_ENVIRONMENT = {
    # Without a GPU sglang's Mooncake transport cannot receive: ci/cpu_bed gives it a pool in host memory.
    "CPU_BED_HOST_POOL": "1",
    # On a CPU sglang computes a batch of images as one large image with an attention mask: slower than one by one.
    "SGLANG_ENCODER_MAX_BATCH_SIZE": "1",
    # A stopped server sends no heartbeats: it must not be taken for a dead one.
    "SGLANG_MM_CONN_PEER_TIMEOUT_SECONDS": "3600",
}
HEADINGS = (
    "transport", "p50 ms, 1 client", "p99 ms, 1 client", f"requests/s, {CLIENTS} clients", "slowest and fastest round",
    f"p50 ms, {CLIENTS} clients", "page faults per request",
)  # fmt: skip
_OF_TRANSFERS = (
    "sizes", "fragmented", "windows", "copied", "no_special", "plots", "device", "width", "block_size", "stream_above",
)  # fmt: skip


@dataclass(frozen=True)
class RoundResult:
    """One round of one transport.

    Attributes:
        alone: Seconds of each request with one client.
        concurrent: Seconds of each request with CLIENTS clients.
        concurrent_took: Seconds of all requests with CLIENTS clients together.
        concurrent_faults: Minor page faults of the servers' processes meanwhile.
    """

    alone: tuple[float, ...]
    concurrent: tuple[float, ...]
    concurrent_took: float
    concurrent_faults: int

    @property
    def rate(self) -> float:
        """requests/s with CLIENTS clients."""
        return len(self.concurrent) / self.concurrent_took


@dataclass
class Figures:
    """All rounds of one transport."""

    backend: str
    rounds: list[RoundResult] = field(default_factory=list)

    def cells(self) -> tuple[str, ...]:
        """The row of the table, see HEADINGS."""
        alone = [seconds for one in self.rounds for seconds in one.alone]
        concurrent = [seconds for one in self.rounds for seconds in one.concurrent]
        rates = [one.rate for one in self.rounds]
        return (
            self.backend,
            f"{statistics.median(alone) * 1e3:.0f}",
            f"{quantile(alone, 0.99) * 1e3:.0f}",
            f"{statistics.median(rates):.2f}",
            f"{min(rates):.2f} to {max(rates):.2f}",
            f"{statistics.median(concurrent) * 1e3:.0f}",
            f"{statistics.median(one.concurrent_faults / len(one.concurrent) for one in self.rounds):,.0f}",
        )


def comparisons(figures: Sequence[Figures]) -> list[str]:
    """This connector over each built-in transport: medians over the rounds of the ratio within one round."""
    ours = next((one for one in figures if one.backend == OUR_BACKEND), None)
    lines = []
    for other in figures:
        if ours is None or other is ours:
            continue
        pairs = list(zip(ours.rounds, other.rounds, strict=True))
        rate = statistics.median(mine.rate / theirs.rate for mine, theirs in pairs)
        alone = statistics.median(
            statistics.median(mine.alone) / statistics.median(theirs.alone) for mine, theirs in pairs
        )
        lines.append(
            f"{ours.backend} / {other.backend}, median of the ratios within each round: requests/s with {CLIENTS} "
            f"clients {rate:.2f}, latency with one client {alone:.2f}"
        )
    return lines


def run(args: argparse.Namespace, console: Console) -> int:
    """Measure, then print and write what ``args`` ask for. Returns the exit status.

    Raises BenchError where a server does not start or an answer is wrong, ValueError for a wrong option.
    """
    from sglang_mm_conn.bench import host_info, markdown_blocks
    from sglang_mm_conn.bench.process_pair import BenchError
    from sglang_mm_conn.demo import tiny_models
    from sglang_mm_conn.demo.servers import ServerError, ServerGroup, stop_all

    backends = _backends(args)
    if args.write is not None:
        written = markdown_blocks.document(args.write, markdown_blocks.SERVERS)
        markdown_blocks.insert(written.read_text(), "", markdown_blocks.SERVERS)
    alone, concurrent = (4, 16) if args.quick else (8, 40)
    rounds = args.rounds or (3 if args.quick else 7)
    facts = host_info.describe()
    console.print(host_info.line(facts), style="dim", highlight=False)
    work = Path("build/bench").resolve()
    with console.status(f"writing a model with rows of {ROW_VALUES} values"):
        shape = tiny_models.Shape(HIDDEN, LAYERS, thin=True)
        model = tiny_models.write(KIND, work / "models" / f"{KIND}-{HIDDEN}", shape=shape)
    logs = work / "logs" / str(os.getpid())
    groups = {name: ServerGroup(model, logs / name, backend=name, env=_ENVIRONMENT) for name in backends}
    figures = {name: Figures(name) for name in groups}
    questions = _questions()
    say = _progress(console)
    try:
        say(f"two servers for each of {len(groups)} transports (logs in {logs})")
        first, answers = next(questions), {}
        for name, group in groups.items():
            group.start()
            group.wait_ready(START_SECONDS)
            answers[name] = _ask(group, first, name)
            _freeze(group)
            say(f"{name} is ready")
        if len({(answer.text, answer.tokens) for answer in answers.values()}) > 1:
            raise BenchError(f"the transports lead to different answers: {answers}")
        for number in range(rounds):
            # Another transport starts each round, so that no transport always follows the same one.
            for name in (*backends[number % len(backends) :], *backends[: number % len(backends)]):
                with _thawed(groups[name]):
                    _ask(groups[name], next(questions), name)  # the first request after SIGCONT is not measured
                    result = _round(groups[name], name, questions, alone, concurrent)
                figures[name].rounds.append(result)
                say(f"round {number + 1} of {rounds}: {name}: {result.rate:.2f} requests/s")
        for name, group in groups.items():
            _check_transport(group, name, 1 + rounds * (1 + alone + concurrent))
    except ServerError as error:
        raise BenchError(str(error)) from None
    finally:
        with console.status("stopping the servers"):
            stop_all([server for group in groups.values() for server in group.servers])
    _report(args, console, list(figures.values()), facts)
    return 0


def _backends(args: argparse.Namespace) -> tuple[str, ...]:
    """Those of ``--transports``; all of them where it is left out. Raises ValueError for a wrong option."""
    for name in _OF_TRANSFERS:
        if getattr(args, name) not in (None, False):
            raise ValueError(f"--{name.replace('_', '-')} is an option of `bench transfers`, not of `bench servers`")
    if args.rounds is not None and args.rounds < 1:
        raise ValueError(f"--rounds must be 1 or more, not {args.rounds}")
    if args.transports is None:
        return BACKENDS
    chosen = tuple(dict.fromkeys(name.strip() for name in args.transports.split(",")))
    for name in chosen:
        if name not in BACKENDS:
            raise ValueError(
                f"--transports: {name!r} is none of the transports of `bench servers`: {', '.join(BACKENDS)}"
            )
    return chosen


def _progress(console: Console) -> Any:
    begin = time.monotonic()

    def say(text: str) -> None:
        console.print(f"{time.monotonic() - begin:4.0f} s  {text}", style="dim", highlight=False)

    return say


def _questions() -> Iterator[Question]:
    """Questions with different images, so that no cache answers."""
    from sglang_mm_conn.demo.images import Image
    from sglang_mm_conn.demo.questions import Question

    for seed in itertools.count(1):
        yield Question(f"image {seed}", "what is this?", (Image(seed, PIXELS, PIXELS),), max_tokens=1)


def _freeze(group: ServerGroup) -> None:
    for server in (
        *group.languages,
        *group.encoders,
    ):  # the client side first, so that it waits for no answer meanwhile
        server.signal(signal.SIGSTOP)


@contextmanager
def _thawed(group: ServerGroup) -> Iterator[None]:
    for server in (*group.encoders, *group.languages):
        server.signal(signal.SIGCONT)
    yield
    _freeze(group)  # not after an exception: the servers are ended then


def _round(group: ServerGroup, name: str, questions: Iterator[Question], alone: int, concurrent: int) -> RoundResult:
    asked = list(itertools.islice(questions, alone + concurrent))
    for question in asked:
        question.images[0].data_uri()  # drawn, and cached, before the clock starts

    def seconds(question: Question) -> float:
        begin = time.monotonic()
        _ask(group, question, name)
        return time.monotonic() - begin

    one_by_one = tuple(map(seconds, asked[:alone]))
    faults, begin = _faults(group), time.monotonic()
    with ThreadPoolExecutor(CLIENTS) as clients:
        together = tuple(clients.map(seconds, asked[alone:]))
    took = time.monotonic() - begin
    return RoundResult(one_by_one, together, took, _faults(group) - faults)


def _faults(group: ServerGroup) -> int:
    """Minor page faults of all processes of ``group`` so far."""
    faults = 0
    for pid in [pid for server in group.servers for pid in server.pids()]:
        with suppress(FileNotFoundError):  # the process has ended meanwhile
            faults += int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[7])
    return faults


def _ask(group: ServerGroup, question: Question, backend: str) -> Answer:
    from sglang_mm_conn.bench.process_pair import BenchError
    from sglang_mm_conn.demo.chat import ask

    answer = ask(group.language.url, question)
    if not answer.ok:
        raise BenchError(f"{backend}: {question.name}: HTTP {answer.status}: {answer.error}")
    return answer


def _check_transport(group: ServerGroup, backend: str, requests: int) -> None:
    """Raises BenchError unless all embeddings travelled over ``backend``."""
    from sglang_mm_conn.bench.process_pair import BenchError

    ours = group.language.log().count("Embedding received: ")
    if ours != (requests if backend == OUR_BACKEND else 0):
        raise BenchError(f"{backend}: {ours} of {requests} embeddings travelled over {OUR_BACKEND}")


def _report(args: argparse.Namespace, console: Console, figures: list[Figures], facts: dict[str, Any]) -> None:
    from rich.table import Table

    from sglang_mm_conn.bench import host_info, markdown_blocks
    from sglang_mm_conn.bench.report import markdown_table

    rounds = len(figures[0].rounds)
    title = f"{TOKENS} rows of {ROW_VALUES} float32 values per request, to its first token; {rounds} rounds"
    table = Table(*HEADINGS, title=title, title_justify="left")
    for one in figures:
        table.add_row(*one.cells())
    console.print(table)
    for line in comparisons(figures):
        console.print(line, highlight=False)
    if args.json is not None:
        told: dict[str, Any] = {"machine": facts, "clients": CLIENTS, "servers": [asdict(one) for one in figures]}
        args.json.write_text(json.dumps(told, indent=1) + "\n")
        console.print(f"figures: {args.json}", highlight=False)
    if args.write is not None:
        parts = (
            f"{host_info.line(facts)}. {title}.",
            markdown_table(HEADINGS, [one.cells() for one in figures]),
            "\n".join(f"- {line}" for line in comparisons(figures)),
        )
        document = markdown_blocks.document(args.write, markdown_blocks.SERVERS)
        markdown_blocks.write(document, "\n\n".join(parts), markdown_blocks.SERVERS)
        console.print(f"table: {document}", highlight=False)
