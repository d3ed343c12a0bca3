"""The layers of docs/architecture.md, and how long a file and an ``__init__`` may be: read from the source.

Nothing is imported. The checks take sources as strings, so that a planted fault shows that each of them works.
"""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = "sglang_mm_conn"
ROOT = Path(__file__).resolve().parents[1] / PACKAGE

# A folder (or module) imports itself and those of earlier lines; folders of one line do not import each other.
LAYERS = (
    {"core"},
    {"control", "memory"},
    {"datapath"},
    {"connector"},
    {"conn_multimodal"},
    {"sglang_plugin"},
    {"demo"},
    {"bench", "cli"},
    {"__main__"},
)
# Beside that: a data path moves bytes and knows of no connection.
NEVER = {("datapath", "control")}
# Who may import sglang: its shapes, its hooks, and the benchmark of its own transports.
MAY_IMPORT_SGLANG = ("conn_multimodal", "sglang_plugin", "bench.transports.builtin")
# core is data and logic: no IO, no threads, no clock, and nothing that is drawn at random but names.
PURE = {
    "__future__", "abc", "bisect", "collections", "contextlib", "dataclasses", "enum", "functools", "hashlib", "heapq",
    "http", "itertools", "math", "msgspec", "operator", "re", "statistics", "typing",
}  # fmt: skip
ALSO_IN_CORE = {("core.rooms", "secrets")}

FILE_LINES, INIT_LINES = 370, 45
# Longer ones, with the length that they may have until they are cut. One that is short enough again must leave.
LONG_FILES: dict[str, int] = {}
LONG_INITS: dict[str, int] = {}
# Modules that import one another (within functions). A circle that is gone must leave.
CIRCLES: set[frozenset[str]] = set()

Sources = dict[str, str]  # by module, without the package's name; "" is the package itself
Graph = dict[str, set[str]]


def sources() -> Sources:
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text(encoding="utf-8")
    return found


def imports(given: Sources) -> tuple[Graph, Graph]:
    """What each module imports, also for types and within functions: of the package, and of others (first name)."""
    ours: Graph = {module: set() for module in given}
    others: Graph = {module: set() for module in given}
    for module, source in given.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                names = [name.name for name in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{module}, line {node.lineno}: a relative import"
                names = [f"{node.module}.{name.name}" for name in node.names]
            else:
                continue
            for name in names:
                first, _, rest = name.partition(".")
                if first == PACKAGE:
                    # The last part of `from module import name` is a module or a name in one.
                    ours[module].add(rest if rest in given else rest.rpartition(".")[0])
                else:
                    others[module].add(first)
    return ours, others


def layer_faults(ours: Graph) -> list[str]:
    rank = {folder: number for number, folders in enumerate(LAYERS) for folder in folders}
    faults = []
    for module, imported in ours.items():
        mine = module.partition(".")[0]
        for other in imported:
            theirs = other.partition(".")[0]
            if mine == theirs or (module and not other):  # the package itself holds the version alone
                continue
            upward = mine not in rank or theirs not in rank or rank[theirs] >= rank[mine]
            if upward or (mine, theirs) in NEVER:
                faults.append(f"{module or PACKAGE} imports {other}")
    return sorted(faults)


def sglang_faults(others: Graph) -> list[str]:
    allowed = tuple(f"{name}." for name in MAY_IMPORT_SGLANG)
    return sorted(name for name, found in others.items() if "sglang" in found and not f"{name}.".startswith(allowed))


def core_faults(others: Graph) -> list[str]:
    return sorted(
        f"{module} imports {name}"
        for module, found in others.items()
        if module.partition(".")[0] == "core"
        for name in found - PURE
        if (module, name) not in ALSO_IN_CORE
    )


def circles(ours: Graph) -> set[frozenset[str]]:
    """Every group of modules each of which reaches all others of it."""
    reached: Graph = {}
    for module in ours:
        waiting, seen = list(ours[module]), set()
        while waiting:
            if (name := waiting.pop()) not in seen:
                seen.add(name)
                waiting += ours.get(name, ())
        reached[module] = seen
    return {
        frozenset(other for other in seen if module in reached[other])
        for module, seen in reached.items()
        if module in seen
    }


def init_lengths(given: Sources) -> dict[str, int]:
    return {
        f"{module}.{owner.name}": node.end_lineno - node.lineno + 1
        for module, source in given.items()
        for owner in ast.walk(ast.parse(source))
        if isinstance(owner, ast.ClassDef)
        for node in owner.body
        if isinstance(node, ast.FunctionDef) and node.name == "__init__" and node.end_lineno is not None
    }


def length_faults(lengths: dict[str, int], limit: int, exceptions: dict[str, int]) -> list[str]:
    too_long = [
        f"{name} has {length} lines, at most {exceptions.get(name, limit)} are allowed"
        for name, length in lengths.items()
        if length > exceptions.get(name, limit)
    ]
    needless = [f"{name} is an exception no more" for name in exceptions if lengths.get(name, 0) <= limit]
    return sorted(too_long + needless)


def test_a_folder_imports_lower_ones_only() -> None:
    ours, others = imports(sources())
    assert len(ours) > 50
    assert layer_faults(ours) == []
    assert sglang_faults(others) == []
    assert core_faults(others) == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circles(imports(sources())[0]) == CIRCLES


def test_no_file_and_no_init_is_too_long() -> None:
    files = {module: len(source.splitlines()) for module, source in sources().items()}
    assert length_faults(files, FILE_LINES, LONG_FILES) == []
    assert length_faults(init_lengths(sources()), INIT_LINES, LONG_INITS) == []


def test_planted_faults_are_found() -> None:
    ours, others = imports(
        {
            "": "",
            "core.states": "import time, re\n",
            "core.rooms": "import secrets\nfrom sglang_mm_conn import __version__\n",
            "memory.pool": "from sglang_mm_conn.core.states import Poll\nimport sglang_mm_conn.control.loop\n",
            "control.loop": "def run():\n    from sglang_mm_conn.connector import ends\n    import sglang.srt.utils\n",
            "connector.ends": "from sglang_mm_conn.control.loop import run\n",
            "datapath.base": "from sglang_mm_conn.control.loop import run\n",
            "misc": "from sglang_mm_conn.core.rooms import new_id\n",
            "sglang_plugin.flag": "from sglang.srt import utils\n",
        }
    )
    assert layer_faults(ours) == [
        "control.loop imports connector.ends",
        "datapath.base imports control.loop",
        "memory.pool imports control.loop",
        "misc imports core.rooms",
    ]
    assert sglang_faults(others) == ["control.loop"]
    assert core_faults(others) == ["core.states imports time"]
    assert circles(ours) == {frozenset({"control.loop", "connector.ends"})}


def test_what_is_too_long_is_found_and_so_is_an_exception_that_nothing_needs() -> None:
    assert length_faults({"a": 5, "b": 6, "c": 7, "d": 9, "e": 2}, 5, {"c": 7, "d": 8, "e": 9, "f": 9}) == [
        "b has 6 lines, at most 5 are allowed",
        "d has 9 lines, at most 8 are allowed",
        "e is an exception no more",
        "f is an exception no more",
    ]
    source = "class C:\n    def __init__(self):\n        self.a = 1\n        self.b = 2\n"
    assert init_lengths({"m": source}) == {"m.C": 3}
