"""Reads and writes the documents: shell commands in them, and the blocks that are made from code and results.

``python -m tests.pages --write`` renews these blocks. ``tests/test_docs.py`` fails where one is stale.
"""

import argparse
import ast
import importlib
import inspect
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path

from sglang_mm_conn.bench.markdown_blocks import insert, markers

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "sglang_mm_conn"
DEPLOYMENTS = ROOT / "docs" / "deployments.md"
_BLOCK = re.compile(r"^(?:<!-- run: (?P<name>[^\n]*) -->\n)?```sh\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


def shell_blocks(page: str) -> list[str]:
    return [match["text"] for match in _BLOCK.finditer(page)]


def named_block(page: str, name: str) -> str:
    """The block below the line `<!-- run: name -->`."""
    found = [match["text"] for match in _BLOCK.finditer(page) if match["name"] == name]
    if len(found) != 1:
        raise ValueError(f"{len(found)} blocks are named {name!r}")
    return found[0]


def sglang_commands(block: str) -> list[list[str]]:
    """The arguments of every `sglang serve` in a block, without what starts it and what the shell takes."""
    commands = []
    for line in block.replace("\\\n", " ").splitlines():
        _, serve, arguments = line.partition("sglang serve ")
        if serve:
            commands.append(shlex.split(arguments.strip().removesuffix("&")))
    return commands


# -- the blocks that `--write` renews ------------------------------------------------------------------------------

# Folders in the order of the layers. bench and demo are one row each.
FOLDERS = ("core", "memory", "datapath", "control", "connector", ".", "sglang_plugin", "cli")
ONE_ROW = ("demo", "bench")
# Every table in them that is named *_TRANSITIONS becomes a diagram.
STATE_MODULES = ("sglang_mm_conn.core.states",)
BUILTIN = ("zmq_to_scheduler", "mooncake_builtin")


def first_sentence(path: Path) -> str:
    """Of a module's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    paragraph = " ".join(text.partition("\n\n")[0].split())
    return re.split(r"(?<=[.!?]) (?=[A-Z`])", paragraph)[0]


def file_map() -> str:
    lines = ["| file | what it is |", "|---|---|"]
    folders = {path.parent.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")}
    roots = {folder.split("/")[0] for folder in folders}
    for root in (*FOLDERS, *sorted(roots - {*FOLDERS, *ONE_ROW})):
        for folder in sorted(name for name in folders if name.split("/")[0] == root):
            lines += _folder_rows(folder)
    lines += [_row(f"**{name}/**", PACKAGE / name / "__init__.py") for name in ONE_ROW]
    return "\n".join(lines)


def _folder_rows(folder: str) -> Iterator[str]:
    path = PACKAGE / folder
    if folder != ".":
        yield _row(f"**{folder}/**", path / "__init__.py")
    for module in sorted(path.glob("*.py")):
        if module.name != "__init__.py":
            yield _row(f"`{module.relative_to(PACKAGE).as_posix()}`", module)


def _row(name: str, module: Path) -> str:
    return f"| {name} | {first_sentence(module).replace('``', '`').replace('|', chr(92) + '|')} |"


def state_diagrams() -> str:
    parts = []
    for module in map(importlib.import_module, STATE_MODULES):
        for name, table in vars(module).items():
            if name.endswith("_TRANSITIONS"):
                parts += [_diagram(name, table)]
    return "\n\n".join(parts)


def _diagram(name: str, table: dict[Enum, frozenset[Enum]]) -> str:
    states = type(next(iter(table)))
    lines = [f"**`{states.__name__}`** (`{name}`): {inspect.getdoc(states)}", "", "```mermaid", "stateDiagram-v2"]
    lines += [f"    [*] --> {next(iter(states)).name}"]
    for source, targets in table.items():
        lines += [f"    {source.name} --> {target.name}" for target in states if target in targets]
        lines += [] if targets else [f"    {source.name} --> [*]"]
    lines += ["```", "", "| state | meaning |", "|---|---|"]
    comments = dict(re.findall(r"^ +(\w+) = .*?  # (.+)$", inspect.getsource(states), re.MULTILINE))
    lines += [f"| `{state.name}` | {comments[state.name]} |" for state in states if state.name in comments]
    return "\n".join(lines)


def _transfers() -> dict[str, dict[str, list[str]]]:
    """The rows of docs/results/transfers.md by size and transport; cells by their place, not by their heading."""
    text = (ROOT / "docs" / "results" / "transfers.md").read_text()
    sizes: dict[str, dict[str, list[str]]] = {}
    for size, table in re.findall(r"^### (\d+ [KMG]iB)$(.*?)(?=^#|\Z)", text, re.MULTILINE | re.DOTALL):
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()]
        sizes[size] = {row[0]: row for row in rows if len(row) > 7}
    return sizes


def transfer_headline() -> str:
    lines = [
        "| size | memcpy, ms | `shm`, ms | `mooncake`, ms | fastest built-in, ms | `shm` speed-up | share of memcpy |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for size, rows in _transfers().items():
        builtin = min((rows[name] for name in BUILTIN), key=lambda row: float(row[1]))
        shm = rows["shm"]
        times = (rows["memcpy"][1], shm[1], rows["mooncake"][1], builtin[1], f"{shm[7]} times", shm[5])
        lines.append(f"| {size} | {' | '.join(times)} |")
    return "\n".join(lines)


def transfer_sentence(size: str = "16 MiB") -> str:
    shm = _transfers()[size]["shm"]
    return (
        f"**{size} in {float(shm[1]):.1f} ms: {int(float(shm[7]))} times as fast as sglang's fastest built-in "
        f"transport, {shm[5]} of memcpy's speed.**"
    )


def servers_headline() -> str:
    """The comparisons below the table of docs/results/servers.md."""
    text = (ROOT / "docs" / "results" / "servers.md").read_text()
    return "\n".join(re.findall(r"^- .*$", text, re.MULTILINE))


def reliability_headline() -> str:
    """What each long run printed, and in how many schedules the simulator noticed that a protection was gone."""
    lines = ["| run | what it printed |", "|---|---|"]
    runs = {"faults": "faults", "simulator": "schedules", "fuzz": "frames and floods", "soak": "rooms"}
    runs["fleet"] = "whole servers"
    for name, title in runs.items():
        text = (ROOT / "docs" / "results" / f"{name}.md").read_text()
        printed = re.findall(r"printed this:\s+(\S.*)$", text, re.MULTILINE)
        lines += [f"| [{title}](results/{name}.md) | {line} |" for line in printed]
        within = re.findall(r"^\| [^|]+ \| (\d+) \|$", text, re.MULTILINE)
        if within and "| not in " not in text:
            most = max(map(int, within))
            line = f"{len(within)} protections removed one at a time: each time a violation was reported, within {most}"
            lines.append(f"| [protections](results/{name}.md) | {line} schedules. |")
    return "\n".join(lines)


GENERATED: dict[str, tuple[Path, Callable[[], str]]] = {
    "file map": (ROOT / "docs" / "architecture.md", file_map),
    "state diagrams": (ROOT / "docs" / "architecture.md", state_diagrams),
    "transfer headline": (ROOT / "docs" / "performance.md", transfer_headline),
    "reliability headline": (ROOT / "docs" / "reliability.md", reliability_headline),
    "servers headline": (ROOT / "docs" / "performance.md", servers_headline),
    "transfer sentence": (ROOT / "README.md", transfer_sentence),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.pages", description=__doc__)
    parser.add_argument("--write", action="store_true", help="renew the blocks (default: only name the stale ones)")
    options = parser.parse_args()
    stale = []
    for name, (document, made) in GENERATED.items():
        old = document.read_text()
        new = insert(old, made(), name)
        if new != old:
            stale.append(f"{document.relative_to(ROOT)}: {markers(name)[0]}")
            if options.write:
                document.write_text(new)
    print("\n".join(stale) or "every block is up to date")
    return 1 if stale and not options.write else 0


if __name__ == "__main__":
    sys.exit(main())
