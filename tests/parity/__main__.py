"""``python -m tests.parity``: forms of requests, asked of a colocated sglang, and of encoders and a language server."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.progress import track

from sglang_mm_conn.demo import tiny_models
from sglang_mm_conn.memory.segment import sweep_stale_segments
from tests.connector.processes import ROOT
from tests.faults.table import write
from tests.parity.all_forms import FORMS
from tests.parity.compare import Compared, compare
from tests.parity.deployments import PATHS, SERVERS, pair
from tests.parity.engine import compare_engines
from tests.parity.files import Files
from tests.parity.form import Form
from tests.parity.lora import write_adapter
from tests.parity.pictures import ALL as MEDIA
from tests.parity.table import Row, Table

DOCUMENT = ROOT / "docs" / "requests.md"
MARKERS = ("<!-- parity:begin -->", "<!-- parity:end -->")
DEFAULT = "qwen2_5_vl"
WORK = ROOT / "build" / "parity"


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.parity",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=f"""\
Asks {len(FORMS)} forms of requests of a colocated sglang, and of two encoders (--encoder-only) with a language server
(--language-only), all with the same tiny model on the CPU. The same must be: status, text, usage, reason of the end,
log-probabilities and hidden states (to 1e-3), ids, the joined text of a stream. An error must have a short cause that
names nothing of the servers' inside. After each form the language server must hold nothing.""",
        epilog="""\
examples:
  python -m tests.parity                               one model, shared memory: minutes
  python -m tests.parity --kind all --data-path all    every tiny model, both data paths
  python -m tests.parity --only none --and a.json --and b.json --write
                                                       the table of two runs that --json wrote
  python -m tests.parity --only "a batch"              the forms with this in their name or group
  python -m tests.parity --write                       the table goes into docs/requests.md

Ends with 1 where something differs without a known reason; the servers' logs are kept then.""",
    )
    parser.add_argument(
        "--kind", action="append", choices=[*tiny_models.KINDS, "all"], help=f"of model (default: {DEFAULT})"
    )
    parser.add_argument("--data-path", choices=[*PATHS, "all"], default="shm", help="default: %(default)s")
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help="forms with TEXT in group or name")
    parser.add_argument("--servers", choices=list(SERVERS), action="append", help="forms for these servers")
    parser.add_argument(
        "--and", action="append", default=[], dest="and_", type=Path, metavar="FILE",
        help="put the rows of an earlier run, which --json wrote, into the table, too",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE")
    parser.add_argument("--write", action="store_true", help="put the table into docs/requests.md")
    return parser


def chosen(options: argparse.Namespace, kind: str) -> list[Form]:
    def wanted(form: Form) -> bool:
        named = not options.only or any(text in f"{form.group}: {form.name}" for text in options.only)
        return named and (not form.kinds or kind in form.kinds) and (
            not options.servers or form.servers in options.servers
        )  # fmt: skip

    return sorted(filter(wanted, FORMS), key=lambda form: list(SERVERS).index(form.servers))


def run(forms: Sequence[Form], kind: str, data_path: str, logs: Path, console: Console) -> Iterator[Compared]:
    model = tiny_models.write(kind, WORK / "models" / kind)
    with Files(logs / "media", MEDIA) as files:
        for servers, of_servers in groupby(forms, key=lambda form: form.servers):
            left = list(of_servers)
            if servers == "engine":
                console.print(f"two programs that use sglang.Engine: {kind}, {data_path}")
                yield from compare_engines(left, model, logs / f"{kind}-engine-{data_path}", data_path)
                continue
            lora = str(write_adapter(model, WORK / "adapters" / kind)) if servers == "lora" else ""
            while left:
                started = f"{kind}, {servers}, {data_path}"
                console.print(f"starting servers: {started}")
                directory = logs / f"{kind}-{servers}-{data_path}-{len(left)}"
                with pair(kind, servers, model, directory, data_path, lora) as both:
                    for number, form in enumerate(track(left, started, console=console)):
                        compared = compare(form, both, files)
                        yield compared
                        if not all(server.alive for server in both.servers):
                            left = left[number + 1 :]
                            break
                    else:
                        left = []


def main() -> int:
    options = arguments().parse_args()
    console, table = Console(), Table(FORMS)
    for earlier in options.and_:
        table.read(earlier)
    kinds = options.kind or [DEFAULT]
    kinds = list(tiny_models.KINDS) if "all" in kinds else kinds
    paths = PATHS if options.data_path == "all" else (options.data_path,)
    logs = Path(tempfile.mkdtemp(prefix="parity-", dir=_made(WORK)))
    for kind in kinds:
        for path in paths:
            for one in run(chosen(options, kind), kind, path, logs, console):
                table.rows.append(Row.of(kind, path, one))
                if one.difference:
                    mark = "differs, as known" if one.ok else "DIFFERS"
                    line = f"{mark}: {one.form.group}: {one.form.name}: {one.difference}"
                    console.print(line, markup=False, highlight=False)
    sweep_stale_segments()
    console.print(table.summary())
    if options.json:
        table.save(options.json)
    if options.write:
        write(table.in_markdown(), DOCUMENT, MARKERS)
    if table.bad(table.rows):
        console.print(f"logs of the servers: {logs}")
    return 1 if table.bad(table.rows) else 0


def _made(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    return directory


if __name__ == "__main__":
    sys.exit(main())
