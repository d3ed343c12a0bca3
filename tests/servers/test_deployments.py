"""The first deployment of docs/deployments.md, run as it is written there."""

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import requests

from sglang_mm_conn.demo import guard
from sglang_mm_conn.demo.chat import ask
from sglang_mm_conn.demo.questions import QUESTIONS
from sglang_mm_conn.demo.servers import READY_TIMEOUT, STOP_GRACE, free_port
from tests.pages import DEPLOYMENTS, named_block

# The page's environment is this one, and its model is the one that the reference answers for.
ACTIVATE = ". .venv/bin/activate\n"
PORTS = re.compile(r"\b30\d{3}\b")


@contextlib.contextmanager
def _running(script: str, log: Path) -> Iterator[None]:
    """A shell with all that it starts; gone at the end."""
    with log.open("w") as out:
        shell = subprocess.Popen(
            [sys.executable, "-I", "-S", os.fspath(guard.__file__), str(STOP_GRACE), "bash", "-euc", script],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=out,
        )  # fmt: skip
        assert shell.stdin is not None and shell.stdout is not None
        try:
            yield
        finally:
            shell.stdin.close()
            shell.wait(STOP_GRACE + 10)
            shell.stdout.close()


def _wait_healthy(url: str, log: Path) -> None:
    deadline = time.monotonic() + READY_TIMEOUT
    while True:
        with contextlib.suppress(requests.RequestException):
            if requests.get(f"{url}/health", timeout=5).ok:
                return
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.5)


def test_one_host(
    reference: Callable[..., Any], shared_group: Any, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    shared_group.stop()
    page = DEPLOYMENTS.read_text()
    appendix = named_block(page, "cpu")
    assert appendix.startswith(ACTIVATE)
    appendix = f"PATH={Path(sys.executable).parent}:$PATH\n" + appendix.removeprefix(ACTIVATE)
    appendix = appendix.replace("$PWD/build/demo/models/qwen2_5_vl", str(tiny_model("qwen2_5_vl")))
    commands = named_block(page, "one host")
    ports = {number: str(free_port()) for number in sorted(set(PORTS.findall(commands)))}
    assert list(ports) == ["30000", "30001"]
    commands = PORTS.sub(lambda match: ports[match[0]], commands)
    # The one thing added: a second language server of another test may have the default port.
    commands = commands.replace("--encoder-urls", f"--encoder-bootstrap-port {free_port()} --encoder-urls")

    log = tmp_path / "servers.log"
    with _running(f"{appendix}{commands}wait\n", log):
        for port in ports.values():
            _wait_healthy(f"http://127.0.0.1:{port}", log)
        for question in QUESTIONS[:3]:
            got = ask(f"http://127.0.0.1:{ports['30000']}", question)
            assert got.same_as(reference("qwen2_5_vl").answer(question)), (question.name, got)
    said = log.read_text()
    for line in ("Embeddings travel over conn_multimodal (server ", "Embedding pool: ", "path=shm", "Embedding sent: "):
        assert line in said, line
