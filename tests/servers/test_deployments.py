"""The deployments of docs/deployments.md that need one host, run as they are written there."""

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sglang_mm_conn.demo.chat import ask
from sglang_mm_conn.demo.questions import QUESTIONS
from sglang_mm_conn.demo.servers import free_port
from tests.servers.clients import ask_both
from tests.servers.doc_commands import block, on_a_cpu, running, wait_for, wait_healthy

_PORTS = re.compile(r"\b(?:30\d{3}|89\d{2})\b")
ASKED = (QUESTIONS[1], QUESTIONS[3])


@dataclass(frozen=True)
class Deployment:
    """Blocks of the page that belong together, the ports of its language servers, and what the logs must say."""

    blocks: tuple[str, ...]
    ask: tuple[str, ...]
    says: tuple[str, ...]
    joins: bool = False  # the encoder must have joined before it is asked
    env: str = ""
    decode: str = ""  # what the appendix adds to a decode server


DEPLOYMENTS_AS_WRITTEN = {
    "one host": Deployment(("one host",), ("30000",), ("Embedding pool: ", "path=shm", "Embedding sent: ")),
    "several encoders": Deployment(("several encoders",), ("30000",), ("_local_part_1",)),
    "join and leave": Deployment(("joining encoder",), ("30000",), ("Registered encoder URL",), joins=True),
    "dp encoder, tp language server": Deployment(
        ("data-parallel encoder", "tensor-parallel language server"), ("30000",), ("Embedding shared: ",),
        env="export SGLANG_CPU_OMP_THREADS_BIND='0|1'\n",
    ),
    "dp encoder, tokenizer workers": Deployment(
        ("data-parallel encoder", "tokenizer workers"), ("30000",), ("Start multi-tokenizer worker process",)
    ),
    "two language servers": Deployment(("two language servers",), ("30000", "30010"), ("Embedding received: ",)),
}  # fmt: skip
PREFILL_AND_DECODE = Deployment(
    ("three servers",), ("30002", "30003"), (), env="export CPU_BED_PREFILL_DECODE=1\n",
    decode="--disaggregation-decode-retraction-backup cpu_tensor",
)  # fmt: skip


@dataclass(frozen=True)
class Running:
    ports: dict[str, int]  # the page's -> the real ones
    log: Path

    def url(self, port: str) -> str:
        return f"http://127.0.0.1:{self.ports[port]}"


@contextlib.contextmanager
def deployed(deployment: Deployment, model: Path, directory: Path) -> Iterator[Running]:
    """Its servers, ready. Their log must say in the end what the page says."""
    commands = ""
    for text in map(block, deployment.blocks):
        commands += deployment.env + text if "--language-only" in text else text
    # What is changed: ports, which another test may have; and --sleep-on-idle, since an idle scheduler takes a core.
    ports = {number: free_port() for number in sorted(set(_PORTS.findall(commands)))}
    commands = _PORTS.sub(lambda match: str(ports[match[0]]), commands)
    bootstrap = "" if "--encoder-bootstrap-port" in commands else f" --encoder-bootstrap-port {free_port()}"
    commands = commands.replace("--language-only", f"--language-only --sleep-on-idle{bootstrap}")
    decode = "--disaggregation-mode decode"
    commands = commands.replace(decode, f"{decode} --sleep-on-idle {deployment.decode}")

    servers = Running(ports, directory / "servers.log")
    with running(on_a_cpu(commands, model), servers.log):
        for number in sorted(ports, reverse=True):
            if number.startswith("30"):
                wait_healthy(servers.url(number), servers.log)
        wait_for("Registered encoder URL" if deployment.joins else "registered with process", servers.log)
        yield servers
        said = servers.log.read_text()
    for line in ("Embeddings travel over conn_multimodal (server ", "Embedding received: ", *deployment.says):
        assert line in said, line


@pytest.mark.parametrize("name", DEPLOYMENTS_AS_WRITTEN)
def test_a_deployment_serves_as_it_is_written(
    name: str, reference: Callable[..., Any], shared_group: Any, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    shared_group.stop()
    deployment = DEPLOYMENTS_AS_WRITTEN[name]
    with deployed(deployment, tiny_model("qwen2_5_vl"), tmp_path) as servers:
        for port in deployment.ask:
            for question in ASKED:
                got = ask(servers.url(port), question)
                assert got.same_as(reference("qwen2_5_vl").answer(question)), (question.name, got)


def test_prefill_and_decode_serve_as_they_are_written(
    reference: Callable[..., Any], shared_group: Any, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    shared_group.stop()
    with deployed(PREFILL_AND_DECODE, tiny_model("qwen2_5_vl"), tmp_path) as servers:
        prefill, decode = map(servers.url, PREFILL_AND_DECODE.ask)
        for question in ASKED:
            got = ask_both(prefill, decode, servers.ports["8998"], question)
            assert got.same_as(reference("qwen2_5_vl").answer(question)), (question.name, got)
        said = servers.log.read_text()
    # On the prefill server only: the other has no pool to receive into.
    assert said.count("Embedding pool: ") == 1 and said.count("Embedding received: ") == len(ASKED)
