"""Owns the `demo` command: asks a colocated server and an encoder with a language server the same questions."""

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_mm_conn.demo.launch import OUR_BACKEND, Launch
from sglang_mm_conn.demo.questions import QUESTIONS
from sglang_mm_conn.demo.servers import Server, ServerError, ServerGroup, stop_all, wait_ready
from sglang_mm_conn.demo.tiny_models import KINDS

if TYPE_CHECKING:
    from rich.console import Console

    from sglang_mm_conn.demo.report import Outcome

MOST_FIRST_OFFER = 1 << 30  # the setting's maximum; larger than any embedding


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "demo",
        help="compare an encoder and a language server with a colocated one, on this machine",
        description="Starts three real sglang servers of one model: a colocated one, and an encoder and a language "
        "server that are joined by this connector. Asks both deployments the same questions about images, and shows "
        "whether the answers are the same and how each embedding was transferred. Exits with 1 if an answer differs, "
        "or if no transfer was resumed although --first-offer is smaller than an embedding.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--model",
        default="qwen2_5_vl",
        metavar="KIND|DIR",
        help=f"a kind of tiny random-weight model to generate ({', '.join(KINDS)}), or the directory of your own model",
    )
    parser.add_argument(
        "--data-path",
        default="auto",
        choices=("auto", "shm", "mooncake"),
        help="how embeddings are transferred: shm (shared memory, both servers on one host), mooncake (RDMA or TCP), "
        "or auto: shm where both servers can open the same segment, mooncake otherwise",
    )
    parser.add_argument(
        "--block-size",
        type=_at_least(1),
        default=16,
        metavar="TOKENS",
        help="tokens in one block of the language server's pool, set for both servers",
    )
    parser.add_argument(
        "--blocks",
        type=_at_least(1),
        default=64,
        metavar="N",
        help="blocks in the language server's pool; embeddings larger than the whole pool pass through it in windows",
    )
    parser.add_argument(
        "--first-offer",
        type=_at_least(0),
        default=32,
        metavar="TOKENS",
        help="most tokens of an embedding in the first transfer; the rest follows by resume. The default is small, so "
        "that the demo shows resumes. 0: all that there are free blocks for",
    )
    parser.add_argument(
        "--work-dir",
        type=Path,
        default=Path("build/demo"),
        metavar="DIR",
        help="directory for the generated models, which later runs use again, and for this run's logs",
    )
    parser.add_argument("--keep-logs", action="store_true", help="keep the servers' logs of a successful run too")
    parser.add_argument(
        "--device", default="cpu", choices=("cpu", "cuda"), help="where the models run; cuda: all three on one GPU"
    )
    # Hidden: one of sglang's own transfer backends instead of the connector, for comparison.
    parser.add_argument("--backend", default=OUR_BACKEND, help=argparse.SUPPRESS)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    try:
        from rich.console import Console

        from sglang_mm_conn.demo.report import print_report
    except ImportError as error:
        print(f"demo: {error}. The demo needs more packages: pip install 'sglang-mm-conn[demo]'", file=sys.stderr)
        return 2
    console = Console(width=None if sys.stdout.isatty() else 120)
    logs = args.work_dir / "logs" / str(os.getpid())
    try:
        outcomes, language_log = _compare(args, logs, console)
    except (ServerError, ValueError) as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        return 1
    except KeyboardInterrupt:
        console.print("interrupted", style="red")
        return 130
    offer = args.first_offer if args.backend == OUR_BACKEND else None
    good = print_report(console, outcomes, language_log, first_offer=offer)
    if good and not args.keep_logs:
        shutil.rmtree(logs, ignore_errors=True)
    else:
        console.print(f"logs: {logs}", markup=False, highlight=False)
    return 0 if good else 1


def _compare(args: argparse.Namespace, logs: Path, console: "Console") -> "tuple[list[Outcome], str]":
    from sglang_mm_conn.demo.chat import ask
    from sglang_mm_conn.demo.report import Outcome

    model = _model(args, console)
    colocated = Server(Launch("colocated", model, device=args.device), logs)
    group = ServerGroup(
        model,
        logs,
        backend=args.backend,
        device=args.device,
        env=_connector_env(args),
        encoder_flags=KINDS[args.model].encoder_flags if args.model in KINDS else (),
    )
    servers = [colocated, *group.servers]
    console.print(f"Starting {', '.join(server.name for server in servers)} (logs in {logs})", highlight=False)
    try:
        for server in servers:
            server.start()
        with console.status("waiting for the servers: half a minute or so"):
            wait_ready(servers, on_ready=lambda server, seconds: _say_ready(console, server, seconds))
        outcomes = []
        for index, question in enumerate(QUESTIONS):
            with console.status(f"asking: {question.name}"):
                rid = f"demo-{index}"
                outcomes.append(
                    Outcome(question, rid, ask(colocated.url, question), ask(group.language.url, question, rid=rid))
                )
            console.print(f"  asked: {question.name}", style="dim", highlight=False)
        return outcomes, group.language.log()
    finally:
        with console.status("stopping the servers"):
            stop_all(servers)


def _model(args: argparse.Namespace, console: "Console") -> Path:
    if args.model not in KINDS:
        directory = Path(args.model)
        if not (directory / "config.json").is_file():
            raise ValueError(f"--model {args.model!r}: neither one of {', '.join(KINDS)} nor the directory of a model")
        return directory.resolve()
    from sglang_mm_conn.demo import tiny_models

    with console.status(f"writing a tiny {args.model} model"):
        return tiny_models.write(args.model, args.work_dir.resolve() / "models" / args.model)


def _connector_env(args: argparse.Namespace) -> dict[str, str]:
    return {
        "SGLANG_MM_CONN_DATA_PATH": args.data_path,
        "SGLANG_EMBEDDING_CACHE_BLOCK_SIZE": str(args.block_size),
        "SGLANG_EMBEDDING_CACHE_BUFFER_SIZE": str(args.blocks),
        "SGLANG_EMBEDDING_DEFAULT_ALLOCATE_BUFFER_SIZE": str(args.first_offer or MOST_FIRST_OFFER),
    }


def _say_ready(console: "Console", server: Server, seconds: float) -> None:
    console.print(f"  {server.name} ready after {seconds:.1f} s at {server.url}", style="dim", highlight=False)


def _at_least(smallest: int) -> Any:
    def number(text: str) -> int:
        value = int(text)
        if value < smallest:
            raise argparse.ArgumentTypeError(f"must be {smallest} or more, not {text}")
        return value

    return number
