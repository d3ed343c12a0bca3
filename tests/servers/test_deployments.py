"""The deployments of docs/deployments.md that need one host, run as they are written there."""

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

from sglang_mm_conn.demo import guard
from sglang_mm_conn.demo.chat import ask
from sglang_mm_conn.demo.questions import QUESTIONS
from sglang_mm_conn.demo.servers import READY_TIMEOUT, STOP_GRACE, free_port
from tests.pages import DEPLOYMENTS, named_block

# The page's environment is this one, and its model is the one that the reference answers for.
ACTIVATE = ". .venv/bin/activate\n"
PORTS = re.compile(r"\b(?:30\d{3}|89\d{2})\b")


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


def _wait_for(line: str, log: Path) -> None:
    deadline = time.monotonic() + READY_TIMEOUT
    while line not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.2)


def _wait_healthy(url: str, log: Path) -> None:
    deadline = time.monotonic() + READY_TIMEOUT
    while True:
        with contextlib.suppress(requests.RequestException):
            if requests.get(f"{url}/health", timeout=5).ok:
                return
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.5)


@dataclass(frozen=True)
class Deployment:
    """Blocks of the page that belong together, the ports of its language servers, and what the logs must say."""

    blocks: tuple[str, ...]
    ask: tuple[str, ...]
    says: tuple[str, ...]
    joins: bool = False  # the encoder must have joined before it is asked
    env: str = ""


DEPLOYMENTS_AS_WRITTEN = {
    "one host": Deployment(("one host",), ("30000",), ("Embedding pool: ", "path=shm", "Embedding sent: ")),
    "several encoders": Deployment(("several encoders",), ("30000",), ("_local_part_1",)),
    "join and leave": Deployment(("joining encoder",), ("30000",), ("Registered encoder URL",), joins=True),
    "dp encoder, tp language server": Deployment(
        ("data-parallel encoder", "tensor-parallel language server"), ("30000",), ("Embedding shared: ",),
        env="export SGLANG_CPU_OMP_THREADS_BIND='0|1'",
    ),
    "dp encoder, tokenizer workers": Deployment(
        ("data-parallel encoder", "tokenizer workers"), ("30000",), ("Start multi-tokenizer worker process",)
    ),
    "two language servers": Deployment(("two language servers",), ("30000", "30010"), ("Embedding received: ",)),
}  # fmt: skip


@pytest.mark.parametrize("name", DEPLOYMENTS_AS_WRITTEN)
def test_a_deployment_serves_as_it_is_written(
    name: str, reference: Callable[..., Any], shared_group: Any, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    shared_group.stop()
    deployment = DEPLOYMENTS_AS_WRITTEN[name]
    page = DEPLOYMENTS.read_text()
    appendix = named_block(page, "cpu")
    assert appendix.startswith(ACTIVATE)
    appendix = f"PATH={Path(sys.executable).parent}:$PATH\n" + appendix.removeprefix(ACTIVATE)
    appendix = appendix.replace("$PWD/build/demo/models/qwen2_5_vl", str(tiny_model("qwen2_5_vl")))
    commands = ""
    for block in deployment.blocks:
        text = named_block(page, block)
        commands += f"{deployment.env}\n{text}" if "--language-only" in text else text
    # What is changed: ports, which another test may have; and --sleep-on-idle, since an idle scheduler takes a core.
    ports = {number: str(free_port()) for number in sorted(set(PORTS.findall(commands)))}
    commands = PORTS.sub(lambda match: ports[match[0]], commands)
    bootstrap = "" if "--encoder-bootstrap-port" in commands else f" --encoder-bootstrap-port {free_port()}"
    commands = commands.replace("--language-only", f"--language-only --sleep-on-idle{bootstrap}")

    log = tmp_path / "servers.log"
    with _running(f"{appendix}{commands}wait\n", log):
        for number in sorted(ports, reverse=True):
            if number.startswith("30"):
                _wait_healthy(f"http://127.0.0.1:{ports[number]}", log)
        _wait_for("Registered encoder URL" if deployment.joins else "registered with process", log)
        for port in deployment.ask:
            for question in (QUESTIONS[1], QUESTIONS[3]):
                got = ask(f"http://127.0.0.1:{ports[port]}", question)
                assert got.same_as(reference("qwen2_5_vl").answer(question)), (question.name, got)
        said = log.read_text()
    for line in ("Embeddings travel over conn_multimodal (server ", "Embedding received: ", *deployment.says):
        assert line in said, line
