"""Runs what docs/deployments.md tells a user to type, on the CPU test bed that its appendix describes."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import requests

from sglang_mm_conn.demo import guard
from sglang_mm_conn.demo.servers import READY_TIMEOUT, STOP_GRACE
from tests.pages import DEPLOYMENTS, named_block

# The page's environment is this one, and its model is the one that the reference answers for.
_ACTIVATE = ". .venv/bin/activate\n"
_MODEL = "$PWD/build/demo/models/qwen2_5_vl"


def block(name: str) -> str:
    return named_block(DEPLOYMENTS.read_text(), name)


def on_a_cpu(commands: str, model: Path) -> str:
    """The commands below the appendix's; the shell stays as long as its servers."""
    appendix = block("cpu")
    assert appendix.startswith(_ACTIVATE) and _MODEL in appendix
    appendix = f"PATH={Path(sys.executable).parent}:$PATH\n" + appendix.removeprefix(_ACTIVATE)
    return f"{appendix.replace(_MODEL, str(model))}{commands}wait\n"


@contextlib.contextmanager
def running(script: str, log: Path, *, within: tuple[str, ...] = ()) -> Iterator[None]:
    """A shell with all that it starts, in its log's directory; gone at the end. ``within``: what starts the shell."""
    with log.open("w") as out:
        shell = subprocess.Popen(
            [sys.executable, "-I", "-S", os.fspath(guard.__file__), str(STOP_GRACE), *within, "bash", "-euc", script],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=out, cwd=log.parent,
        )  # fmt: skip
        assert shell.stdin is not None and shell.stdout is not None
        try:
            yield
        finally:
            shell.stdin.close()
            shell.wait(STOP_GRACE + 10)
            shell.stdout.close()


def wait_for(line: str, log: Path) -> None:
    _wait(lambda: line in log.read_text(), log)


def wait_healthy(url: str, log: Path) -> None:
    def healthy() -> bool:
        with requests.Session() as http, contextlib.suppress(requests.RequestException):
            http.trust_env = False  # no proxy
            return http.get(f"{url}/health", timeout=5).ok
        return False

    _wait(healthy, log)


def _wait(condition: Callable[[], bool], log: Path) -> None:
    deadline = time.monotonic() + READY_TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.5)
