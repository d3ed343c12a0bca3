"""What the pages tell a user to type exists: commands, options, variables, and the lines of sglang that they name."""

import argparse
import importlib
import importlib.util
import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from sglang_mm_conn.__main__ import parser
from sglang_mm_conn.bench import markdown_blocks
from sglang_mm_conn.bench.markdown_blocks import RESULTS, SERVERS, STREAMED, TRANSFERS
from sglang_mm_conn.core.settings import Settings
from sglang_mm_conn.demo.launch import Launch
from tests.faults import table
from tests.fleet import __main__ as fleet
from tests.fuzz import __main__ as fuzz
from tests.gpu import document as gpu
from tests.pages import DEPLOYMENTS, GENERATED, ROOT, named_block, sglang_commands, shell_blocks
from tests.parity import __main__ as parity
from tests.simulator import __main__ as simulator
from tests.soak import __main__ as soak

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")), ROOT / "examples" / "README.md"]
PAGE = DEPLOYMENTS.read_text()
# Options of other programs: docker, pip and make.
OTHER_OPTIONS = {"--gpus", "--network", "--ipc", "--shm-size", "--help"}
# Those of `make faults` and its like.
TOOLS = [path.parent.name for path in sorted((ROOT / "tests").glob("*/__main__.py"))]
# sglang reads them from the environment without declaring them.
UNDECLARED = {"SGLANG_HOST_IP", "SGLANG_USE_CPU_ENGINE", "SGLANG_CPU_OMP_THREADS_BIND"}
# What is named in the page, and what stands there.
LINES_OF_SGLANG = {
    ("configs/model_config.py", 908): "self.hf_config.encoder_only = encoder_only",
    ("models/qwen3_vl.py", 1347): 'self.config.encoder_only = getattr(config, "encoder_only", False)',
    ("disaggregation/encoder/preprocessor.py", 808): "fps_list = [",
    ("multimodal/processors/qwen_vl.py", 1042): "if self.hf_config.model_type in (",
    ("multimodal/processors/qwen_vl.py", 1066): "audio_item = next(",
}
# What commands write into docs/results: the page, and the markers of their part.
_BENCH = {name: markdown_blocks.document(ROOT / RESULTS, name) for name in (TRANSFERS, STREAMED, SERVERS)}
_GENERATED = {
    **{name: (document, *markdown_blocks.markers(name)) for name, document in _BENCH.items()},
    "gpu": (gpu.DOCUMENT, *markdown_blocks.markers(gpu.BLOCK)),
    "faults": (table.DOCUMENT, table.BEGIN, table.END),
    "simulator": (simulator.DOCUMENT, *simulator.MARKERS),
    "simulator --prove": (simulator.DOCUMENT, *simulator.PROOF_MARKERS),
    "fuzz": (fuzz.DOCUMENT, *fuzz.MARKERS),
    "fuzz --flood": (fuzz.DOCUMENT, *fuzz.FLOOD_MARKERS),
    "soak": (soak.DOCUMENT, *soak.MARKERS),
    "fleet": (fleet.DOCUMENT, *fleet.MARKERS),
    "parity": (parity.DOCUMENT, *parity.MARKERS),
}


def _sglang(code: str, given: str = "") -> str:
    """Run in a process of its own: sglang reads its environment when it is imported."""
    environment = Launch("encoder", Path(".")).environment()
    run = subprocess.run(
        [sys.executable, "-c", code], input=given, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout.splitlines()[-1]


def _our_options() -> set[str]:
    """Of the command line and of the tools in tests/."""
    waiting = [parser(), *(importlib.import_module(f"tests.{name}.__main__").arguments() for name in TOOLS)]
    options: set[str] = set()
    while waiting:
        for action in waiting.pop()._actions:
            options.update(action.option_strings)
            if isinstance(action, argparse._SubParsersAction):
                waiting += action.choices.values()
    return options


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_of_commands_is_shell(page: Path) -> None:
    for block in shell_blocks(page.read_text()):
        check = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True, check=False)
        assert check.returncode == 0 and not check.stderr, (block, check.stderr)


def test_sglang_reads_every_command_option_and_variable_that_a_page_names() -> None:
    commands = [command for block in shell_blocks(PAGE) for command in sglang_commands(block)]
    assert len(commands) >= 15
    appendix = named_block(PAGE, "cpu").replace("\\\n", " ")
    for_cpus = re.search(r'command sglang "\$@" (.*)', appendix)
    assert for_cpus
    commands += [[*command, *for_cpus[1].split()] for command in commands]
    said = json.loads(
        _sglang(
            "import argparse, json, sys\n"
            "from sglang.srt.environ import envs\n"
            "from sglang.srt.plugins import load_plugins\n"
            "load_plugins()\n"
            "from sglang.srt.server_args import ServerArgs\n"
            "parser = argparse.ArgumentParser(exit_on_error=False)\n"
            "ServerArgs.add_cli_args(parser)\n"
            "for command in json.load(sys.stdin):\n"
            "    parser.parse_args(command)\n"
            "options = [option for action in parser._actions for option in action.option_strings]\n"
            "print(json.dumps({'options': options, 'variables': [name for name in dir(envs) if name.isupper()]}))\n",
            json.dumps(commands),
        )
    )
    ours = {field.metadata["env"] for field in fields(Settings)}
    for page in PAGES:
        text = page.read_text()
        options = set(re.findall(r"(?<![\w|-])--[a-z]+(?:-[a-z]+)*(?![\w-])", text)) - OTHER_OPTIONS - _our_options()
        assert options <= set(said["options"]), (page.name, options - set(said["options"]))
        variables = set(re.findall(r"\bSGLANG_[A-Z0-9_]+\b", text))
        known = ours | set(said["variables"])
        assert variables <= known | UNDECLARED, (page.name, variables - known)


def test_the_mooncake_engine_knows_every_variable_that_a_page_names() -> None:
    spec = importlib.util.find_spec("mooncake")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("no Mooncake engine is installed")
    engine = b"".join(path.read_bytes() for path in Path(spec.submodule_search_locations[0]).glob("engine*.so"))
    for page in PAGES:
        for name in set(re.findall(r"\bMC_[A-Z0-9_]+\b", page.read_text())):
            assert name.encode() in engine, (page.name, name)


def test_the_lines_of_sglang_that_the_page_names_say_what_it_says_of_them() -> None:
    spec = importlib.util.find_spec("sglang")
    assert spec is not None and spec.submodule_search_locations
    root = Path(spec.submodule_search_locations[0]) / "srt"
    for (name, number), text in LINES_OF_SGLANG.items():
        assert text in (root / name).read_text().splitlines()[number - 1], (name, number)
    named = set(re.findall(r"`([\w/]+\.py)`,\s+line\s+(\d+)", PAGE))
    assert {(name, int(number)) for name, number in named} <= set(LINES_OF_SGLANG)
    assert len(named) == 4


def test_every_link_of_a_page_leads_somewhere() -> None:
    for page in PAGES:
        text = page.read_text()
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            path, _, anchor = target.partition("#")
            if path.startswith("http"):
                continue
            other = page if not path else page.parent / path
            assert other.exists(), (page.name, target)
            if anchor:
                titles = re.findall(r"^#+ (.*)$", other.read_text(), re.MULTILINE)
                assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, target


def test_every_file_that_a_page_names_exists() -> None:
    for page in PAGES:
        if page in (DEPLOYMENTS, ROOT / "docs" / "results" / "gpu.md"):  # they name files of sglang and Mooncake
            continue
        for name in re.findall(r"`((?:\w+/)+\w+\.\w+)`", page.read_text()):
            assert any((root / name).exists() for root in (ROOT, ROOT / "sglang_mm_conn")) or name.startswith(
                "build/"
            ), (
                page.name,
                name,
            )


@pytest.mark.parametrize("name", _GENERATED)
def test_the_page_that_a_command_writes_has_its_markers_once_each_and_in_order(name: str) -> None:
    document, begin, end = _GENERATED[name]
    text = document.read_text()
    assert text.count(begin) == text.count(end) == 1 and text.index(begin) < text.index(end)


@pytest.mark.parametrize("name", GENERATED)
def test_a_block_made_from_code_or_results_is_up_to_date(name: str) -> None:
    document, made = GENERATED[name]
    text = document.read_text()
    assert markdown_blocks.insert(text, made(), name) == text, "run `python -m tests.pages --write`"
